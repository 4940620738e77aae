"""The reader's answers: test inputs under many views, decoded, turned back, and scored.

A reader proposes by decoding, and judges by the log-probability that it gives to a candidate under
several views, summed (a product of experts): a right grid is likely from every side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from arctrm.config.decoding import DecodingConfig
from arctrm.data.task import Grid, Pair, Task
from arctrm.data.views import DIHEDRALS, View
from arctrm.reader.decoding import decode
from arctrm.reader.interface import Prompt
from arctrm.reader.scoring import score
from arctrm.reader.search import threshold_search
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import grid_length, pair_length, prompt
from arctrm.solving.candidates import Key, task_views
from arctrm.solving.canvas_rules import query_canvas
from arctrm.solving.vote import Candidate
from arctrm.solving.weights import Solver

CPU_BATCH, GPU_BATCH = 16, 512
"""Prompts decoded side by side."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One test input under one view, as the reader is asked for it."""

    key: Key
    view: View
    prompt: Prompt
    query: Grid
    """The input, in the task's own colours and orientation."""
    max_output_tokens: int
    """Room for every plausible output."""


def task_readings(solver: Solver, task: Task, num_views: int, seed: int) -> list[Reading]:
    """Readings of every test input, view by view (the identity first)."""
    assert solver.reader is not None
    rng = np.random.default_rng([seed, *task.id.encode(), 1])
    return [
        _reading(solver.reader, task, index, view, row, rng)
        for view, row in task_views(solver, task, num_views, seed)
        for index in range(len(task.test))
    ]


def _reading(
    reader: TinyReader, task: Task, index: int, view: View, row: int, rng: np.random.Generator
) -> Reading:
    query = task.test[index].input
    height, width = query_canvas(task, query)  # with the border, which bounds the row ends too
    if DIHEDRALS[view.dihedral][0]:
        height, width = width, height
    room = grid_length(height, width) + 1
    pairs = _context(reader, task, view, room, query, rng)
    condition = (row, view.dihedral, int(view.identity_colours))
    return Reading((task.id, index), view, prompt(pairs, view.apply(query), condition), query, room)


def _context(
    reader: TinyReader, task: Task, view: View, room: int, query: Grid, rng: np.random.Generator
) -> list[Pair]:
    """The demonstrations that stand before the query, in random order: as many as fit."""
    config = reader.config
    left = config.longest_sequence - room - pair_length(Pair(query))
    chosen: list[Pair] = []
    if config.sequence == "pair":
        return chosen
    for index in rng.permutation(len(task.demonstrations)):
        pair = task.demonstrations[index]
        assert pair.output is not None
        seen = Pair(view.apply(pair.input), view.apply(pair.output))
        if len(chosen) < config.max_pairs - 1 and pair_length(seen) <= left:
            chosen.append(seen)
            left -= pair_length(seen)
    return chosen


def read(
    solver: Solver,
    readings: Sequence[Reading],
    decoding: DecodingConfig,
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[Key, Candidate]]:
    """What the reader proposes for each reading: greedily, or all grids above a probability.

    A grid without an end, and one that repeats the input, is None: malformed. q is the
    log-probability (nats).

    Raises:
        ResourceError: out of memory; says which key to lower.
    """
    assert solver.reader is not None
    prompts = [reading.prompt for reading in readings]
    bounds = [reading.max_output_tokens for reading in readings]
    size = batch_size(solver, decoding)
    if decoding.min_probability:
        found = threshold_search(
            solver.reader,
            prompts,
            decoding.min_probability,
            batch_size=size,
            max_output_tokens=bounds,
            advance=advance,
        )
    else:
        greedy = decode(
            solver.reader, prompts, batch_size=size, max_output_tokens=bounds, advance=advance
        )
        found = [[one] for one in greedy]
    return [
        (reading.key, Candidate(_turned_back(reading, one.grid), one.log_probability, "reader"))
        for reading, several in zip(readings, found, strict=True)
        for one in several
    ]


def _turned_back(reading: Reading, grid: Grid | None) -> Grid | None:
    if grid is None:
        return None
    original = reading.view.inverse(grid)
    return None if np.array_equal(original, reading.query) else original


def judge(
    solver: Solver,
    readings: Sequence[Reading],
    grids: dict[Key, list[Grid]],
    decoding: DecodingConfig,
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[Key, list[float]]]:
    """Log-probability of the candidate `grids` of each reading's test input, under its view."""
    assert solver.reader is not None
    shown = [[r.view.apply(grid) for grid in grids.get(r.key, [])] for r in readings]
    scores = score(
        solver.reader,
        [reading.prompt for reading in readings],
        shown,
        batch_size=batch_size(solver, decoding),
        advance=advance,
    )
    return [(reading.key, own) for reading, own in zip(readings, scores, strict=True)]


def batch_size(solver: Solver, decoding: DecodingConfig) -> int:
    """Prompts in one batch."""
    default = GPU_BATCH if solver.device.type == "cuda" else CPU_BATCH
    return decoding.batch_size or default
