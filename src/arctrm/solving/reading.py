"""The reader's answers: test inputs under many views, decoded, turned back, and scored.

A reader proposes by decoding, and judges by the log-probability that it gives to a candidate under
several views, summed (a product of experts): a right grid is likely from every side. The readers of
an ensemble are more such experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from arctrm.config.decoding import DecodingConfig
from arctrm.data.task import Grid, Pair, Task
from arctrm.data.views import DIHEDRALS, View
from arctrm.hybrid import READER
from arctrm.reader.decoding import Decoded, decode, follows_drafts, usual_batch_size
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.scoring import score
from arctrm.reader.search import threshold_search
from arctrm.reader.tokens import grid_length, pair_length, prompt
from arctrm.solving.candidates import Key, task_views
from arctrm.solving.canvas_rules import output_size, query_canvas
from arctrm.solving.vote import Candidate, Ranked, by_experts
from arctrm.solving.weights import Solver
from arctrm.training.joint_reader import JointReader


@dataclass(frozen=True, eq=False)
class Reading:
    """One test input under one view, as the reader is asked for it."""

    key: Key
    view: View
    prompt: Prompt
    """In the reader's own tokens."""
    query: Grid
    """The input, in the task's own colours and orientation."""
    max_output_tokens: int
    """Room for every plausible output."""
    layout: Prompt | None = None
    """The prompt in the tokens of the tiny reader, where TRM may be told of it."""
    number: int = 0
    """Of the view among those asked under."""
    keeps_size: bool = False
    """Whether the output should be as large as the input: then much of it may be the same."""


def task_readings(solver: Solver, task: Task, num_views: int, seed: int) -> list[Reading]:
    """Readings of every test input, view by view (the identity first)."""
    reader = solver.joint_reader
    assert reader is not None
    rng = np.random.default_rng([seed, *task.id.encode(), 1])
    keep_size = [output_size(task, pair.input)[:2] == pair.input.shape for pair in task.test]
    return [
        _reading(reader, task, index, view, row, number, rng, keep_size[index])
        for number, (view, row) in enumerate(task_views(solver, task, num_views, seed))
        for index in range(len(task.test))
    ]


def _reading(
    reader: JointReader,
    task: Task,
    index: int,
    view: View,
    row: int,
    number: int,
    rng: np.random.Generator,
    keeps_size: bool,
) -> Reading:
    query = task.test[index].input
    room = output_room(task, query, view)
    pairs = _context(reader, task, view, room, query, rng)
    condition = (row, view.dihedral, int(view.identity_colours))
    layout = prompt(pairs, view.apply(query), condition)
    return Reading(
        (task.id, index), view, reader.own(layout), query, room, layout, number, keeps_size
    )


def output_room(task: Task, query: Grid, view: View) -> int:
    """Output tokens that spell every plausible output of `query`, as the view shows it."""
    height, width = query_canvas(task, query)  # with the border, which bounds the row ends too
    if DIHEDRALS[view.dihedral][0]:
        height, width = width, height
    return grid_length(height, width) + 1


def _context(
    reader: JointReader, task: Task, view: View, room: int, query: Grid, rng: np.random.Generator
) -> list[Pair]:
    """The demonstrations that stand before the query, in random order: as many as fit."""
    config = reader.config
    left = min(config.longest_sequence - room, reader.longest_prompt) - pair_length(Pair(query))
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


def as_candidates(
    readings: Sequence[Reading], proposed: Sequence[Sequence[Decoded]], source: str = READER
) -> list[tuple[Key, Candidate]]:
    """What `propose` gave for each reading, turned back; q is the logit of its probability."""
    return [
        as_candidate(reading, one, source)
        for reading, several in zip(readings, proposed, strict=True)
        for one in several
    ]


def as_candidate(reading: Reading, one: Decoded, source: str = READER) -> tuple[Key, Candidate]:
    """What the reader proposes, turned back."""
    grid = turned_back(reading, one.grid)
    q = as_logit(one.log_probability)
    return reading.key, Candidate(grid, q, source, view=reading.number)


def as_logit(log_probability: float) -> float:
    """The logit of a probability given by its logarithm: comparable with TRM's halting logit."""
    log_p = min(log_probability, -1e-9)
    return log_p - math.log(-math.expm1(log_p))


