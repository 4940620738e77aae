"""Decoding on a CPU: through transformers' cache, row by row, and following drafts.

    python benchmarks/drafted_decoding.py      # 8 evaluation tasks, 8 views, two threads
    python benchmarks/drafted_decoding.py --tasks 4 --views 32 --dtype bfloat16

The bundled reader answers the same questions in all three ways, `--repeats` times in turn; a time
is the least of them. Prints one table, with how many grids are those of the first way.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.table import Table

from arctrm.config import EvalConfig
from arctrm.console import console
from arctrm.reader import decoding
from arctrm.reader.decoding import Decoded, decode, usual_batch_size
from arctrm.solving.evaluate import load
from arctrm.solving.reading import Reading, propose, task_readings
from arctrm.solving.weights import load_solver
from arctrm.training.provenance import git_revision, hardware


def main() -> None:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = EvalConfig.model_validate({"inference": {"dtype": options.dtype}})
    solver = load_solver(None, config.inference, torch.device("cpu"))
    reader = solver.tiny
    assert reader is not None
    dtype = str(reader.dtype).removeprefix("torch.")
    tasks, _ = load(config)
    chosen = np.random.default_rng(1).permutation(len(tasks))[: options.tasks]
    readings = [r for i in chosen for r in task_readings(solver, tasks[i], options.views, 0)]
    ways: dict[str, Callable[[], list[Decoded]]] = {
        "transformers' cache": lambda: through_cache(reader, readings),
        "row by row": lambda: plainly(reader, readings),
        "row by row, with drafts": lambda: [
            one for (one,) in propose(reader, readings, config.reader)
        ],
    }
    propose(reader, readings[:1], config.reader)  # warms up
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Decoded]] = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            begin = time.monotonic()
            found[name] = way()
            times[name].append(time.monotonic() - begin)
    first = next(iter(ways))
    table = Table(title=f"{len(readings)} grids, {options.views} views", title_justify="left")
    for column in ("way", "seconds", "times as fast", "the same grids"):
        table.add_column(column)
    for name, own in times.items():
        same = sum(a.tokens == b.tokens for a, b in zip(found[first], found[name], strict=True))
        ratio = min(times[first]) / min(own)
        table.add_row(name, f"{min(own):.2f}", f"{ratio:.2f}", f"{same} of {len(readings)}")
    tokens = np.mean([one.num_tokens for one in found[first]])
    prompts = np.mean([len(reading.prompt.tokens) for reading in readings])
    console().print(f"{git_revision()}; {hardware()}; {options.threads} threads, {dtype}")
    console().print(f"tokens of a prompt {prompts:.0f}, of a grid {tokens:.0f} (means)")
    console().print(table)


def through_cache(reader: decoding.GridReader, readings: list[Reading]) -> list[Decoded]:
    """As hub models are decoded."""
    mine = decoding.follows_drafts
    decoding.follows_drafts = lambda reader: False
    try:
        return plainly(reader, readings)
    finally:
        decoding.follows_drafts = mine


def plainly(reader: decoding.GridReader, readings: list[Reading]) -> list[Decoded]:
    """Without drafts."""
    return decode(
        reader,
        [reading.prompt for reading in readings],
        batch_size=usual_batch_size(reader),
        max_output_tokens=[reading.max_output_tokens for reading in readings],
    )


if __name__ == "__main__":
    main()
