"""`arctrm solve` on a CPU, quiet and beside busy processes: first answer, budget, right or wrong.

    python benchmarks/solve_cpu.py                          # three tasks, 30 s each, two cores
    python benchmarks/solve_cpu.py arc1:66e6c45b --budget 20 --busy 4

Each task is a command of its own, with the bundled weights unless --checkpoint is given. The budget
counts from when the model is loaded; its use is taken from the command's own "first answer after"
and the wall-clock time from that line to the last. Prints one table.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.table import Table

from arctrm.console import console
from arctrm.system import git_revision, processor

TASKS = ("arc1:66e6c45b", "arc1:59341089", "arc1:e133d23d")
TOLERANCE = 0.1
"""Of the budget, that the total may be above it."""
FIRST = re.compile(r"first answer after ([0-9.]+) s")
SOLVED = re.compile(r"([0-9]+ of [0-9]+) test inputs with a known answer solved")
BUSY = "while True: sum(range(10**6))"


def main() -> None:
    args = arguments()
    table = Table(title=f"solve on a CPU, {git_revision()[:12]}, {processor()}")
    for column in ("task", "beside", "first answer", "of the budget used", "command", "solved"):
        table.add_column(column)
    for count in dict.fromkeys((0, args.busy)):
        with busy(count):
            for task in args.tasks:
                first, total, command, solved = solve(task, args)
                within = "within" if total <= args.budget * (1 + TOLERANCE) else "ABOVE"
                used = f"{total:.1f} of {args.budget:g} s, {within} {TOLERANCE:.0%}"
                beside = f"{count} busy processes" if count else "nothing"
                table.add_row(task, beside, f"{first:.1f} s", used, f"{command:.1f} s", solved)
    table.caption = f"{args.checkpoint or 'bundled weights'}, {args.threads} threads"
    console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=TASKS)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=2, help="processes that compute meanwhile")
    parser.add_argument("--checkpoint", help="the bundled weights unless given")
    return parser.parse_args()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Meanwhile `count` processes compute."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def solve(task: str, args: argparse.Namespace) -> tuple[float, float, float, str]:
    """Seconds to the first answer, of the budget, of the whole command; what was solved."""
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(args.threads)}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "arctrm", "solve", task, "--check", "--out", out]
        command += ["--budget", f"{args.budget:g}s"]
        command += ["--checkpoint", args.checkpoint] if args.checkpoint else []
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | own | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, env=environment, **streams) as process:
            assert process.stdout is not None
            lines = [(time.perf_counter() - begin, line) for line in process.stdout]
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit("".join(line for _, line in lines))
    at, first = next((at, float(m[1])) for at, line in lines if (m := FIRST.search(line)))
    solved = next((m[1] for _, line in lines if (m := SOLVED.search(line))), "not known")
    return first, first + lines[-1][0] - at, seconds, solved


if __name__ == "__main__":
    main()
