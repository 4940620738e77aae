"""What the tests of `arctrm pretrain` share: start, wait for, and compare runs."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from arctrm.data.build import prepare
from arctrm.training.checkpoints import latest_checkpoint
from arctrm.training.pretrain import build_run

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out, flags, *more):
    """Words after the interpreter; `flags` become `--set key=value`."""
    sets = [word for key, value in flags.items() for word in ("--set", f"{key}={value}")]
    return ["-m", "arctrm", "pretrain", "--out", str(out), *sets, *more]


def start(out, flags, *more):
    return subprocess.Popen(
        [sys.executable, *command(out, flags, *more)],
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(out, flags, *more):
    process = start(out, flags, *more)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def wait_for_checkpoint(out, process, seconds=60):
    until = time.monotonic() + seconds
    while latest_checkpoint(out) is None:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.005)


def end_of(out, step=60):
    """The bytes of what a run has learned by a step."""
    folder = out / "checkpoints" / f"step_{step:08d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "trainer.safetensors")]


def numbers_of(out):
    """Logged lines without what the clock decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: v for key, v in line.items() if "second" not in key and key != "elapsed"}
        for line in lines
    ]


def refused(error, action):
    """The one sentence of a refusal."""
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


def plain(table):
    """A table as text."""
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def expected_after_one_step(config, out):
    """Weights after one step with the mean of the gradients of rank 0 and rank 1."""
    ranks = []
    for rank in (0, 1):
        process = SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=1)
        ranks.append(build_run(config, prepare(config.data), out, process, 0.0))
        ranks[-1].steps[0]()
    flat = [run.gradients.flat for run in ranks]
    assert not torch.allclose(*flat)
    flat[0].copy_((flat[0] + flat[1]) / 2)
    ranks[0].optimisers.step(1.0)
    return ranks[0].model.state_dict()
