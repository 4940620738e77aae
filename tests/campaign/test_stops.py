"""Commands stopped at any moment: an interrupt counts, a kill loses nothing and leaves no file.

`CAMPAIGN_ROUNDS` stops of each command, at moments drawn anew each time (`CAMPAIGN_SEED`).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mutator import SEED

ROUNDS = int(os.environ.get("CAMPAIGN_ROUNDS", "4"))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    "CUDA_VISIBLE_DEVICES": "",
}
SMALL = [
    *("--set", "trunk.hidden_size=16", "--set", "trunk.num_heads=2", "--set", "trunk.loops=1"),
    *("--set", "trunk.num_layers=1", "--set", "training.tokens_per_batch=4096", "--set"),
    *('data.subsets=["tasks"]', "--set", "data.test_set=", "--set", "training.log_every=1"),
    *("--set", "training.schedule.max_steps=6", "--set", "training.checkpoint_every_steps=1"),
]
# Command -> its words, those that go on after a kill, and the files that say how it ended.
COMMANDS = {
    "data build": (
        ["data", "build", "--subsets", "tasks", "--test-set", "tasks", "--out", "out"],
        [],
        ["base.safetensors"],
    ),
    "pretrain": (["pretrain", *SMALL, "--out", "out"], ["--resume"], ["model.safetensors"]),
    "eval": (
        ["eval", "--checkpoint", "run", "--test-set", "tasks", "--views", "2", "--out", "out"],
        ["--resume"],
        ["submission.json", "scores.json"],
    ),
    "baseline": (
        ["baseline", "--checkpoint", "run", "--test-set", "tasks", "--views", "2", "--out", "out"],
        ["--resume"],
        ["submission.json"],
    ),
    "solve": (
        ["solve", "tasks", "--checkpoint", "run", "--budget", "1", "--out", "out"],
        ["--resume"],
        ["submission.json"],
    ),
}
WITHIN = {"seconds_per_task", "device"}  # what the clock decides


@pytest.fixture
def place(seeds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tasks", "run"):
        shutil.copytree(seeds / name, tmp_path / name)
    return tmp_path


def start(words):
    command = [sys.executable, "-m", "arctrm", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


def finished(words):
    process = start(words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def end_of(folder: Path, names) -> dict[str, object]:
    """What a command leaves in the end, but for times."""
    found = {}
    for name in names:
        path = sorted(folder.rglob(name))[-1]
        if path.suffix == ".json":
            told = json.loads(path.read_text())
            found[name] = {k: v for k, v in told.items() if k not in WITHIN}
        else:
            found[name] = path.read_bytes()
    return found


def left_over(folder: Path) -> list[str]:
    names = [path.name for path in folder.rglob("*")]
    return [name for name in names if name.startswith(".tmp-") or "unfinished" in name]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment_it_goes_on_to_the_same_end(command, place, capsys):
    words, more, names = COMMANDS[command]
    begin = time.monotonic()
    code, _, err = finished(words)
    assert code == 0, err
    usual, whole = time.monotonic() - begin, end_of(Path("out"), names)
    rng, kills = random.Random(f"{SEED} {command}"), 0
    for _ in range(ROUNDS):
        shutil.rmtree("out")
        process = start(words)
        time.sleep(rng.uniform(0, 1.1) * usual)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        before = sorted(Path("out").rglob("*")) if Path("out").exists() else []
        code, _, err = finished([*words, *more])
        if code == 2:  # nothing to go on with, or nothing left to do
            code, _, err = finished(words)
        if code == 2:  # it had ended before the kill
            ended = ("finished run", "earlier run", "already holds")
            assert any(said in err for said in ended), (before, err)
        else:
            assert code == 0, (before, err)
        if command != "solve":  # whose answers depend on the clock
            assert end_of(Path("out"), names) == whole, before
        assert end_of(Path("out"), names).keys() == whole.keys()
        assert not left_over(Path("out")), before
    with capsys.disabled():
        print(f"\n{command}: {kills} kills in {ROUNDS} rounds, seed {SEED}")


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, "data show"])
def test_an_interrupt_in_the_first_two_seconds_counts(command, place, capsys):
    words = ["data", "show", "evaluation2", "--limit", "200"]
    if command in COMMANDS:
        words = COMMANDS[command][0]
    if command == "pretrain":
        words = [*words, "--set", "training.schedule.max_steps=100000"]
    if command == "solve":
        words = ["60" if word == "1" else word for word in words]
    rng, faults, stopped = random.Random(f"{SEED} {command} interrupt"), [], 0
    for number in range(ROUNDS):
        shutil.rmtree("out", ignore_errors=True)
        process, after = start(words), rng.uniform(0.05, 2.0)
        time.sleep(after)
        process.send_signal((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 3])
        try:
            _, err = process.communicate(timeout=45)
        except subprocess.TimeoutExpired:
            process.kill()
            faults.append((after, "lost"))
            continue
        stopped += process.returncode == 130
        if process.returncode not in (0, 130) or "Traceback" in err:
            faults.append((after, process.returncode, err[-400:]))
        if Path("out").exists() and [p for p in left_over(Path("out")) if p.startswith(".tmp-")]:
            faults.append((after, "files", left_over(Path("out"))))
    with capsys.disabled():
        print(f"\n{command}: {stopped} of {ROUNDS} stopped, {len(faults)} faults, seed {SEED}")
    assert not faults


@pytest.mark.slow
def test_a_pipe_whose_reader_has_seen_enough_ends_the_command_cleanly(place):
    command = f"{sys.executable} -m arctrm data show evaluation --limit 50 | head -1"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout
    assert done.stderr == ""
