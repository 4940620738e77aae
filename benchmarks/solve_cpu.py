"""`arctrm solve` with the bundled weights on a CPU: the first answer, the budget, right or wrong.

    python benchmarks/solve_cpu.py                          # three tasks, 30 s each, two cores
    python benchmarks/solve_cpu.py arc1:66e6c45b --budget 20

Each task is a command of its own. The budget counts from when the model is loaded; its use is taken
from the command's own "first answer after" and the wall-clock time from that line to the end.
Prints one table.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from rich.table import Table

from arctrm.console import console
from arctrm.training.provenance import git_revision, hardware

TASKS = ("arc1:66e6c45b", "arc1:59341089", "arc1:e133d23d")
TOLERANCE = 0.1
"""Of the budget, that the total may be above it."""
FIRST = re.compile(r"first answer after ([0-9.]+) s")
SOLVED = re.compile(r"([0-9]+ of [0-9]+) test inputs with a known answer solved")


@dataclass(frozen=True)
class Run:
    """What one command took."""

    first: float
    """Seconds of the budget until the first answer."""
    total: float
    """Seconds of the budget used."""
    command: float
    """Seconds of the whole command, imports and loading included."""
    solved: str


def main() -> None:
    args = arguments()
    table = Table(title=f"solve on a CPU, {git_revision()[:12]}, {hardware()}")
    for column in ("task", "first answer", "of the budget used", "whole command", "solved"):
        table.add_column(column)
    for task in args.tasks:
        result = solve(task, args.budget, args.threads)
        within = "within" if result.total <= args.budget * (1 + TOLERANCE) else "ABOVE"
        used = f"{result.total:.1f} of {args.budget:g} s, {within} {TOLERANCE:.0%}"
        table.add_row(task, f"{result.first:.1f} s", used, f"{result.command:.1f} s", result.solved)
    table.caption = f"bundled weights, {args.threads} threads"
    console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=TASKS)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def solve(task: str, budget: float, threads: int) -> Run:
    """Run the command, reading its lines as they come."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "arctrm", "solve", task, "--check", "--out", out]
        command += ["--budget", f"{budget:g}s"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=environment, **streams) as process:
            assert process.stdout is not None
            lines = [(time.perf_counter() - begin, line) for line in process.stdout]
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit("".join(line for _, line in lines))
    at, first = next((at, float(m[1])) for at, line in lines if (m := FIRST.search(line)))
    solved = next((m[1] for _, line in lines if (m := SOLVED.search(line))), "not known")
    return Run(first, first + seconds - at, seconds, solved)


if __name__ == "__main__":
    main()
