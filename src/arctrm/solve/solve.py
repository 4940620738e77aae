"""One task within a wall-clock budget: always two grids for every test input.

(1) a first answer, by TRM where there is one, else by the reader; (2) adaptation, where the task is
new; (3) the reader writes view by view; (4) TRM refines its drafts; (5) the planner tries; (6) the
reader judges the best both ways, and the ranking decides. All but (1) is done as far as the time
goes. Answers of adapted weights replace the first answer.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from arctrm.config import SolveConfig
from arctrm.data.task import Grid, Task
from arctrm.model.trm import usual_tokens
from arctrm.planner import PlannerResult
from arctrm.solve import budget
from arctrm.solve.adapt import adapt, share_of_adaptation
from arctrm.solve.budget import Asked, Clock, Session, judging_work, reading_work, refining_work
from arctrm.solve.plan import can_plan, plan, planning_seconds
from arctrm.solve.propose import READER, Candidate, Drafts, by_key, refine, write, written
from arctrm.solve.questions import Key, keys_of
from arctrm.solve.rank import Grids, Scores, filled, judged, rank, vote
from arctrm.solve.solution import Answer, OnProgress, Solution
from arctrm.solve.weights import Solver


class Stopped(KeyboardInterrupt):
    """Ctrl-C after a first answer: carries the best solution so far."""

    def __init__(self, solution: Solution):
        super().__init__("stopped before the budget was used; the answers are those found by then")
        self.solution = solution


def solve_task(
    solver: Solver,
    task: Task,
    config: SolveConfig,
    on_progress: OnProgress = lambda progress: None,
) -> Solution:
    """Two grids and their evidence for every test input, within `config.budget` seconds."""
    warms_up = solver.device.type == "cuda"
    clock = Clock(config.budget, warms_up=warms_up, on_progress=on_progress)
    known = solver.row_of(task) is not None
    first = Answers(Session(solver, task.without_answers(), config, clock, known))
    later, stopped = first, False
    try:
        with clock.during("first answer"):
            answer_first(first)
        later = adapted(first)
        answer_later(later)
    except KeyboardInterrupt:
        if not first.candidates:
            raise
        stopped = True
    best, other = (later, first) if later.complete else (first, later)
    with clock.during("judging"):
        solution = best.solution(judge := TimedJudge(best.session, stopped), other)
    solution = replace(solution, events=tuple(clock.events))
    if judge.stopped:
        raise Stopped(solution)
    return solution


@dataclass
class Answers:
    """What one set of weights answered."""

    session: Session
    steps: int = 0  # optimiser steps of adaptation before
    leave_one_out: float | None = None
    # By test input, source and view: one that is asked again has one vote.
    candidates: dict[tuple[Key, str, int | None], Candidate] = field(default_factory=dict)
    histories: tuple[PlannerResult, ...] = ()  # of the planner, one for each test input, if any
    drafts: list[Grid | None] = field(default_factory=list)  # question by question, as shown

    @property
    def complete(self) -> bool:
        """Whether every test input has a candidate."""
        return {key for key, _, _ in self.candidates} >= set(keys_of([self.session.task]))

    def add(self, found: Sequence[Candidate]) -> None:
        """Take in more candidates; one without a grid replaces none."""
        for one in found:
            if one.grid is not None or (one.key, one.source, one.view) not in self.candidates:
                self.candidates[one.key, one.source, one.view] = one
        if self.complete:  # those of adapted weights replace the first
            best = self.expected()
            self.session.clock.best = [best.get(key) for key in keys_of([self.session.task])]

    def expected(self) -> dict[Key, Grid]:
        """The grid that the reader wrote under most views, of each test input; else TRM's."""
        best = {}
        for key, own in by_key(self.candidates.values()).items():
            read = [one for one in own if one.source == READER and one.grid is not None]
            if voted := vote(read or own, self.session.config.seed):
                best[key] = voted[0].grid
        return best

    def solution(self, judge: "TimedJudge | None", other: "Answers | None" = None) -> Solution:
        """The ranked grids of every test input, with their evidence; `other`: the answers of other
        weights, for a second attempt where these weights proposed fewer than two grids.
        """
        session, task, clock = self.session, self.session.task, self.session.clock
        found, ask = by_key(self.candidates.values()), judge if session.solver.reader else None
        ranked = rank(session.solver, [task], found, session.config, ask)
        if other is not None and other is not self:
            spare = by_key(other.candidates.values())
            spares = rank(other.session.solver, [task], spare, session.config)
            ranked = {key: filled(own, spares[key]) for key, own in ranked.items()}
        plans = self.histories or [None] * len(task.test)
        answers = []
        for key, pair, tried in zip(keys_of([task]), task.test, plans, strict=True):
            own = found.get(key, ())
            refined = {one.source: one.history for one in own if one.history}
            answers.append(Answer(pair.input, ranked[key], len(own), tried, refined))
        how = (self.leave_one_out, self.steps, clock.elapsed(), session.known)
        return Solution(task, tuple(answers), *how)


