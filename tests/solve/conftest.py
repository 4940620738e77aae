"""What the tests of answering share: small real tasks, and a tiny trunk that has learned some."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from arctrm.config import InferenceConfig, PretrainConfig
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task
from arctrm.solve.weights import load_solver
from helpers import write_tasks

NUM_KNOWN, NUM_OTHER = 4, 3
EXACT = InferenceConfig(dtype="float32")


@dataclass(frozen=True)
class Trained:
    """A run folder, the tasks it was trained on (with answers), and tasks it does not know."""

    run: Path
    known: list[Task]
    others: list[Task]
    folder: Path
    """Of the known tasks, as files."""


@pytest.fixture(scope="session")
def small_tasks():
    """Real tasks of small grids, with at least three demonstrations and with answers."""

    def side(task):
        pairs = (*task.demonstrations, *task.test)
        return max(max(p.input.shape + p.output.shape) for p in pairs)

    small = [t for t in load_tasks("training") if side(t) <= 5 and len(t.demonstrations) >= 3]
    return small[: NUM_KNOWN + NUM_OTHER]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small_tasks):
    """A trunk of two voices, which also knows inverse tasks, trained until its grids end."""
    from arctrm.train.run import pretrain

    known, others = small_tasks[:NUM_KNOWN], small_tasks[NUM_KNOWN:]
    folder = write_tasks(tmp_path_factory.mktemp("known"), known)
    out = tmp_path_factory.mktemp("run")
    schedule = {"max_steps": 30, "warmup_steps": 5}
    fast = {"muon_lr": 0.018, "adamw_lr": 0.006}
    pretrain(
        PretrainConfig.model_validate(
            {
                "out": out,
                "data": {"subsets": [str(folder)], "test_set": str(folder)},
                "trunk": {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "loops": 2},
                "reader": {"inverse_share": 0.25},
                "trm": {"halt_max_steps": 3},
                "training": {
                    "tokens_per_batch": 4096,
                    "ema_decay": 0.9,
                    "optimiser": fast,
                    "schedule": schedule,
                },
            }
        )
    )
    return Trained(out, known, others, folder)


@pytest.fixture(scope="session")
def solver(trained):
    """Both voices, in float32 on the CPU."""
    return load_solver(trained.run, EXACT, torch.device("cpu"))
