"""One pool of candidates: the readers', TRM's, and those of both together.

A question is one test input under one view. The reader proposes first, and every other reader of
its ensemble; where adapters join the two models, TRM refines what the first reader proposed, else
it answers alone. Each ablation leaves out one thing of the whole: the readers (TRM answers alone),
TRM (the readers answer alone), the coupling (both answer alone, in one pool), the ensemble (of the
readers the first alone), the draft that TRM is shown; or it swaps what the reader says of two
tasks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from arctrm.config import InferenceConfig, JudgingConfig
from arctrm.data.task import Grid, Task
from arctrm.hybrid import reader_name
from arctrm.reader.decoding import Decoded, follows_drafts
from arctrm.reader.interface import Prompt
from arctrm.solving.candidates import Key, Query, answer, task_queries
from arctrm.solving.guidance import Guide
from arctrm.solving.reading import Reading, as_candidates, propose, remember, task_readings
from arctrm.solving.vote import Candidate
from arctrm.solving.weights import Solver


class PoolConfig(Protocol):
    """What a configuration must hold to ask."""

    @property
    def seed(self) -> int:
        """Of the views."""

    @property
    def inference(self) -> InferenceConfig:
        """How TRM answers."""

    @property
    def reader(self) -> JudgingConfig:
        """How the reader answers."""


Proposals = Sequence[Sequence[list[Decoded]]]
"""Of each reader, what it proposed for each question."""


@dataclass(frozen=True, eq=False)
class Question:
    """One test input under one view, as each model is asked for it."""

    query: Query | None
    reading: Reading | None


def questions(solver: Solver, tasks: Sequence[Task], views: int, seed: int) -> list[Question]:
    """Questions of every test input of every task, view by view."""
    found: list[Question] = []
    for task in tasks:
        queries = task_queries(solver, task, views, seed) if solver.has_trm else None
        readings = task_readings(solver, task, views, seed) if solver.reader is not None else None
        count = len(queries or readings or [])
        found += [
            Question(queries[i] if queries else None, readings[i] if readings else None)
            for i in range(count)
        ]
    return found


def proposals(
    solver: Solver,
    asked: Sequence[Question],
    config: PoolConfig,
    told: Callable[[int], None] = lambda done: None,
    expected: Mapping[Key, Grid] | None = None,
    with_drafts: bool = True,
    deadline: float = math.inf,
) -> list[list[list[Decoded]]]:
    """What each reader writes for each question, the likeliest first; see `propose`."""
    found: list[list[list[Decoded]]] = []
    readings, likely = _readings(asked), dict(expected or {})
    for reader in solver.readers:
        own = propose(reader, readings, config.reader, told, likely, with_drafts, deadline)
        if follows_drafts(reader):  # of use to the next reader
            remember(likely, readings, [several[0] for several in own])
        found.append(own)
    return found


def _readings(asked: Sequence[Question]) -> list[Reading]:
    return [question.reading for question in asked if question.reading is not None]


def pooled(
    solver: Solver,
    asked: Sequence[Question],
    drafts: Proposals | None,
    config: PoolConfig,
    told: Callable[[int], None] = lambda done: None,
    ablation: str | None = None,
) -> list[tuple[Key, Candidate]]:
    """Candidates of all questions; `drafts` is what the readers proposed, if there are any. (What
    readers proposed that the solver leaves out is left out.)

    Raises:
        ResourceError: out of memory; says which key to lower.
    """
    found: list[tuple[Key, Candidate]] = []
    if drafts is not None and ablation != "no-reader":
        found += readers_candidates(solver, asked, drafts)
    if solver.has_trm and ablation != "no-trm":
        found += trm_candidates(solver, asked, drafts, config, told, ablation)
    return found


def readers_candidates(
    solver: Solver, asked: Sequence[Question], drafts: Proposals
) -> list[tuple[Key, Candidate]]:
    """What the solver's readers proposed, turned back."""
    return [
        found
        for number in range(len(solver.readers))
        for found in as_candidates(_readings(asked), drafts[number], reader_name(number))
    ]


def trm_candidates(
    solver: Solver,
    asked: Sequence[Question],
    drafts: Proposals | None,
    config: PoolConfig,
    told: Callable[[int], None] = lambda done: None,
    ablation: str | None = None,
) -> list[tuple[Key, Candidate]]:
    """TRM's candidates, told by the first reader where adapters join the two; as `pooled`."""
    queries = [question.query for question in asked if question.query is not None]
    alone = ablation in ("no-reader", "no-coupling")
    first = drafts[0] if drafts else None
    guides = None if alone else _guides(solver, asked, first, ablation)
    return answer(solver, queries, config.inference, told, guides)


def _guides(
    solver: Solver,
    asked: Sequence[Question],
    drafts: Sequence[Sequence[Decoded]] | None,
    ablation: str | None,
) -> list[Guide] | None:
    """What the reader tells TRM for each question; None where nothing joins the two."""
    if drafts is None or solver.hybrid is None or not solver.hybrid.adapters:
        return None
    guides = [
        Guide(_layout(reading), None if ablation == "no-draft" else _first_grid(own))
        for reading, own in zip(_readings(asked), drafts, strict=True)
    ]
    if ablation == "swap-context":
        half = len(guides) // 2
        return guides[half:] + guides[:half]
    return guides


def _layout(reading: Reading) -> Prompt:
    assert reading.layout is not None
    return reading.layout


def _first_grid(own: Sequence[Decoded]) -> Grid | None:
    return next((one.grid for one in own if one.grid is not None), None)
