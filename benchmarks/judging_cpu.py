"""Judging candidates on a CPU: through transformers' cache, and reading once what they share.

    python benchmarks/judging_cpu.py           # 6 evaluation tasks, two threads
    python benchmarks/judging_cpu.py --tasks 12 --propose 32 --candidates 8

The bundled reader proposes under some views; the best grids by vote are judged under others in both
ways, in turn; a time is the least of `--repeats`. Prints one table, with the largest difference of
a score.
"""

import argparse
import time

import numpy as np
import torch
from rich.table import Table

from arctrm.config import EvalConfig
from arctrm.console import console
from arctrm.data.task import Grid
from arctrm.reader import scoring
from arctrm.solving.candidates import Key, by_key
from arctrm.solving.evaluate import load
from arctrm.solving.reading import Reading, as_candidates, judge, propose, task_readings, to_judge
from arctrm.solving.vote import vote
from arctrm.solving.weights import load_solver
from arctrm.training.provenance import git_revision, hardware

WAYS = {"transformers' cache": False, "what is shared read once": True}
Scores = list[tuple[Key, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--propose", type=int, default=16)
    parser.add_argument("--judge", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = EvalConfig.model_validate(
        {
            "inference": {"dtype": options.dtype},
            "reader": {"scored_candidates": options.candidates},
        }
    )
    solver = load_solver(None, config.inference, torch.device("cpu"))
    reader = solver.tiny
    assert reader is not None
    tasks, _ = load(config)
    order = np.random.default_rng(1).permutation(len(tasks))[: options.tasks]
    chosen = [tasks[i] for i in order]
    asked = [r for task in chosen for r in task_readings(solver, task, options.propose, 0)]
    found = by_key(as_candidates(asked, propose(reader, asked, config.reader)))
    grids = to_judge({key: vote(own, 0) for key, own in found.items()}, config.reader)
    readings = [r for task in chosen for r in task_readings(solver, task, options.judge, 0)]
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    scores: dict[str, Scores] = {}
    for _ in range(options.repeats):
        for name, shared in WAYS.items():
            begin = time.monotonic()
            scores[name] = judged(reader, readings, grids, config, shared)
            times[name].append(time.monotonic() - begin)
    first = next(iter(WAYS))
    sizes = [grid.size for r in readings for grid in grids.get(r.key, [])]
    title = f"{len(sizes)} grids of {np.mean(sizes):.0f} cells judged, {len(readings)} prompts"
    table = Table(title=title, title_justify="left")
    for column in ("way", "seconds", "times as fast", "largest difference (nats)"):
        table.add_column(column)
    for name, own in times.items():
        gap = difference(scores[first], scores[name])
        ratio = min(times[first]) / min(own)
        table.add_row(name, f"{min(own):.2f}", f"{ratio:.2f}", f"{gap:.1g}")
    dtype = str(reader.dtype).removeprefix("torch.")
    console().print(f"{git_revision()}; {hardware()}; {options.threads} threads, {dtype}")
    console().print(table)


def judged(
    reader: scoring.GridReader,
    readings: list[Reading],
    grids: dict[Key, list[Grid]],
    config: EvalConfig,
    shared: bool,
) -> Scores:
    """The scores, one way or the other."""
    mine = scoring.reads_shared_once
    if not shared:
        scoring.reads_shared_once = lambda reader: False
    try:
        return judge(reader, readings, grids, config.reader)
    finally:
        scoring.reads_shared_once = mine


def difference(one: Scores, other: Scores) -> float:
    """The largest between two scores of a grid."""
    pairs = zip(one, other, strict=True)
    return max(
        (abs(a - b) for (_, x), (_, y) in pairs for a, b in zip(x, y, strict=True)), default=0
    )


if __name__ == "__main__":
    main()
