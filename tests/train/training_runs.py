"""What tests of training runs share: the smallest configuration, runs of it, and their traces."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from arctrm.checkpoints import latest_checkpoint
from arctrm.config import JointConfig, PretrainConfig
from arctrm.data.base_set import prepare
from arctrm.train.loop import Run
from arctrm.train.run import build_run

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    "CUDA_VISIBLE_DEVICES": "",
}
SMALL = {
    "data.subsets": ["training"],
    "data.test_set": None,
    "data.max_tasks": 2,
    "data.num_aug": 8,
    "trunk.hidden_size": 16,
    "trunk.num_heads": 2,
    "trunk.num_layers": 1,
    "trunk.loops": 2,
    "training.tokens_per_batch": 4096,
    "training.log_every": 1,
    "training.schedule.max_steps": 4,
    "training.schedule.warmup_steps": 0,
}


def small(out=None, changes=None, model=PretrainConfig):
    """A configuration of `SMALL` and changes by dotted key."""
    tree = {} if out is None else {"out": str(out)}
    for dotted, value in (SMALL | (changes or {})).items():
        *tables, key = dotted.split(".")
        place = tree
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
    return model.model_validate_json(json.dumps(tree))


def small_joint(out=None, changes=None):
    return small(out, changes, JointConfig)


def new_run(out, changes=None, model=PretrainConfig) -> Run:
    """Model, steps and optimisers, nothing trained yet."""
    config = small(out, changes, model)
    return build_run(config, prepare(config.data), Accelerator(cpu=True), time.monotonic())


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def log_lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers_of(out):
    """Logged lines without what the clock decides."""
    timed = ("elapsed", "examples_per_second", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in log_lines(out)]


def saved_steps(out):
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").iterdir())


def end_of(out, step):
    """The bytes of what a run has learned by a step, and of where it stands."""
    folder = out / "checkpoints" / f"step_{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def command(out, changes, *more, processes=1, kind="pretrain"):
    """A run of `pretrain` or `joint` as a process of its own."""
    flags = {**SMALL, **changes}
    words = [sys.executable]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        words += [*launch, str(processes)]
    words += ["-m", "arctrm", kind, "--out", str(out)]
    for key, value in flags.items():
        shown = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        words += ["--set", f"{key}={shown}"]
    return [*words, *more]


def start(out, changes, *more):
    return subprocess.Popen(
        command(out, changes, *more), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


def finish(out, changes, *more, **how):
    done = subprocess.run(
        command(out, changes, *more, **how),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def wait_for_checkpoint(out, process, seconds=120):
    until = time.monotonic() + seconds
    while latest_checkpoint(out) is None:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)