def answer_first(answers: Answers) -> None:
    """(1) TRM's answer to every test input, or the reader's under one view, if a little late."""
    session = answers.session
    begin, whole = session.clock.begin, session.config.budget
    if session.solver.refiner is not None:
        answer_by_trm(answers, begin + min(budget.FIRST_SECONDS, budget.FIRST_SHARE * whole))
        return
    # Along nothing: what reading costs at most is learned from it.
    late = begin + max(budget.LATE_SECONDS, budget.LATE * whole)
    answers.drafts += _read(answers, asked := session.questions(1), follow=False, deadline=late)
    if not session.pass_seconds(1):
        TimedJudge(session)(asked, {key: [grid] for key, grid in answers.expected().items()})


def answer_by_trm(answers: Answers, until: float) -> None:
    """One supervision step under one view, then as many views with a few as fit until `until`."""
    session, one = answers.session, answers.session.questions(1)
    on_gpu = session.solver.device.type == "cuda"
    for asked in [one] if on_gpu else [[question] for question in one]:
        if answers.candidates and not session.clock.left():
            break  # the inputs of the rest stand for their answers
        _refine(answers, asked, 1)
    most = session.solver.trm_views(session.config.inference)
    asked = session.questions(min(budget.FIRST_VIEWS, most))
    cost = lambda part: session.refining_seconds(part, budget.FIRST_STEPS) * budget.CHUNK_SHARE
    if chunk := budget.next_views(asked, len(one), len(asked), until - time.monotonic(), cost):
        _refine(answers, chunk, budget.FIRST_STEPS)


def adapted(first: Answers) -> Answers:
    """(2) Where adapted weights answer; `first` itself where nothing is adapted."""
    session, clock, share = first.session, first.session.clock, share_of_adaptation(first.session)
    if not share or not clock.left():
        return first
    with clock.during("adapting"):
        if session.solver.reader is not None and not clock.seconds("read"):
            # What reading costs, from the first tokens of an answer.
            asked = [replace(session.questions(1)[0], room=budget.SAMPLE_TOKENS)]
            begin = time.monotonic()
            until = begin + budget.DRAFT_SHARE * clock.left()
            write(session.solver.reader, asked, follow=False, deadline=until)
            seconds = budget.LONGER * (time.monotonic() - begin)
            clock.record("read", reading_work(asked), seconds, guess=True)
        done = adapt(session, share)
    if done is None:
        return first
    later = Answers(replace(session, solver=done.solver), done.steps, done.leave_one_out)
    if done.solver.refiner is not None and clock.left():
        with clock.during("refining"):
            answer_by_trm(later, time.monotonic() + budget.DRAFT_SHARE * clock.left())
    return later


def answer_later(answers: Answers) -> None:
    """(3) to (5): all that adds candidates, as far as the time goes."""
    session, asked = answers.session, answers.session.questions()
    clock, kept = session.clock, lambda: session.judging_seconds() + planning_seconds(session)
    if session.solver.reader is not None:
        with clock.during("reading"):
            read_views(answers, asked, kept())
    if session.solver.refiner is not None:
        with clock.during("refining"):
            most = session.solver.trm_views(session.config.inference)
            refine_views(answers, [one for one in asked if one.number < most], kept())
    if can_plan(session.solver):
        with clock.during("planning"):
            answers.histories, found = plan(session, session.judging_seconds(share=1.0))
            answers.add(found)


