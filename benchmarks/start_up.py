"""How soon the command answers, and what building and opening a training set cost.

    python benchmarks/start_up.py

Three things, each `--rounds` times in processes of their own: `arctrm --help` (processor time),
`arctrm data build` of ARC-AGI-1 training and evaluation (wall-clock time of the whole command,
bytes on disk), and opening that set (wall-clock time, without the imports). Prints one table of
medians and spreads beside the limits that the project holds itself to.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from arctrm.console import console
from arctrm.training.provenance import git_revision, hardware

HELP_SECONDS, BUILD_SECONDS, SET_BYTES = 0.5, 10.0, 20e6
"""Limits."""
COMMAND = (sys.executable, "-m", "arctrm")
OPEN = """
import sys, time
from pathlib import Path
from arctrm.data.dataset import open_base_set
begin = time.perf_counter()
open_base_set(Path(sys.argv[1]))
print(time.perf_counter() - begin)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    run(*COMMAND, "--help")  # reads the files once
    helped = [run(*COMMAND, "--help") for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as folder:
        built, size = build(Path(folder), rounds)
        opened = [float(said(sys.executable, "-c", OPEN, f"{folder}/0")) for _ in range(rounds)]
    table = Table(title=f"start-up, {git_revision()[:12]}, {hardware()}")
    for column in ("", "median", "spread", "limit"):
        table.add_column(column)
    add(table, "arctrm --help, processor time", [cpu for cpu, _ in helped], HELP_SECONDS)
    add(table, "arctrm --help, wall-clock time", [wall for _, wall in helped])
    add(table, "arctrm data build, training + evaluation", built, BUILD_SECONDS)
    table.add_row("bytes on disk", f"{size / 1e6:.2f} MB", "", f"{SET_BYTES / 1e6:.0f} MB")
    add(table, "opening the set", opened)
    table.caption = f"{rounds} runs of each"
    console().print(table)


def build(folder: Path, rounds: int) -> tuple[list[float], int]:
    """Wall-clock seconds of the builds, and bytes of the first, which stays in `folder`/0."""
    subsets = ("--subsets", "training", "--subsets", "evaluation")
    seconds = [
        run(*COMMAND, "data", "build", *subsets, "--out", str(folder / str(number)))[1]
        for number in range(rounds)
    ]
    return seconds, sum(f.stat().st_size for f in (folder / "0").rglob("*") if f.is_file())


def run(*command: str) -> tuple[float, float]:
    """Processor time (user and system) and wall-clock time of a command that must succeed."""
    before, begin = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, wall


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def add(table: Table, name: str, seconds: Sequence[float], limit: float | None = None) -> None:
    spread = max(seconds) - min(seconds)
    shown = "" if limit is None else f"{limit:g} s"
    table.add_row(name, f"{statistics.median(seconds):.3f} s", f"{spread:.3f} s", shown)


if __name__ == "__main__":
    main()
