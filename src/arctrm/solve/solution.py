"""What solving a task gives: two grids for every test input, their evidence, and a time line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from arctrm.data.task import Grid, Task
from arctrm.invariants.task import COPY
from arctrm.planner import PlannerResult
from arctrm.solve.rank import Ranked, attempts

Stage = Literal["first answer", "adapting", "reading", "refining", "planning", "judging"]


@dataclass(frozen=True)
class Event:
    """A stretch of the budget; stretches follow each other and do not overlap."""

    stage: Stage
    start: float  # seconds since the beginning
    seconds: float


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a solve stands."""

    stage: Stage
    detail: str  # how far the stage is ("view 3 of 32"), or empty
    seconds: float  # since the beginning
    budget: float  # seconds
    best: Sequence[Grid | None]
    """The best grid so far of every test input, None where there is none; empty at first."""


OnProgress = Callable[[Progress], None]

HELD_OUT_RIGHT = "a held-out demonstration was answered right"
HELD_OUT_WRONG = "a held-out demonstration was answered wrong"
NONE_HELD_OUT = "no demonstration was held out"
COUNTS = {HELD_OUT_RIGHT: (42, 45), HELD_OUT_WRONG: (10, 23), NONE_HELD_OUT: (8, 20)}
"""Reason -> (solved, all) of 60 unseen tasks of ARC-AGI-1 training (the first: of three runs), as
`benchmarks/unseen.py` counts them; no evaluation task is among them."""
LIKELY = 0.7  # share of solved tasks from which an answer is called likely right
MAJORITY = 0.5  # share of the proposals for the same of a known task, of which none were counted


def reason_of(leave_one_out: float | None) -> str:
    """The key in `COUNTS` of a leave-one-out score."""
    if leave_one_out is None:
        return NONE_HELD_OUT
    return HELD_OUT_RIGHT if leave_one_out == 1 else HELD_OUT_WRONG


@dataclass(frozen=True)
class Certainty:
    """How likely it is that one of two attempts is right."""

    level: Literal["likely right", "a guess", "no answer found"]
    reason: str
    counts: tuple[int, int] | None = None  # (solved, all) of such tasks, where they were counted

    def __str__(self) -> str:
        counted = self.counts and f" ({self.counts[0]} of {self.counts[1]} such tasks were solved)"
        return f"{self.level}: {self.reason}{counted or ''}"


@dataclass(frozen=True, eq=False)
class Answer:
    """The ranked grids of one test input, and what went into them."""

    test_input: Grid  # submitted where no grid was proposed
    ranked: Sequence[Ranked] = ()  # best first
    num_candidates: int = 0  # proposals, malformed ones included
    history: PlannerResult | None = None  # the planner's attempts, where it made some
    refined: Mapping[str, Sequence[Grid | None]] = field(default_factory=dict)
    """TRM's steps under the first view, by source: the draft (None: hidden cells), then the grid
    after each supervision step."""

    @property
    def attempts(self) -> tuple[Grid, Grid]:
        """attempt_1 and attempt_2."""
        return attempts(self.ranked, self.test_input)

    @property
    def agreement(self) -> float:
        """Share of the proposals, malformed ones included, that are the first grid."""
        first = self.ranked[0].num_proposals if self.ranked else 0
        return first / max(1, self.num_candidates)

    @property
    def evidence(self) -> tuple[Ranked | None, Ranked | None]:
        """What speaks for attempt_1 and attempt_2; None where nothing was proposed."""
        first, second, *_ = [*self.ranked[:2], *self.ranked[:1], None, None]
        return first, second


@dataclass(frozen=True, eq=False)
class Solution:
    """The answers to a task, and how they were found."""

    task: Task  # without its answers
    answers: tuple[Answer, ...]  # one for each test input
    leave_one_out: float | None = None
    """Share (0..1) of answers that got a held-out demonstration exactly, if measured."""
    adaptation_steps: int = 0  # optimiser steps before the last answers
    seconds: float = 0.0  # wall-clock time from start to the last answers
    known: bool = False  # the model was trained on the task's demonstrations
    events: tuple[Event, ...] = ()

    @property
    def attempts(self) -> list[tuple[Grid, Grid]]:
        """attempt_1 and attempt_2 at every test input."""
        return [answer.attempts for answer in self.answers]

    @property
    def evidence(self) -> list[tuple[Ranked | None, Ranked | None]]:
        """What speaks for each attempt at every test input; None where nothing was proposed."""
        return [answer.evidence for answer in self.answers]

    @property
    def candidates(self) -> list[Sequence[Ranked]]:
        """All distinct grids that were proposed for every test input, best first."""
        return [answer.ranked for answer in self.answers]

    @property
    def certainties(self) -> list[Certainty]:
        """How likely each test input is solved, by a rule of two levels, counted in `COUNTS`."""
        return [self._certainty(answer) for answer in self.answers]

    def _certainty(self, answer: Answer) -> Certainty:
        if not answer.ranked or COPY in answer.ranked[0].broken:
            return Certainty("no answer found", "the input is submitted")
        if self.known:
            many = answer.agreement >= MAJORITY
            reason = f"{'most' if many else 'few'} proposals agree, and the model knows the task"
            return Certainty("likely right" if many else "a guess", reason)
        solved, whole = counts = COUNTS[reason := reason_of(self.leave_one_out)]
        return Certainty("likely right" if solved / whole >= LIKELY else "a guess", reason, counts)

    def to_html(self) -> str:
        """A page to look at, one self-contained HTML file."""
        from arctrm.report.pages import solution_page

        return solution_page(self)

    def _repr_html_(self) -> str:  # in a notebook, apart from its styles
        return f'<iframe srcdoc="{escape(self.to_html())}" width="100%" height="700"></iframe>'
