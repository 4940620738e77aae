"""One valid file of each kind, small: what campaigns change, kill and interrupt."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from arctrm.config import EvalConfig, PretrainConfig
from arctrm.data.sources import load_tasks
from arctrm.model.reference import read_reference_file
from arctrm.solve.evaluate import evaluate
from arctrm.solve.results import Store
from arctrm.train.run import pretrain

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trm_reference_small.safetensors"
TINY = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "loops": 2}
FAST = {"tokens_per_batch": 4096, "schedule": {"max_steps": 2, "warmup_steps": 0}, "log_every": 1}


def make(folder: Path) -> Path:
    """Tasks, Kaggle files, a base set, a run, scores, answers so far, a published checkpoint."""
    small = lambda task: max(max(p.input.shape + p.output.shape) for p in task.test) <= 4
    tasks = [task for task in load_tasks("training") if small(task)][:2]
    pairs = lambda own: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in own]
    files = {t.id: {"train": pairs(t.demonstrations), "test": pairs(t.test)} for t in tasks}
    solutions = {task.id: [pair.output.tolist() for pair in task.test] for task in tasks}
    for name, own in files.items():
        write(folder / "tasks" / f"{name}.json", own)
    write(folder / "kaggle" / "a_challenges.json", files)
    write(folder / "kaggle" / "a_solutions.json", solutions)
    source = str(folder / "tasks")
    data = {"subsets": [source], "test_set": source, "path": folder / "base"}
    told = {"out": folder / "run", "data": data, "trunk": TINY, "training": FAST}
    pretrain(PretrainConfig.model_validate(told))
    with pytest.MonkeyPatch.context() as patch:  # as if killed before the end
        patch.setattr(Store, "finish", lambda self, tasks: None)
        evaluate(eval_config(folder, folder / "scores"))
    (folder / "scores" / "unfinished.jsonl").rename(folder / "unfinished.jsonl")
    with safe_open(FIXTURE, "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118
        weights, told = {name: file.get_tensor(name) for name in names}, file.metadata()
    save_file(weights, folder / "published.safetensors", told)
    rows = len(read_reference_file(folder / "published.safetensors").puzzle_emb["weights"])
    write(folder / "identifiers.json", [f"{n:08d}" for n in range(rows)])
    return folder


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def eval_config(folder: Path, out: Path, **changes) -> EvalConfig:
    told = {
        "checkpoint": folder / "run",
        "out": out,
        "evaluation": {"test_set": str(folder / "tasks"), "keep_candidates": True},
        "inference": {"views": 1},
    }
    return EvalConfig.model_validate(told | changes)
