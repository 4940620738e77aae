"""How well candidates explain the input: the reader asked the other way round.

A reader that was trained on inverse tasks, too (`reader.inverse_share`), says how likely the test
input is, given a candidate as the output. What is likely both ways is more often right than what is
likely from the input alone (noisy-channel reranking: Yee et al. 2019, "Simple and effective noisy
channel modeling for neural machine translation"). It is asked under dihedral views that keep the
colours, about the few candidates that it likes best, of tasks that it was trained on: the vectors
of the inverse tasks are learned in training only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from arctrm.config.decoding import JudgingConfig
from arctrm.data.task import Grid, Task
from arctrm.data.views import NUM_DIHEDRALS, View
from arctrm.reader.interface import GridReader
from arctrm.reader.scoring import score
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import INVERSE, prompt
from arctrm.solving.candidates import Key
from arctrm.solving.reading import batch_size, view_by_view
from arctrm.solving.vote import Ranked, by_explanation
from arctrm.solving.weights import Solver


@dataclass(frozen=True, eq=False)
class InverseReading:
    """One test input under one view, as the reader is asked for it."""

    key: Key
    view: View
    row: int
    """Task embedding row."""
    query: Grid
    """The input, in the task's own colours and orientation."""


def is_asked(solver: Solver, decoding: JudgingConfig) -> bool:
    """Whether readers are asked the other way round, and can be."""
    asked = decoding.rank == "experts" and decoding.inverse_weight > 0
    return asked and not solver.adapted and any(map(knows_inverse, solver.readers))


def knows_inverse(reader: GridReader) -> TypeGuard[TinyReader]:
    """Whether a reader was trained on inverse tasks, too."""
    return isinstance(reader, TinyReader) and reader.config.inverse_share > 0


def inverse_readings(
    solver: Solver, tasks: Sequence[Task], decoding: JudgingConfig
) -> list[InverseReading]:
    """Readings of every test input of the tasks that the solver knows, view by view."""
    rows = [(task, solver.row_of(task)) for task in tasks]
    return [
        InverseReading((task.id, index), View(dihedral), row, pair.input)
        for dihedral in range(min(decoding.scoring_views, NUM_DIHEDRALS))
        for task, row in rows
        if row is not None
        for index, pair in enumerate(task.test)
    ]


def to_explain(ranked: dict[Key, list[Ranked]], decoding: JudgingConfig) -> dict[Key, list[Grid]]:
    """The grids of each test input that are asked about: the best that were judged."""
    most = decoding.inverse_candidates
    return {
        key: [one.grid for one in own[:most] if one.reader_scores] for key, own in ranked.items()
    }


def judge_inputs(
    reader: GridReader,
    readings: Sequence[InverseReading],
    grids: dict[Key, list[Grid]],
    decoding: JudgingConfig,
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[Key, list[float]]]:
    """Log-probability of each reading's input, given each of the `grids` of its test input."""
    if not knows_inverse(reader):
        return []
    asked = [(one, grid) for one in readings for grid in grids.get(one.key, [])]
    prompts = [
        prompt([], one.view.apply(grid), (one.row, one.view.dihedral, INVERSE + 1))
        for one, grid in asked
    ]
    inputs = [[one.view.apply(one.query)] for one, _ in asked]
    scores = score(reader, prompts, inputs, batch_size=batch_size(reader, decoding))
    found, own = [], iter(scores)
    for one in readings:
        found.append((one.key, [next(own)[0] for _ in grids.get(one.key, [])]))
        advance(1)
    return found


def explained(
    ranked: dict[Key, list[Ranked]],
    judged: Sequence[tuple[Key, list[float]]],
    decoding: JudgingConfig,
) -> dict[Key, list[Ranked]]:
    """The rankings after readers have said how likely the inputs are, under one view or several."""
    scores, weight = view_by_view(judged), decoding.inverse_weight
    return {key: by_explanation(own, scores.get(key, []), weight) for key, own in ranked.items()}
