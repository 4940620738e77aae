"""What the tests of `baseline` share: one run of the tiny reader."""

import pytest
from baseline_runs import answered, config


@pytest.fixture(scope="session")
def settings(trained, tiny_reader):
    """The tiny reader on the tasks it was trained on."""
    return config(trained.folder, checkpoint=tiny_reader)


@pytest.fixture(scope="session")
def done(settings, tmp_path_factory):
    """The results of an uninterrupted run of `settings`, and where they are."""
    path = tmp_path_factory.mktemp("baseline") / "results.json"
    return answered(settings, path), path
