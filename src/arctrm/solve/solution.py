"""What solving a task gives: two grids for every test input, their evidence, and a time line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from arctrm.data.task import Grid, Task
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


@dataclass(frozen=True, eq=False)
class Answer:
    """The ranked grids of one test input, and what went into them."""

    test_input: Grid  # submitted where no grid was proposed
    ranked: Sequence[Ranked] = ()  # best first
    num_candidates: int = 0  # proposals, malformed ones included
    history: PlannerResult | None = None  # the planner's attempts, where it made some

    @property
    def attempts(self) -> tuple[Grid, Grid]:
        """attempt_1 and attempt_2."""
        return attempts(self.ranked, self.test_input)

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