def read_views(answers: Answers, asked: Asked, kept: float) -> None:
    """Let the reader write view by view, while there is time, but for `kept` seconds."""
    session, answered = answers.session, bool(answers.candidates)
    reader, clock, step = session.solver.reader, session.clock, len(session.task.test)
    while reader and (done := len(answers.drafts)) < len(asked) and (clock.left() or not answered):
        size = session.config.judge.batch_size or reader.batch_rows
        if reader.follows_drafts and not done:
            size = step  # which the others are likely to follow
        seconds = clock.left() - kept if done else math.inf  # one view is tried in any case
        cost = session.reading_seconds
        if not (chunk := budget.next_views(asked[done:], step, size, seconds, cost)):
            break
        answers.drafts += _read(answers, chunk, deadline=clock.end - kept * answered)
        session.clock.tell(f"view {len(answers.drafts) // step} of {len(asked) // step}")


def refine_views(answers: Answers, asked: Asked, kept: float) -> None:
    """The same for TRM: it refines what the reader wrote, and answers what was not read alone."""
    session, num_refined = answers.session, 0
    refiner, clock, step = session.solver.refiner, session.clock, len(session.task.test)
    most = session.config.inference.tokens_per_batch or usual_tokens(session.solver.device)
    steps, usual = session.most_steps, session.config.inference.steps
    cost = lambda part: session.refining_seconds(part, steps, 2)
    while steps > 1 and cost(asked[:step]) > clock.left() - kept:
        steps = usual = steps // 2  # rather than no view at all
    while refiner is not None and num_refined < len(asked):
        rest = asked[num_refined:]
        size = most // refining_work(rest[:1], 1, 2) if clock.seconds("refine") else step
        seconds = clock.left() - (kept if answers.complete else 0.0)
        if not (chunk := budget.next_views(rest, step, size, seconds, cost)):
            break
        drafts = (answers.drafts[num_refined:] + [None] * len(chunk))[: len(chunk)]
        _refine(answers, chunk, usual, drafts)
        num_refined += len(chunk)
        session.clock.tell(f"view {num_refined // step} of {len(asked) // step}")


def _read(answers: Answers, asked: Asked, *, deadline: float, follow: bool = True) -> Drafts:
    """What the reader writes, also into `answers`, and what it cost into the clock."""
    session, reader, begin = answers.session, answers.session.solver.reader, time.monotonic()
    assert reader is not None
    how: Any = {"batch_size": session.config.judge.batch_size, "deadline": deadline}
    how |= {"expected": answers.expected()} if follow else {"follow": False}
    texts = write(reader, asked, **how)
    session.clock.record("read", reading_work(asked), time.monotonic() - begin)
    answers.add(written(asked, texts))
    return [text.grid for text in texts]


def _refine(answers: Answers, asked: Asked, steps: int | None, given: Drafts | None = None) -> None:
    session, begin, voices = answers.session, time.monotonic(), answers.session.solver.speakers
    refiner = voices.alone if given is None else voices.refiner
    assert refiner is not None
    tokens = session.config.inference.tokens_per_batch
    how: Any = {"num_steps": steps, "tokens_per_batch": tokens, "keep_history": True}
    answers.add(refine(refiner, asked, given, **how))
    work = refining_work(asked, steps or session.most_steps, 1 if given is None else 2)
    session.clock.record("refine", work, time.monotonic() - begin)


class TimedJudge:
    """(6) Scores view by view while there is time, fewer grids where one view of all would end too
    late; Ctrl-C ends it with the views scored by then.
    """

    def __init__(self, session: Session, stopped: bool = False):
        self.session, self.stopped = session, stopped

    def __call__(self, questions: Asked, grids: Grids) -> Scores:
        """See `rank.Judge`."""
        scores: Scores = []
        session, clock, reader = self.session, self.session.clock, self.session.solver.reader
        assert reader is not None
        groups = [list(own) for _, own in itertools.groupby(questions, lambda one: one.number)]
        many = lambda: max(map(len, grids.values()), default=0) > 1
        groups = groups if many() else groups[:1]  # where there is nothing to choose
        slow = lambda own: session.pass_seconds(judging_work(own, grids)) >= clock.left()
        while groups and slow(groups[0]) and many():
            grids = {key: own[: -(-len(own) // 2)] for key, own in grids.items()}
        try:
            for number, group in enumerate(groups, 1):
                if self.stopped or slow(group):
                    break
                clock.tell(f"view {number} of {len(groups)}")
                begin = time.monotonic()
                scores += judged(reader, group, grids, batch_size=session.config.judge.batch_size)
                clock.record("judge", judging_work(group, grids), time.monotonic() - begin)
        except KeyboardInterrupt:
            self.stopped = True
        return scores
