"""The time of a solve: what work costs (seconds per unit of reading, refining, judging, learned as
it is done), what fits before the end, and all constants about time.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from arctrm.config import SolveConfig
from arctrm.data.task import Grid, Task
from arctrm.model.layout import grid_length
from arctrm.solve.propose import prompt_of
from arctrm.solve.questions import Key, Question, inverse_questions, questions
from arctrm.solve.rank import asks_inverse
from arctrm.solve.solution import Event, OnProgress, Progress, Stage
from arctrm.solve.weights import Solver

# TRM's first answer: seconds, share of the budget at most, supervision steps, views. The reader's
# is given up after so many seconds, or so much of the budget if that is more.
FIRST_SECONDS, FIRST_SHARE, FIRST_STEPS, FIRST_VIEWS = 1.2, 0.2, 4, 8
LATE_SECONDS, LATE = 5.0, 1.05
SAMPLE_TOKENS, LONGER = 16, 1.5  # a reading that learns its cost; longer ones cost more a token
# Adaptation: a token trained, in tokens of TRM at most; held-out demonstration: views, share of the
# time before it, of the rest that it may take; time kept for answers, of what they should take.
TRAINING_PASSES, PROBE_VIEWS, PROBE_SHARE, PROBE_TIME, RESERVE = 4, 2, 0.5, 0.3, 1.2
# Of the time left: TRM's answers that the reader follows, a hub's planner, judging, several views.
DRAFT_SHARE, PLAN_SHARE, JUDGE_SHARE, CHUNK_SHARE = 0.1, 0.3, 0.25, 0.5
# Costs (measured): every token written is worth so many rows, beside the rows themselves, and as
# much as so many tokens of a prompt; every pass over all layers, so many tokens beside its own.
ROWS_OF_A_STEP, PROMPT_TOKENS, PASS_TOKENS = 8, 64, 64
# What the first batch on a GPU takes to warm up: share of its time, seconds at most.
WARM_SHARE, WARM_SECONDS = 0.5, 1.0
Asked = Sequence[Question]
Cost = Callable[[Asked], float]


class Clock:
    """A budget in seconds from now on, what it was used for, and seconds per unit of each kind of
    work so far.
    """

    def __init__(
        self,
        budget: float,
        *,
        warms_up: bool = False,  # as a GPU's first batches
        on_progress: OnProgress = lambda progress: None,
    ):
        self.begin, self.warms_up, self.on_progress = time.monotonic(), warms_up, on_progress
        self.end = self.begin + budget
        self.events: list[Event] = []
        self.best: Sequence[Grid | None] = ()  # so far, of every test input
        self._stage: Stage | None = None
        self._rates: dict[str, float] = {}
        self._guessed: set[str] = set()

    def left(self) -> float:
        """Seconds to the end."""
        return max(0.0, self.end - time.monotonic())

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    @contextmanager
    def during(self, stage: Stage) -> Iterator[None]:
        """Record a stage; one within another belongs to the other."""
        if self._stage is not None:
            yield
            return
        self._stage, start = stage, self.elapsed()
        self.tell()
        try:
            yield
        finally:
            self.events.append(Event(stage, start, self.elapsed() - start))
            self._stage = None

    def tell(self, detail: str = "") -> None:
        """Report how far the stage is; nothing outside of a stage."""
        if self._stage is not None:
            now, whole = self.elapsed(), self.end - self.begin
            self.on_progress(Progress(self._stage, detail, now, whole, self.best))

    def seconds(self, work: str, amount: int = 1) -> float:
        """Seconds that so much of it will take; 0 where none has been done."""
        return amount * self._rates.get(work, 0.0)

    def record(self, work: str, amount: int, seconds: float, *, guess: bool = False) -> None:
        """Learn from a batch, the later the more; a `guess` or a warm-up counts only until then."""
        if work not in self._rates and self.warms_up:
            seconds, guess = seconds - min(seconds * WARM_SHARE, WARM_SECONDS), True
        now = seconds / max(1, amount)
        forgotten = work not in self._rates or work in self._guessed
        self._rates[work] = now if forgotten else (self._rates[work] + now) / 2
        (self._guessed.add if guess else self._guessed.discard)(work)


@dataclass(frozen=True, eq=False)
class Session:
    """A task being solved, by the weights that answer now; it carries no answers."""

    solver: Solver
    task: Task
    config: SolveConfig
    clock: Clock
    known: bool = False  # whether the weights were trained on the task before

    def questions(self, views: int | None = None) -> list[Question]:
        """Questions about the test inputs, view by view (default: all views)."""
        views = views or self.config.inference.views
        return questions(self.solver, self.task, views, self.config.seed)

    def reading_seconds(self, asked: Asked) -> float:
        """What the reader's answers should take; TRM's, where there is no reader."""
        if self.solver.reader is None:
            return self.refining_seconds(asked, self.most_steps)
        return self.clock.seconds("read", reading_work(asked))

    def refining_seconds(self, asked: Asked, steps: int, ways: int = 1) -> float:
        """What TRM's answers should take."""
        return self.clock.seconds("refine", refining_work(asked, steps, ways))

    def pass_seconds(self, tokens: int) -> float:
        """What scoring should take: before the reader has scored, a trunk's TRM says it."""
        like = "judge" if self.clock.seconds("judge") or self.solver.reads_pairs else "refine"
        return self.clock.seconds(like, tokens)

    def judging_seconds(self, share: float = JUDGE_SHARE) -> float:
        """What the judgement of the best should take: at most `share` of the time left."""
        judge, asked = self.config.judge, self.questions(self.config.judge.scoring_views)
        if self.solver.reader is None:
            return 0.0
        likely = {one.key: np.zeros(one.shape, np.uint8) for one in asked}
        some = lambda count: {key: [grid] * count for key, grid in likely.items()}
        work = judging_work(asked, some(judge.scored_candidates))
        if judge.inverse_weight and asks_inverse(self.solver):
            asked = inverse_questions(self.solver, [self.task], judge.scoring_views)
            work += judging_work(asked, some(judge.inverse_candidates))
        return min(self.pass_seconds(work), self.clock.left() * share)

    @property
    def most_steps(self) -> int:
        """Supervision steps of an answer of TRM, at most."""
        refiner = self.solver.refiner
        return self.config.inference.steps or (refiner.halt_max_steps if refiner else 0)


