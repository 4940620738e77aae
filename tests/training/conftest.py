"""What the tests of the training loop share: the smallest run on real tasks, on one thread."""

import pytest
import torch

from arctrm.config import PretrainConfig

TINY = {
    "data": {"subsets": ["training"], "test_set": None, "max_tasks": 2, "num_aug": 8},
    "trm": {
        "hidden_size": 16,
        "num_heads": 2,
        "num_layers": 1,
        "H_cycles": 2,
        "L_cycles": 1,
        "halt_max_steps": 2,
    },
    "training": {
        "tokens_per_batch": 1024,
        "log_every": 1,
        "schedule": {"max_steps": 4, "warmup_steps": 0},
    },
}


@pytest.fixture(scope="session")
def tiny():
    """Build a configuration from `TINY` and dotted overrides: `tiny({"trm.hidden_size": 32})`."""

    def build(changes=None):
        config = PretrainConfig().model_dump()
        layers = {f"{table}.{k}": v for table, keys in TINY.items() for k, v in keys.items()}
        schedule = layers.pop("training.schedule")
        layers |= {f"training.schedule.{key}": value for key, value in schedule.items()}
        for dotted, value in (layers | (changes or {})).items():
            *tables, key = dotted.split(".")
            place = config
            for table in tables:
                place = place[table]
            place[key] = value
        return PretrainConfig.model_validate(config)

    return build


@pytest.fixture
def one_thread():
    """Arithmetic as in a process with OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
