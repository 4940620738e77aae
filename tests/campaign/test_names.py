"""Ids and paths of any kind, in every command: shown as they stand, never markup or control."""

import json
import shutil
from pathlib import Path

import pytest

from arctrm.cli import main

NAMES = ("[/]", "[red]x", ":smile:", "\x1b[31mx\x07", "a\nb", "\u202ex", "é" * 120, "'; x")
SMALL = [
    *("--set", "trunk.hidden_size=16", "--set", "trunk.num_heads=2", "--set", "trunk.loops=1"),
    *("--set", "training.tokens_per_batch=4096", "--set", "training.schedule.max_steps=1"),
    *("--set", "trunk.num_layers=1", "--set", "data.subsets=[{tasks}]", "--set", "data.test_set="),
]
VIEWS = ("--set", "inference.views=1")
EVAL = ("eval", "--checkpoint", "{run}", "--test-set", "{tasks}", *VIEWS, "--out")
COMMANDS = {
    "data show": ("data", "show", "{tasks}", "{id}"),
    "data show --statistics": ("data", "show", "{tasks}", "--statistics"),
    "data build": (
        "data",
        "build",
        "--subsets",
        "{tasks}",
        "--test-set",
        "{tasks}",
        "--out",
        "{out}",
    ),
    "pretrain": ("pretrain", *SMALL, "--out", "{out}"),
    "pretrain --dry-run": ("pretrain", *SMALL, "--out", "{out}", "--dry-run"),
    "joint": ("joint", *SMALL, "--out", "{out}"),
    "eval": (*EVAL, "{out}", "--ablate", "no-reader,no-trm"),
    "eval --dry-run": (*EVAL, "{out}", "--dry-run"),
    "eval --submission": (
        "eval",
        "--submission",
        "{scores}",
        "--test-set",
        "{tasks}",
        "--out",
        "{out}",
    ),
    "baseline": (
        "baseline",
        "--checkpoint",
        "{run}",
        "--views",
        "1",
        "--test-set",
        "{tasks}",
        "--out",
        "{out}",
    ),
    "solve": (
        "solve",
        "{tasks}",
        "--checkpoint",
        "{run}",
        "--budget",
        "1",
        "--check",
        "--out",
        "{out}",
    ),
    "solve --dry-run": ("solve", "{tasks}", "--checkpoint", "{run}", "--dry-run"),
}


QUICK = ("data build", "eval", "eval --submission")


@pytest.mark.parametrize(
    ("name", "commands"),
    [pytest.param("[/]", QUICK, id="some")]
    + [pytest.param(n, tuple(COMMANDS), id=ascii(n)[:12], marks=pytest.mark.slow) for n in NAMES],
)
def test_commands_take_strange_names(name, commands, seeds, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    home = Path(name)
    task_id = name if name.isprintable() else "plain"
    for folder in ("run", "scores"):
        shutil.copytree(seeds / folder, home / folder)
    files = sorted((seeds / "tasks").iterdir())
    tasks = {
        f"{task_id}{n}" if n else task_id: json.loads(f.read_text()) for n, f in enumerate(files)
    }
    submission = json.loads((seeds / "scores/submission.json").read_text())
    answers = dict(zip(tasks, (submission[file.stem] for file in files), strict=True))
    (home / "scores/submission.json").write_text(json.dumps(answers))
    (home / "tasks.json").write_text(json.dumps(tasks))
    for number, command in enumerate(commands):
        places = {
            "{tasks}": str(home / "tasks.json"),
            "{run}": str(home / "run"),
            "{scores}": str(home / "scores"),
            "{out}": str(home / f"out{number}"),
            "{id}": task_id,
        }
        given = []
        for word in COMMANDS[command]:
            for place, path in places.items():
                word = word.replace(f"[{place}]", json.dumps([path])).replace(place, path)
            given.append(word)
        with pytest.raises(SystemExit) as stop:
            main(given)
        out, err = capfd.readouterr()
        assert stop.value.code == 0, (command, err)
        raw = {c for c in out + err if c != "\n" and not c.isprintable()}
        assert not raw, (command, raw)
        if command in ("data show", "data build", "eval", "solve") and name.isprintable():
            assert name[:4] in " ".join((out + err).split()), command
