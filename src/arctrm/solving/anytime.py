"""One task within a wall-clock budget: a first answer early, better ones as the time allows.

A first answer comes from the model as it is (the reader's where there is one, else TRM's). Then the
model adapts to the demonstrations; the adapted model's readers answer under as many views as the
budget allows, the planner tries and TRM refines in what is left, and these answers replace the
first one; last, the readers judge the best of them.
Votes are never pooled over different weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from arctrm.config import SolveConfig
from arctrm.console import progress_console
from arctrm.data.render import grid_panel, side_by_side
from arctrm.data.task import Task
from arctrm.solving import scoring
from arctrm.solving.adaptation import Adapter, held_out, probe_task
from arctrm.solving.costs import (
    answering_seconds,
    asking_seconds,
    judging_seconds,
    least_seconds,
)
from arctrm.solving.pace import Pace
from arctrm.solving.planning import plan
from arctrm.solving.pool import proposals, questions, readers_candidates, trm_candidates
from arctrm.solving.report import Solution
from arctrm.solving.rounds import Round, answer_first, judge_best, read_views, refine_views
from arctrm.solving.vote import attempts, evidence
from arctrm.solving.weights import Solver

PROBE_VIEWS = 2
"""Views under which a held-out demonstration is asked for."""
PROBE_SHARE = 0.5
"""Share of the adaptation time before the probe."""
PROBE_TIME = 0.3
"""Share of the rest of that time that the probe may take."""
RESERVE = 1.2
"""Time kept for the answers, as a multiple of what they should take."""

Tell = Callable[[str], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after a first answer: carries the best solutions so far."""

    def __init__(self, solutions: list[Solution]):
        super().__init__("stopped before the budget was used; the answers are those found by then")
        self.solutions = solutions


@dataclass
class _Work:
    """A task being solved."""

    solver: Solver
    task: Task
    config: SolveConfig
    pace: Pace
    tell: Tell
    leave_one_out: float | None = None

    def solutions(self, best: Round) -> list[Solution]:
        """Two grids and their evidence for every test input."""
        ranked = best.rankings(self.task, self.config)
        found = []
        for index, pair in enumerate(self.task.test):
            key = self.task.id, index
            count = len(best.candidates.get(key, []))
            found.append(
                Solution(
                    attempts(ranked[key], pair.input),
                    evidence(ranked[key], count, self.leave_one_out),
                    best.adaptation_steps,
                    best.seconds,
                    self.solver.row_of(self.task) is not None,
                    best.histories[index] if best.histories else None,
                )
            )
        return found


def solve_task(
    solver: Solver, task: Task, config: SolveConfig, show_first: bool = False
) -> list[Solution]:
    """Two grids and their evidence for every test input, within `config.budget` seconds.

    Raises:
        Interrupted: Ctrl-C came when there was an answer already.

    """
    pace = Pace(config.budget)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        bar = progress.add_task("reading", total=config.budget)

        def tell(text: str) -> None:
            progress.update(bar, completed=min(pace.elapsed(), config.budget), description=text)

        work = _Work(solver, task, config, pace, tell)
        first, later, interrupted = Round(), Round(), False
        try:
            answer_first(first, solver, task, config, pace)
            if show_first:
                progress.console.print(_first_answer(work, first))
            _answer_later(work, later)
        except KeyboardInterrupt:
            if not first.complete(task):
                raise
            interrupted = True
    solutions = work.solutions(later if later.complete(task) else first)
    if interrupted:
        raise Interrupted(solutions)
    return solutions


def _answer_later(work: _Work, later: Round) -> None:
    """Adapt, read view by view, plan and refine in what is left, judge."""
    adapter = _adapt(work)
    solver = work.solver
    if adapter is not None:
        later.adaptation_steps, solver = adapter.steps, adapter.answering()
    common = (solver, work.task, work.config, work.pace, work.tell)
    views = read_views(later, *common)
    refine_views(later, views, *common, most=1)  # the planner needs to know TRM's pace
    judging = judging_seconds(solver, work.task, work.config, work.pace, share=1.0)
    planned = plan(*common, kept=judging)
    later.histories = planned.histories
    later.add(planned.candidates)
    refine_views(later, views, *common)
    if later.complete(work.task):
        judge_best(later, *common)


def _first_answer(work: _Work, first: Round) -> Group:
    solutions = work.solutions(first)
    grids = [grid_panel(s.attempts[0], f"test {i}") for i, s in enumerate(solutions, 1)]
    return Group(f"first answer after {first.seconds:.1f} s:", side_by_side(grids))


def _adapt(work: _Work) -> Adapter | None:
    """The adapted model; leaves in `work` the share of answers that got a held-out demonstration.

    A task that the model was trained on has no demonstration left to hold out; None where the
    configuration or the time allow no step.
    """
    solver, task, config, pace = work.solver, work.task, work.config, work.pace
    known = solver.row_of(task) is not None
    share = config.adaptation.known_share if known else config.adaptation.share
    if not config.adaptation.enabled or share == 0:
        return None
    guess = pace.seconds("refine", 1) + pace.seconds("read", 1)
    adapter = Adapter(solver, [task], config.adaptation, config.seed, guess)
    now, left = time.monotonic(), pace.left()
    alone = solver.without_ensemble()  # what is adapted is the first reader
    answers = answering_seconds(alone, task, config, pace)
    # What the answers do not need adapts, too.
    spare = 0.0 if answers is None else left - answers * RESERVE
    until = now + max(left * share, spare)
    until = min(until, pace.end - least_seconds(alone, task, config, pace) * RESERVE)
    most = config.adaptation.max_steps
    told = lambda steps: work.tell(f"adapting, step {steps}")
    index = None if known else held_out(task, config.seed)
    if index is not None:
        rest = probe_task(task, index)
        adapter.train([rest], now + (until - now) * PROBE_SHARE, most, told)
        work.leave_one_out = _probe(work, adapter, index, until) if adapter.steps else None
    adapter.train([task], until, most, told)
    return adapter if adapter.steps else None


def _probe(work: _Work, adapter: Adapter, index: int, until: float) -> float | None:
    """Share of answers that get the held-out demonstration exactly; None without time for it."""
    config, solver = work.config, adapter.answering()
    asked = questions(solver, [probe_task(work.task, index)], PROBE_VIEWS, config.seed)
    if asking_seconds(solver, asked, work.pace) > PROBE_TIME * (until - time.monotonic()):
        return None
    if solver.reader is not None:
        found = readers_candidates(solver, asked, proposals(solver, asked, config))
    else:
        found = trm_candidates(solver, asked, None, config)
    truth = work.task.demonstrations[index].output
    return float(np.mean([bool(scoring.is_right(c.grid, truth)) for _, c in found]))
