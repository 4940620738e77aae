"""What the tests of solving share: a run of `baseline`, and hybrids with a hub reader."""

from pathlib import Path

import pytest
from baseline_runs import answered, config
from hub_models import save_model
from hub_runs import joint_config

from arctrm.training import joint


@pytest.fixture(scope="session")
def settings(trained, tiny_reader):
    """The tiny reader on the tasks it was trained on."""
    return config(trained.folder, checkpoint=tiny_reader)


@pytest.fixture(scope="session")
def done(settings, tmp_path_factory):
    """The results of an uninterrupted run of `settings`, and where they are."""
    path = tmp_path_factory.mktemp("baseline") / "results.json"
    return answered(settings, path), path


@pytest.fixture(scope="session")
def hub_model(tmp_path_factory) -> Path:
    """A small random model of the hub."""
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="session")
def joined_hub(hub_model, trained, tmp_path_factory):
    """Run folder of two steps of joint training: `joined_hub(mode, **coupling)`."""
    done = {}

    def run(mode="lora", **coupling) -> Path:
        key = (mode, *coupling)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("hybrid")
            joint.run(joint_config(hub_model, trained, mode, coupling), done[key], False)
        return done[key]

    return run