def propose(
    reader: GridReader,
    readings: Sequence[Reading],
    decoding: DecodingConfig,
    advance: Callable[[int], None] = lambda done: None,
    expected: Mapping[Key, Grid] | None = None,
    with_drafts: bool = True,
    deadline: float = math.inf,
) -> list[list[Decoded]]:
    """The grids of each reading, as its view shows them: greedy, or all above a probability.

    What may come out (`expected` of a test input; else what its first view gives) makes greedy
    decoding faster, on a CPU, and changes nothing else; unless `with_drafts` is False. What is
    written greedily and has not ended at `deadline` (of `time.monotonic`) gives no grid.

    Raises:
        ResourceError: out of memory; says which key to lower.
    """
    prompts = [reading.prompt for reading in readings]
    bounds = [reading.max_output_tokens for reading in readings]
    size = batch_size(reader, decoding, searching=bool(decoding.min_probability))
    if decoding.min_probability:
        return threshold_search(
            reader,
            prompts,
            decoding.min_probability,
            batch_size=size,
            max_output_tokens=bounds,
            advance=advance,
        )
    drafted = with_drafts and follows_drafts(reader)
    found: dict[int, Decoded] = {}
    known = dict(expected or {})
    for part in _first_and_rest(readings, known) if drafted else [range(len(readings))]:
        decoded = decode(
            reader,
            [prompts[index] for index in part],
            batch_size=size,
            max_output_tokens=[bounds[index] for index in part],
            drafts=[_draft(readings[index], known) for index in part] if drafted else None,
            deadline=deadline,
            advance=advance,
        )
        found |= zip(part, decoded, strict=True)
        if drafted:
            remember(known, [readings[index] for index in part], decoded)
    return [[found[index]] for index in range(len(readings))]


def remember(
    known: dict[Key, Grid], readings: Sequence[Reading], decoded: Sequence[Decoded]
) -> None:
    """Note the first grid of each test input of which nothing is known, turned back."""
    for reading, one in zip(readings, decoded, strict=True):
        if one.grid is not None and reading.key not in known:
            known[reading.key] = reading.view.inverse(one.grid)


def _first_and_rest(readings: Sequence[Reading], known: Mapping[Key, Grid]) -> list[list[int]]:
    """The first view of every test input of which nothing is known, then all others."""
    seen = set(known)
    parts: tuple[list[int], list[int]] = ([], [])
    for index, reading in enumerate(readings):
        parts[reading.key in seen].append(index)
        seen.add(reading.key)
    return [part for part in parts if part]


def _draft(reading: Reading, known: Mapping[Key, Grid]) -> Grid | None:
    """What may come out, as the view shows it."""
    grid = known.get(reading.key, reading.query if reading.keeps_size else None)
    return None if grid is None else reading.view.apply(grid)


def turned_back(reading: Reading, grid: Grid | None) -> Grid | None:
    """The grid in the task's own colours and orientation.

    None (malformed) for a grid without an end, and for one that only repeats the input.
    """
    if grid is None:
        return None
    original = reading.view.inverse(grid)
    return None if np.array_equal(original, reading.query) else original


def to_judge(ranked: dict[Key, list[Ranked]], decoding: DecodingConfig) -> dict[Key, list[Grid]]:
    """The grids of each test input that are worth scoring: the best by vote."""
    return {key: [r.grid for r in own[: decoding.scored_candidates]] for key, own in ranked.items()}


def judge(
    reader: GridReader,
    readings: Sequence[Reading],
    grids: dict[Key, list[Grid]],
    decoding: DecodingConfig,
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[Key, list[float]]]:
    """Log-probability of the candidate `grids` of each reading's test input, under its view."""
    shown = [[r.view.apply(grid) for grid in grids.get(r.key, [])] for r in readings]
    scores = score(
        reader,
        [reading.prompt for reading in readings],
        shown,
        batch_size=batch_size(reader, decoding),
        advance=advance,
    )
    return [(reading.key, own) for reading, own in zip(readings, scores, strict=True)]


def reranked(
    ranked: dict[Key, list[Ranked]], judged: Sequence[tuple[Key, list[float]]]
) -> dict[Key, list[Ranked]]:
    """The rankings after readers have judged them, under one view or several."""
    scores = view_by_view(judged)
    return {key: by_experts(own, scores.get(key, [])) for key, own in ranked.items()}


def view_by_view(judged: Sequence[tuple[Key, list[float]]]) -> dict[Key, list[list[float]]]:
    """What was said of the grids of each test input, one list for each view."""
    scores: dict[Key, list[list[float]]] = {}
    for key, own in judged:
        scores.setdefault(key, []).append(own)
    return scores


def batch_size(reader: GridReader, decoding: DecodingConfig, searching: bool = False) -> int:
    """Prompts in one batch, at most; branches when all probable grids are searched for."""
    return decoding.batch_size or usual_batch_size(reader, searching)
