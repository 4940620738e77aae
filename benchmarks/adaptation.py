"""Adaptation of many tasks: side by side in one job, against one task after another.

    python benchmarks/adaptation.py                                     # a minute on a CPU
    python benchmarks/adaptation.py --tasks 400 --hidden 512 --heads 8 --layers 2 --tokens 1024

Either way every task gets `--steps` optimiser steps' worth of training: one after another, each has
`--steps` batches of `--tokens` tokens (or of the largest demonstration) to itself, as `solve` does
it; side by side, the job takes batches of all tasks' tokens together (at most `--largest-batch`,
then more steps). The model is untrained and the same. Prints one table. Only the first `--timed`
tasks are adapted one after another; the time of the rest is extrapolated. Setting up (copy,
streams, CUDA graphs) counts; compiling does not.
"""

import argparse
import time

import torch
from accelerate import Accelerator
from rich.table import Table

from arctrm.config import EvalConfig, ReaderConfig, TRMConfig
from arctrm.console import console
from arctrm.data.canvas import pair_canvas
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task
from arctrm.reader.tiny import TinyReader
from arctrm.solving.adaptation import Adapter
from arctrm.solving.side_by_side import Adapted, adapt
from arctrm.solving.weights import Solver
from arctrm.training.provenance import git_revision, hardware
from arctrm.training.stages import compute_dtype
from arctrm.trm.model import count_parameters
from common import peak_memory, untrained_trm, wait


def main() -> None:
    args = arguments()
    accelerator = Accelerator(cpu=args.device == "cpu")
    solver = untrained(args, accelerator.device)
    tasks = chosen(args)
    batch = min(args.tokens * len(tasks), args.largest_batch)
    steps = -(-args.steps * args.tokens * len(tasks) // batch)
    adapt(solver, tasks, config(batch, 2), accelerator)  # compiles
    together = adapt(solver, tasks, config(batch, steps), accelerator)
    one, timed = config(args.tokens, args.steps), tasks[: args.timed]
    one_by_one(solver, timed[:1], config(args.tokens, 2), 2)
    alone = one_by_one(solver, timed, one, args.steps)
    show(args, solver, tasks, together, batch, alone)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--model", choices=("trm", "reader"), default="trm")
    parser.add_argument("--test-set", default="evaluation")
    parser.add_argument(
        "--tasks", type=int, default=16, help="the smallest by their demonstrations"
    )
    parser.add_argument("--timed", type=int, default=4, help="tasks timed one after another")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps for each task")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a batch of one task")
    parser.add_argument("--largest-batch", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> list[Task]:
    """The tasks with the smallest demonstrations, without answers."""

    def cells(task: Task) -> int:
        return max(height * width for height, width in map(pair_canvas, task.demonstrations))

    return [t.without_answers() for t in sorted(load_tasks(args.test_set), key=cells)[: args.tasks]]


def untrained(args: argparse.Namespace, device: torch.device) -> Solver:
    sizes = {"hidden_size": args.hidden, "num_heads": args.heads, "num_layers": args.layers}
    if args.model == "trm":
        return Solver(untrained_trm(TRMConfig(**sizes), device), {}, True, {}, "untrained")
    torch.manual_seed(0)
    reader = TinyReader(ReaderConfig(**sizes), 1).to(device).requires_grad_(False)
    reader.dtype = compute_dtype("auto", device)
    return Solver(reader, {}, True, {}, "untrained")


def config(tokens: int, steps: int) -> EvalConfig:
    learning = {"tokens_per_batch": tokens}
    return EvalConfig.model_validate({"evaluation": {"adapt_steps": steps}, "adaptation": learning})


def one_by_one(solver: Solver, tasks: list[Task], settings: EvalConfig, steps: int) -> float:
    """Seconds for each task, as `solve` adapts."""
    begin = time.perf_counter()
    for task in tasks:
        Adapter(solver, [task], settings.adaptation, 0).train([task], float("inf"), steps)
    wait(solver.device)
    return (time.perf_counter() - begin) / len(tasks)


def show(
    args: argparse.Namespace,
    solver: Solver,
    tasks: list[Task],
    together: Adapted,
    batch: int,
    alone: float,
) -> None:
    trunk, num_tasks = count_parameters(solver.model)["trunk"], len(tasks)
    demonstrations = sum(len(task.demonstrations) for task in tasks)
    table = Table(title=f"adaptation, {git_revision()[:12]}, {hardware()}", show_header=False)
    for name, value in {
        "model": f"{args.model}, d{args.hidden} x {args.layers} layers, {trunk / 1e6:.2f}M "
        f"parameters, {solver.device.type}",
        "tasks": f"{num_tasks} of {args.test_set}, {demonstrations:,} demonstrations",
        "for each task": f"{args.steps} steps of {args.tokens:,} tokens",
        "one after another": f"{alone:.2f} s a task, {1 / alone:.3g} tasks/s "
        f"({min(args.timed, num_tasks)} tasks timed; {num_tasks} would take "
        f"{alone * num_tasks:.1f} s, extrapolated linearly)",
        "side by side": f"{together.seconds:.1f} s in all, "
        f"{num_tasks / together.seconds:.3g} tasks/s ({together.steps:,} steps of "
        f"{batch:,} tokens)",
        "side by side against one after another": f"{alone * num_tasks / together.seconds:.2f}x",
        "peak memory": peak_memory(),
    }.items():
        table.add_row(name, value)
    console().print(table)


if __name__ == "__main__":
    main()
