"""Tasks that the weights were never trained on, with several budgets each: what `solve` solves.

    python benchmarks/unseen.py --checkpoint runs/arc1 --out runs/unseen.jsonl \
        --take training=20 --take evaluation2=10 --budget 10 --budget 60

Of each source as many tasks as `--take` says: of those that the weights do not know the first by
the hash of their ids, so that neither size nor luck chooses. Answers are withheld until a task is
answered. A line of JSON is added for every task and budget; those that are there already are not
answered again, and a file holds the answers of one checkpoint. `--part 2/3` answers every third
task from the second on, for several processes; the table counts all lines of the file, and of their
adaptation steps it shows the median. A second table counts solved training tasks by the certainty
that `solve` gives its answers.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from rich.table import Table

from arctrm.config import SolveConfig
from arctrm.config.load import load_config
from arctrm.console import console
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task, in_hash_order
from arctrm.errors import ConfigError
from arctrm.solve import scoring
from arctrm.solve.adapt import require_adaptable
from arctrm.solve.solution import COUNTS, MAJORITY, reason_of
from arctrm.solve.solve import solve_task
from arctrm.solve.weights import Solver, load_solver
from arctrm.system import processor
from common import guarded


def main() -> None:
    args = arguments()
    require_once("--take", [source for source, _ in args.take])
    require_once("--budget", [f"{budget:g}" for budget in args.budget])
    flags = {"--checkpoint": ("checkpoint", args.checkpoint)}
    configs = [
        load_config(SolveConfig, args.config, [*args.set, f"budget={budget}"], flags)
        for budget in args.budget
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    solver = load_solver(configs[0].checkpoint, configs[0].inference, device)
    require_adaptable(solver, "unseen.py", "give weights that can")
    asked = [
        (source, task) for source, count in args.take for task in chosen(solver, source, count)
    ]
    number, of = args.part
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = read(args.out)
    if others := {line["weights"] for line in lines} - {solver.name}:
        raise ConfigError(
            f"{args.out}: holds answers of {', '.join(sorted(others))}, not of {solver.name}; give "
            "--out another file"
        )
    done = {(line["source"], line["task"], line["budget"]) for line in lines}
    for config in configs:
        for source, task in asked[number - 1 :: of]:
            if (source, task.id, config.budget) in done:
                continue
            line = {"weights": solver.name, "source": source, **answer(solver, task, config)}
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            console().print(json.dumps(line), markup=False, soft_wrap=True)
    print_table(lines := read(args.out))
    print_counts(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--take", type=take, action="append", required=True, metavar="SOURCE=COUNT")
    parser.add_argument("--budget", type=float, action="append", required=True, metavar="SECONDS")
    parser.add_argument("--checkpoint", type=Path, help="the bundled weights unless given")
    parser.add_argument("--config", type=Path, action="append", default=[], help="of solve")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of solve")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="NUMBER/OF")
    return parser.parse_args()


def take(text: str) -> tuple[str, int]:
    source, _, count = text.rpartition("=")
    if not source or not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no source with a number of tasks from 1 on, such as training=20"
        )
    return source, int(count)


def part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no part of a whole, such as 2/3; the parts of 3 are 1/3, 2/3 and 3/3"
        )
    return int(number), int(of)


def require_once(flag: str, values: list[str]) -> None:
    """Refuse what is given twice: its tasks would be answered twice.

    Raises:
        ConfigError: names the first such value.
    """
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{flag}: {value} is given more than once; give it once")


def chosen(solver: Solver, source: str, count: int) -> list[Task]:
    """The first unknown tasks by the hash of their ids."""
    unknown = {task.id: task for task in load_tasks(source) if solver.row_of(task) is None}
    if len(unknown) < count:
        raise ConfigError(
            f"--take {source}={count}: {len(unknown)} of its tasks are new to {solver.name}; take "
            "no more than that, or from another source"
        )
    return [unknown[task_id] for task_id in in_hash_order(unknown)[:count]]


def answer(solver: Solver, task: Task, config: SolveConfig) -> dict[str, object]:
    """Test inputs right at the first and at the better attempt, steps, time."""
    began = time.monotonic()
    solution = solve_task(solver, task.without_answers(), config)
    seconds = time.monotonic() - began
    known = [pair.output for pair in task.test]
    right = scoring.verdicts(solution.attempts, known)
    return {
        "task": task.id,
        "budget": config.budget,
        "seconds": round(seconds, 1),
        "steps": solution.adaptation_steps,
        "inputs": len(right),
        "first": sum(bool(pair[0]) for pair in right),
        "right": sum(any(pair) for pair in right),
        "probe": solution.leave_one_out,
        "agreement": [round(answer.agreement, 3) for answer in solution.answers],
    }


def read(path: Path) -> list[dict]:
    """The lines so far.

    Raises:
        ConfigError: the file is something else, or its last line is half written.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read as lines of JSON ({error}); mend it, or give --out another "
            "file"
        ) from error


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def print_table(lines: list[dict]) -> None:
    table = Table(title=f"unseen tasks, {hardware()}", title_justify="left")
    table.add_column("source", overflow="fold")
    for column in ("budget", "tasks", "solved", "inputs", "right", "at first", "steps"):
        table.add_column(column, justify="right", no_wrap=True)
    groups = defaultdict(list)
    for line in lines:
        groups[line["source"], line["budget"]].append(line)
    for (source, budget), own in sorted(groups.items()):
        sums = {key: sum(line[key] for line in own) for key in ("inputs", "right", "first")}
        table.add_row(
            source,
            f"{budget:g} s",
            str(len(own)),
            str(sum(line["right"] == line["inputs"] for line in own)),
            *(str(sums[key]) for key in ("inputs", "right", "first")),
            f"{statistics.median(line['steps'] for line in own):g}",
        )
    console().print(table)


def print_counts(lines: list[dict]) -> None:
    """Solved tasks by what `solve` says of its answer, for `arctrm.solve.solution.COUNTS`. Only
    training tasks count: nothing is chosen by the answers of evaluation tasks.
    """
    groups = defaultdict(list)
    for line in lines:
        if line["source"].startswith("training"):
            agreement = line.get("agreement")  # older lines have none
            many = "-" if agreement is None else "yes" if min(agreement) >= MAJORITY else "no"
            for group in ("all", many):
                solved = line["right"] == line["inputs"]
                groups[reason_of(line["probe"]), group].append(solved)
    table = Table(title="certainty of answers to unseen training tasks", title_justify="left")
    for column in ("reason", "most proposals agree", "solved", "tasks", "in COUNTS"):
        table.add_column(column)
    for reason, counts in COUNTS.items():
        for group in ("all", "yes", "no", "-"):
            if own := groups.get((reason, group)):
                stored = "{} of {}".format(*counts) if group == "all" else ""
                table.add_row(reason, group, str(sum(own)), str(len(own)), stored)
    console().print(table)


if __name__ == "__main__":
    guarded(main)