def reading_work(asked: Asked) -> int:
    """What writing answers costs, in tokens of one row: a batch is as long as its longest."""
    rooms = (one.room + len(prompt_of(one).tokens) // PROMPT_TOKENS for one in asked)
    return (ROWS_OF_A_STEP + len(asked)) * max(rooms, default=0)


def refining_work(asked: Asked, steps: int, ways: int = 1) -> int:
    """Tokens of `steps` passes over the questions, from each of `ways` first answers."""
    tokens = sum(2 + grid_length(*one.query.shape) + grid_length(*one.shape) for one in asked)
    return steps * (PASS_TOKENS + tokens * ways)


def judging_work(asked: Asked, grids: Mapping[Key, Sequence[Grid]]) -> int:
    """Tokens of prompts and grids; of an inverse question each grid is a prompt."""
    total = 0
    for one in asked:
        own = [grid_length(*grid.shape) + 1 for grid in grids.get(one.key, ())]
        shown = len(own) * one.room if one.prompt is None else len(one.prompt.tokens)
        total += PASS_TOKENS + sum(own) + shown
    return total


def next_views(rest: Asked, step: int, size: int, seconds: float, cost: Cost) -> Asked:
    """Next views of `step` questions: one in `seconds`, or more (up to `size`) in a part of it."""
    count = max(1, size // step)
    while count > 1 and cost(rest[: count * step]) > seconds * CHUNK_SHARE:
        count //= 2
    return part if cost(part := rest[: count * step]) <= seconds else ()
