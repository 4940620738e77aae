"""Commands stopped at any moment: an interrupt counts; a kill or a full disk loses nothing and
leaves no file.

`CAMPAIGN_ROUNDS` stops of each command, at moments drawn anew each time (`CAMPAIGN_SEED`).
"""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mutator import SEED

from arctrm import system
from arctrm.cli import STOPS, main
from arctrm.config.base import all_fields
from arctrm.config.commands import COMMANDS as MODELS

ROUNDS = int(os.environ.get("CAMPAIGN_ROUNDS", "4"))
PRELOADED = ["arctrm.train.run", "arctrm.solve.many", "arctrm.solve.evaluate"]
PRELOADED += ["arctrm.solve.baseline", "arctrm.cli.app"]
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
    "joint": (
        ["joint", *SMALL, "--set", "trunk.loops=2", "--set", "trm_checkpoint=run", "--out", "out"],
        ["--resume"],
        ["model.safetensors"],
    ),
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


@pytest.fixture(scope="session")
def forks():
    """Processes that have imported everything: a kill strikes the command, not its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield context


def run_words(words, says, largest):
    """As a process of its own; `largest`: bytes of a file beyond which the disk is full."""
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(says.fileno(), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))  # those there may be files
    if largest is not None:
        system._FULL += (errno.EFBIG,)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    main(words)


def forked(forks, words, largest=None):
    """The process, and where to read its output."""
    reads, says = forks.Pipe(duplex=False)
    process = forks.Process(target=run_words, args=(words, says, largest))
    process.start()
    says.close()
    return process, reads


def finished(forks, words, largest=None):
    """Exit code and output."""
    process, reads = forked(forks, words, largest)
    said = b"".join(iter(lambda: os.read(reads.fileno(), 2**16), b"")).decode()
    process.join()
    return process.exitcode, said


def start(words):
    """With its imports; also a test in the background, which ignores Ctrl-C, lets it have that."""
    command = [sys.executable, "-m", "arctrm", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    usual = lambda: [signal.signal(number, signal.SIG_DFL) for number in STOPS]
    return subprocess.Popen(command, env=ENVIRONMENT, preexec_fn=usual, **pipes)


def wait_for_first_line(process):
    """Until signals come to arctrm: before, on a busy machine for long, Python starts."""
    status, seen = Path(f"/proc/{process.pid}/status"), 0
    while sys.platform == "linux" and process.poll() is None and not seen:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        seen = int(caught[1], 16) >> (signal.SIGTERM - 1) & 1 if caught else 0
        time.sleep(0.005)


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


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def half_written(folder: Path) -> list[str]:
    return [name for name in files_of(folder) if ".tmp-" in name]


@pytest.fixture
def whole(command, forks, place):
    """How the command ends that nothing stops, and how long that takes."""
    words, _, names = COMMANDS[command]
    finished(forks, ["--version"])  # imports
    begin = time.monotonic()
    code, said = finished(forks, words)
    assert code == 0, said
    return end_of(Path("out"), names), files_of(Path("out")), time.monotonic() - begin


def goes_on(command, forks, whole):
    """Run what was stopped again: it ends as if nothing had stopped it."""
    words, more, names = COMMANDS[command]
    before = files_of(Path("out"))
    code, said = finished(forks, [*words, *more])
    if code == 2:  # nothing to go on with, or nothing left to do
        code, said = finished(forks, words)
    if code == 2:  # it had ended before
        ended = ("finished run", "already holds")
        assert any(told in said for told in ended), (before, said)
    else:
        assert code == 0, (before, said)
    end, files, _ = whole
    found = end_of(Path("out"), names)
    assert found.keys() == end.keys()
    assert found == end or command == "solve", before  # whose answers depend on the clock
    assert files_of(Path("out")) == files, before


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment_it_goes_on_to_the_same_end(command, forks, whole, capsys):
    rng, kills, seconds = random.Random(f"{SEED} {command}"), 0, whole[-1]
    while kills < ROUNDS:
        shutil.rmtree("out", ignore_errors=True)
        process, _ = forked(forks, COMMANDS[command][0])
        time.sleep(rng.uniform(0, 1.1) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        goes_on(command, forks, whole)
    with capsys.disabled():
        print(f"\n{command}: {kills} kills, seed {SEED}")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(command, forks, whole, capsys):
    rng, full = random.Random(f"{SEED} {command} disk"), 0
    sizes = [path.stat().st_size for path in Path("out").rglob("*") if path.is_file()]
    keys = {".".join(key) for key in all_fields(MODELS[command])}
    for _ in range(ROUNDS):
        shutil.rmtree("out", ignore_errors=True)
        largest = int(max(sizes) ** rng.random())
        code, said = finished(forks, COMMANDS[command][0], largest)
        if code:
            *_, last = said.splitlines()
            assert (code, "Traceback" in said) == (1, False), (largest, said)
            assert re.match(r"error: .*the disk is full", said[said.rindex("error: ") :]), said
            assert set(re.findall(r"\b[a-z]+\.[a-z_]+\b", last)) <= keys, said
            full += 1
        assert not half_written(Path("out"))
        goes_on(command, forks, whole)
    with capsys.disabled():
        print(f"\n{command}: {full} full disks in {ROUNDS} rounds, seed {SEED}")


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
        process, after = start(words), rng.uniform(0, 2.0)
        wait_for_first_line(process)
        time.sleep(after)
        process.send_signal(STOPS[number % 3])
        try:
            _, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            faults.append((after, "lost"))
            continue
        stopped += process.returncode == 130
        if process.returncode not in (0, 130) or "Traceback" in err:
            faults.append((after, process.returncode, err[-400:]))
        if left := half_written(Path("out")):
            faults.append((after, "files", left))
    with capsys.disabled():
        print(f"\n{command}: {stopped} of {ROUNDS} stopped, faults {faults}, seed {SEED}")
    assert not faults


@pytest.mark.slow
def test_a_pipe_whose_reader_has_seen_enough_ends_the_command_cleanly(place):
    command = f"{sys.executable} -m arctrm data show evaluation --limit 50 | head -1"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout
    assert done.stderr == ""
