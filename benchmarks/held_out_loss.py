"""How well a tiny reader knows answers it never saw: the loss of held-out test outputs.

    python benchmarks/held_out_loss.py runs/reader --held-out 100 --views 8

Settings are chosen by this. The tasks that `data.held_out` kept the test pairs of (tasks of the
training set; no evaluation task is touched) are read under several views, and the reader scores
their true outputs. Two figures vary far less between runs than the number of solved tasks: nats per
grid, and the share of grids that the model gives more than half of its probability.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
from rich.table import Table

from arctrm.config import EvalConfig
from arctrm.console import console
from arctrm.errors import ConfigError
from arctrm.solving.candidates import Key
from arctrm.solving.evaluate import load
from arctrm.solving.reading import judge, task_readings
from arctrm.solving.weights import load_solver
from common import guarded, reader_of


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = EvalConfig.model_validate(
        {"evaluation": {"test_set": args.test_set, "held_out": args.held_out}}
    )
    tasks, known = load(config)
    table = Table(title=f"{len(tasks)} held-out tasks, {args.views} views")
    for column in ("checkpoint", "nats/grid", "half likely (%)", "best of views (%)"):
        table.add_column(column, justify="left" if column == "checkpoint" else "right")
    for checkpoint in args.checkpoints:
        solver = load_solver(checkpoint, config.inference, device)
        reader = reader_of(solver)
        if solver.held_out < args.held_out:
            raise ConfigError(
                f"{checkpoint}: was trained with data.held_out = {solver.held_out}, but --held-out "
                f"is {args.held_out}; give at most as many as were held out"
            )
        readings = [r for task in tasks for r in task_readings(solver, task, args.views, 0)]
        answers = {
            (task_id, i): [grid]
            for task_id, grids in known.items()
            for i, grid in enumerate(grids)
            if grid is not None
        }
        judged = judge(reader, readings, answers, config.reader)
        by_key: dict[Key, list[float]] = {}
        for key, own in judged:
            by_key.setdefault(key, []).extend(own)
        nats = [-value for own in by_key.values() for value in own]
        likely = statistics.mean(value < math.log(2) for value in nats)
        best = statistics.mean(-max(own) < math.log(2) for own in by_key.values())
        table.add_row(
            str(checkpoint), f"{statistics.mean(nats):.2f}", f"{likely:.1%}", f"{best:.1%}"
        )
    console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--test-set", default="training")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--views", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    guarded(main)
