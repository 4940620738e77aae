"""What tests of training share."""

import pytest

from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.sources import load_tasks


@pytest.fixture(scope="session")
def base():
    """A small set of real tasks, half of them evaluated."""
    tasks = {name: load_tasks(name, max_tasks=12) for name in ("training", "evaluation")}
    return base_set_from_tasks(tasks, "evaluation", 50)
