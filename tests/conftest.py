"""What the tests of solving share: small real tasks and a tiny TRM that was really pretrained.

Every test process computes on one thread: tiny tensors gain nothing from a second one, and threads
that wait for each other on a busy machine cost a factor of ten.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import pytest

from arctrm.config import JointConfig, PretrainConfig
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task

REFERENCE = Path(__file__).parent / "fixtures" / "trm_reference_small.safetensors"
NUM_KNOWN, NUM_OTHER = 6, 3
SMALL_TRM = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_layers": 1,
    "H_cycles": 2,
    "L_cycles": 1,
    "halt_max_steps": 4,
}


def task_json(task: Task) -> dict:
    def pairs(part):
        return [
            {"input": p.input.tolist()}
            | ({} if p.output is None else {"output": p.output.tolist()})
            for p in part
        ]

    return {"train": pairs(task.demonstrations), "test": pairs(task.test)}


@pytest.fixture(scope="session")
def write_tasks():
    """Write tasks as one file each: `write_tasks(folder, tasks)`."""

    def write(folder: Path, tasks: list[Task]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            (folder / f"{task.id}.json").write_text(json.dumps(task_json(task)))
        return folder

    return write


@pytest.fixture(scope="session")
def write_kaggle():
    """Write a Kaggle challenges file and, apart from it, its solutions: both paths."""

    def write(folder: Path, tasks: list[Task]) -> tuple[Path, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        challenges, solutions = folder / "arc_challenges.json", folder / "known_outputs.json"
        challenges.write_text(json.dumps({t.id: task_json(t.without_answers()) for t in tasks}))
        solutions.write_text(json.dumps({t.id: [p.output.tolist() for p in t.test] for t in tasks}))
        return challenges, solutions

    return write


@pytest.fixture(scope="session")
def small_tasks() -> list[Task]:
    """Real tasks of small grids, with at least three demonstrations and with answers."""

    def side(task):
        pairs = (*task.demonstrations, *task.test)
        return max(max(p.input.shape + p.output.shape) for p in pairs)

    small = [t for t in load_tasks("training") if side(t) <= 7 and len(t.demonstrations) >= 3]
    return small[: NUM_KNOWN + NUM_OTHER]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, small_tasks, write_tasks):
    """Pretrain a tiny TRM on the first small tasks: `pretrained(trm={...}, **top_level)`."""
    from arctrm.training import pretrain

    folder = write_tasks(tmp_path_factory.mktemp("tasks") / "known", small_tasks[:NUM_KNOWN])

    def run(steps=30, num_aug=8, seed=0, **trm) -> Path:
        config = PretrainConfig.model_validate(
            {
                "seed": seed,
                "data": {"subsets": [str(folder)], "test_set": str(folder), "num_aug": num_aug},
                "trm": {**SMALL_TRM, **trm},
                "training": {
                    "tokens_per_batch": 2048,
                    "ema_decay": 0.9,
                    "schedule": {"max_steps": steps, "warmup_steps": 5},
                },
            }
        )
        out = tmp_path_factory.mktemp("run")
        pretrain.run(config, out, False)
        return out

    return run


@pytest.fixture(scope="session")
def trained(pretrained, small_tasks, tmp_path_factory, write_tasks):
    """A run folder and the sizes of its TRM, the tasks it was trained on (with answers), and tasks
    it does not know.
    """
    known, others = small_tasks[:NUM_KNOWN], small_tasks[NUM_KNOWN:]
    folder = write_tasks(tmp_path_factory.mktemp("known"), known)
    return SimpleNamespace(
        run=pretrained(), trm=SMALL_TRM, known=known, others=others, folder=folder
    )


@pytest.fixture(scope="session")
def trained_reader(tmp_path_factory, trained):
    """Run folder of a tiny reader of the same tasks as `trained`: `trained_reader(sequence=...)`,
    of another seed: `trained_reader(seed=1)`.

    It has learned enough to end its grids.
    """
    from arctrm.training import pretrain

    def run(steps=100, seed=0, **reader) -> Path:
        reader = {"hidden_size": 32, "num_heads": 2, "num_layers": 2, **reader}
        data = {"subsets": [str(trained.folder)], "test_set": str(trained.folder), "num_aug": 8}
        schedule = {"max_steps": steps, "warmup_steps": 5}
        training = {"tokens_per_batch": 4096, "ema_decay": 0.9, "schedule": schedule}
        config = {"model": "reader", "data": data, "reader": reader, "training": training}
        config["seed"] = seed
        out = tmp_path_factory.mktemp("reader")
        pretrain.run(PretrainConfig.model_validate(config), out, False)
        return out

    return run


@pytest.fixture(scope="session")
def tiny_reader(trained_reader) -> Path:
    """A run folder of a tiny reader that sees one pair at a time."""
    return trained_reader()


@pytest.fixture(scope="session")
def joined(tmp_path_factory, trained, tiny_reader, trained_reader):
    """Run folder of a tiny hybrid of `trained` and `tiny_reader`: `joined(coupled, sequence)`,
    with a second reader: `joined(ensemble=True)`.
    """
    from arctrm.training import joint

    done = {}

    def run(coupled=True, sequence="pair", ensemble=False):
        if (coupled, sequence, ensemble) in done:
            return done[coupled, sequence, ensemble]
        paths = dict.fromkeys(("context", "draft", "back"), coupled)
        sizes = {"num_context_slots": 4, "adapter_heads": 2, "drafted_pairs": 8, "draft_every": 4}
        config = {
            "batch_size": 4,
            "reader_checkpoint": str(tiny_reader),
            "trm_checkpoint": str(trained.run),
            "ensemble_checkpoints": [str(trained_reader(seed=1))] if ensemble else [],
            "data": {"subsets": [str(trained.folder)], "test_set": str(trained.folder)},
            "trm": trained.trm,
            "reader": {
                "hidden_size": 32,
                "num_heads": 2,
                "num_layers": 2,
                "sequence": sequence,
                "max_pairs": 3,
            },
            "coupling": {**paths, **sizes, "reader_tokens_per_batch": 8400},
            "training": {
                "tokens_per_batch": 5472,
                "ema_decay": 0.9,
                "schedule": {"max_steps": 4, "warmup_steps": 1},
            },
        }
        out = tmp_path_factory.mktemp("hybrid")
        joint.run(JointConfig.model_validate_json(json.dumps(config)), out, False)
        return done.setdefault((coupled, sequence, ensemble), out)

    return run


@pytest.fixture(scope="session")
def trained_per_view(pretrained) -> Path:
    """A run with one embedding per view (8 of each task), of the same tasks as `trained`."""
    return pretrained(steps=10, seed=3, task_embedding="per_view")


@pytest.fixture
def reference_file(tmp_path):
    """A published-style checkpoint file of nine embeddings, and its identifiers beside it."""
    import torch
    from safetensors import safe_open

    with safe_open(REFERENCE, "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118
        weights = {name.removeprefix("weights."): file.get_tensor(name) for name in names}
    path = tmp_path / "step_100"
    torch.save(weights, path)
    colours = "0213456789"
    task = "00576224"
    identifiers = ["<blank>", task, *(f"{task}|||t{turn}|||{colours}" for turn in range(1, 8))]
    (tmp_path / "identifiers.json").write_text(json.dumps(identifiers))
    return path


@pytest.fixture
def copied_run(trained, tmp_path) -> Path:
    """A copy of `trained.run` to damage."""
    return Path(shutil.copytree(trained.run, tmp_path / "copied_run"))
