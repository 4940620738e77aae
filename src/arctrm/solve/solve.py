"""`arctrm solve`: one task or many, each within a wall-clock budget, always two grids.

In the order of a task: (1) a first answer, by TRM where there is one (a few passes over whole
grids), else by the reader; (2) adaptation, where the task is new; (3) the reader writes view by
view, on a CPU along what TRM answered; (4) TRM refines what it wrote; (5) the planner tries;
(6) the reader judges the best both ways, and the ranking decides. All but the first answer is done
as far as the time goes. Votes are never pooled over different weights: what adapted weights answer
replaces the first answer.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arctrm.config import SolveConfig
from arctrm.console import console, note, plain, progress_console
from arctrm.data.render import grid_panel, side_by_side
from arctrm.data.sources import load_tasks
from arctrm.data.task import Grid, Task
from arctrm.model.trm import Refiner, usual_tokens
from arctrm.planner import PlannerResult
from arctrm.solve import budget, scoring
from arctrm.solve.adapt import adapt, require_adaptable, share_of_adaptation
from arctrm.solve.budget import Clock, Session, judging_work, reading_work, refining_work
from arctrm.solve.plan import can_plan, plan, planning_seconds
from arctrm.solve.propose import READER, Candidate, Drafts, by_key, refine, write, written
from arctrm.solve.questions import Key, Question, keys_of, require_test_inputs
from arctrm.solve.rank import Grids, Ranked, Scores, judged, rank, vote
from arctrm.solve.report import Solution, attempts_table, solution_report
from arctrm.solve.results import write_submission
from arctrm.solve.weights import Solver, load_solver
from arctrm.system import disk_errors, write_bytes_atomically


class Stopped(KeyboardInterrupt):
    """Ctrl-C after a first answer: carries the best solutions so far."""

    def __init__(self, solutions: list[Solution]):
        super().__init__("stopped before the budget was used; the answers are those found by then")
        self.solutions = solutions


def solve(
    config: SolveConfig,
    target: str,
    *,
    check: bool = False,
    trace: bool = False,
    dry_run: bool = False,
) -> None:
    """Solve the tasks of `target`, print each, write submission.json to `config.out`, if any.

    `check` says at the end whether the answers are right, where they are known; `trace` shows the
    planner's attempts; `dry_run` only says what would be done. With `keep_going` a bad task of a
    folder is reported and left out, and one that fails is answered by its inputs.

    Raises:
        UserError: the target or the checkpoint cannot be used.
        KeyboardInterrupt: Ctrl-C; what was answered is written.
    """
    left_out = (lambda error: note(plain(f"left out: {error}"))) if config.keep_going else None
    tasks = load_tasks(target, on_error=left_out)
    require_test_inputs(tasks, target)
    known, out = scoring.answers(tasks), config.out
    device = torch.device("cuda" if torch.cuda.is_available() and not dry_run else "cpu")
    solver = load_solver(config.checkpoint, config.inference, device)
    require_adaptable(solver, "solve", "`arctrm eval` takes any checkpoint")
    if dry_run:
        console().print(_table(solver, tasks, config))
        return
    if trace and not can_plan(solver):
        note(plain(f"{solver.name}: reader and TRM do not answer together: nothing is planned"))
    if out is not None:
        with disk_errors(out):  # before the work: can the submission be written?
            out.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(out / ".probe", b"")
        (out / ".probe").unlink()
    ranked: dict[Key, Sequence[Ranked]] = {}
    right: list[bool] = []
    for number, task in enumerate(tasks, 1):
        if len(tasks) > 1:
            note(plain(f"task {number} of {len(tasks)}: {task.id}"))
        solutions, stop = _answered(solver, task, config, len(tasks) == 1)
        ranked |= zip(keys_of([task]), (one.ranked for one in solutions), strict=True)
        correct = None
        if check:
            correct = scoring.verdicts([one.attempts for one in solutions], known[task.id])
            right += [any(own) for own in correct if None not in own]
        console().print(solution_report(task.without_answers(), solutions, correct))
        for index, one in enumerate(solutions if trace and can_plan(solver) else (), 1):
            if one.history is None:
                note(f"test {index}: no two attempts of the planner fitted into the budget")
            else:
                console().print(attempts_table(one.history, f"test {index}: attempts"))
        if out is not None:  # after every task, so that an interrupt loses none
            write_submission(out, tasks[:number], ranked)
        if stop is not None:
            raise stop
    told = f"{sum(right)} of {len(right)} test inputs with a known answer solved"
    if check:
        console().print(told if right else "no answer is known, so nothing is checked")


def _answered(
    solver: Solver, task: Task, config: SolveConfig, alone: bool
) -> tuple[list[Solution], Stopped | None]:
    try:
        return solve_task(solver, task, config, show_first=alone), None
    except Stopped as stop:
        return stop.solutions, stop
    except Exception as error:
        if alone or not config.keep_going:
            raise
        said = f"{task.id}: failed ({type(error).__name__}: {error}); its inputs are submitted"
        note(plain(said))
        return [Solution(pair.input, (), 0) for pair in task.test], None


def solve_task(
    solver: Solver, task: Task, config: SolveConfig, *, show_first: bool = False
) -> list[Solution]:
    """Two grids and their evidence for every test input, within `config.budget` seconds; Stopped
    is raised where Ctrl-C came when there was an answer already.
    """
    clock = Clock(config.budget, warms_up=solver.device.type == "cuda")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        bar = progress.add_task("answering", total=config.budget)

        def tell(text: str) -> None:
            progress.update(bar, completed=min(clock.elapsed(), config.budget), description=text)

        known = solver.row_of(task) is not None
        session = Session(solver, task.without_answers(), config, clock, tell, known)
        first = later = Answers(session)
        stopped = False
        try:
            answer_first(first)
            if show_first:
                progress.console.print(f"first answer after {clock.elapsed():.1f} s:")
                grids = [one.attempts[0] for one in first.solutions(None)]
                panels = [grid_panel(grid, f"test {i}") for i, grid in enumerate(grids, 1)]
                progress.console.print(side_by_side(panels))
            later = adapted(first)
            answer_later(later)
        except KeyboardInterrupt:
            if not first.candidates:
                raise
            stopped = True
        best = later if later.complete else first
        judge = TimedJudge(best.session, stopped)
        solutions = best.solutions(judge)
    if judge.stopped:
        raise Stopped(solutions)
    return solutions


@dataclass
class Answers:
    """What one set of weights answered."""

    session: Session
    steps: int = 0  # optimiser steps of adaptation before
    leave_one_out: float | None = None
    candidates: dict[tuple[Key, str, int | None], Candidate] = field(default_factory=dict)
    """By test input, source and view: one that is asked again has one vote."""
    histories: tuple[PlannerResult, ...] = ()
    """The planner's attempts at each test input, where it made some."""
    drafts: list[Grid | None] = field(default_factory=list)
    """What the reader wrote, question by question, as the view shows it."""

    @property
    def complete(self) -> bool:
        """Whether every test input has a candidate."""
        return {key for key, _, _ in self.candidates} >= set(keys_of([self.session.task]))

    def add(self, found: Sequence[Candidate]) -> None:
        """Take in more candidates."""
        self.candidates |= {(one.key, one.source, one.view): one for one in found}

    def expected(self) -> dict[Key, Grid]:
        """The grid that the reader wrote under most views, of each test input; else TRM's."""
        best = {}
        for key, own in by_key(self.candidates.values()).items():
            read = [one for one in own if one.source == READER and one.grid is not None]
            best[key] = vote(read or own, self.session.config.seed)
        return {key: own[0].grid for key, own in best.items() if own}

    def solutions(self, judge: "TimedJudge | None") -> list[Solution]:
        """The ranked grids of every test input, with their evidence."""
        session, found = self.session, by_key(self.candidates.values())
        task, solver = session.task, session.solver
        ask = judge if judge is not None and solver.reader is not None else None
        ranked = rank(solver, [task], found, session.config, ask)
        return [
            Solution(
                pair.input,
                ranked[key],
                len(found.get(key, ())),
                self.leave_one_out,
                self.steps,
                session.clock.elapsed(),
                session.known,
                self.histories[key.index] if self.histories else None,
            )
            for key, pair in zip(keys_of([task]), task.test, strict=True)
        ]


# ---- 1. the first answer


def answer_first(answers: Answers) -> None:
    """TRM's answer to every test input, or the reader's under one view, even if a little late."""
    session, solver = answers.session, answers.session.solver
    if solver.refiner is not None:
        seconds = min(budget.FIRST_SECONDS, budget.FIRST_SHARE * session.config.budget)
        answer_by_trm(answers, session.clock.begin + seconds)
        return
    asked = session.questions(1)
    # Along nothing: what reading costs at most is learned from it.
    late = max(budget.LATE_SECONDS, budget.LATE * session.config.budget)
    _read(answers, asked, follow=False, deadline=session.clock.begin + late)
    if not session.pass_seconds(1):
        TimedJudge(session)(asked, {key: [grid] for key, grid in answers.expected().items()})


def answer_by_trm(answers: Answers, until: float) -> None:
    """One supervision step under one view, then as many views with a few as fit until `until`."""
    session, clock = answers.session, answers.session.clock
    refiner = session.solver.speakers.alone
    assert refiner is not None
    one, on_gpu = session.questions(1), session.solver.device.type == "cuda"
    for asked in [one] if on_gpu else [[question] for question in one]:
        if answers.candidates and not clock.left():
            break  # the inputs of the rest stand for their answers
        _refine(answers, refiner, asked, None, 1)
    asked = session.questions(min(budget.FIRST_VIEWS, session.config.inference.views))
    cost = lambda part: session.refining_seconds(part, budget.FIRST_STEPS) * budget.CHUNK_SHARE
    if chunk := budget.next_views(asked, len(one), len(asked), until - time.monotonic(), cost):
        _refine(answers, refiner, chunk, None, budget.FIRST_STEPS)


# ---- 2. adaptation


def adapted(first: Answers) -> Answers:
    """Where adapted weights answer; `first` itself where nothing is adapted."""
    session, clock, share = first.session, first.session.clock, share_of_adaptation(first.session)
    if not share or not clock.left():
        return first
    if session.solver.reader is not None and not clock.seconds("read"):
        # What reading costs, from the first tokens of an answer.
        asked = [replace(session.questions(1)[0], room=budget.SAMPLE_TOKENS)]
        begin = time.monotonic()
        until = begin + budget.DRAFT_SHARE * clock.left()
        write(session.solver.reader, asked, follow=False, deadline=until)
        seconds = budget.LONGER * (time.monotonic() - begin)
        clock.record("read", reading_work(asked), seconds, guess=True)
    session.tell("adapting")
    done = adapt(session, share)
    if done is None:
        return first
    later = Answers(replace(session, solver=done.solver), done.steps, done.leave_one_out)
    if done.solver.refiner is not None and clock.left():
        answer_by_trm(later, time.monotonic() + budget.DRAFT_SHARE * clock.left())
    return later


# ---- 3. to 5. the reader writes, TRM refines, the planner tries


def answer_later(answers: Answers) -> None:
    """All that adds candidates, as far as the time goes."""
    session, asked = answers.session, answers.session.questions()
    read_views(answers, asked, session.judging_seconds() + planning_seconds(session))
    refine_views(answers, asked, session.judging_seconds() + planning_seconds(session))
    answers.histories, found = plan(session, session.judging_seconds(share=1.0))
    answers.add(found)


def read_views(answers: Answers, asked: Sequence[Question], kept: float) -> None:
    """Let the reader write view by view, while there is time, but for `kept` seconds."""
    session = answers.session
    reader, clock, step = session.solver.reader, session.clock, len(session.task.test)
    answered = bool(answers.candidates)
    while reader and len(answers.drafts) < len(asked) and (clock.left() or not answered):
        begun = bool(answers.drafts)
        size = session.config.judge.batch_size or reader.batch_rows
        if reader.follows_drafts and not begun:
            size = step  # which the others are likely to follow
        seconds = clock.left() - kept if begun else math.inf  # one view is tried in any case
        rest = asked[len(answers.drafts) :]
        if not (chunk := budget.next_views(rest, step, size, seconds, session.reading_seconds)):
            break
        answers.drafts += _read(answers, chunk, deadline=clock.end - kept * answered)
        session.tell(f"reading, view {len(answers.drafts) // step} of {len(asked) // step}")


def refine_views(answers: Answers, asked: Sequence[Question], kept: float) -> None:
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
        if not (chunk := budget.next_views(rest, step, max(size, step), seconds, cost)):
            break
        drafts = (answers.drafts[num_refined:] + [None] * len(chunk))[: len(chunk)]
        _refine(answers, refiner, chunk, drafts, usual)
        num_refined += len(chunk)
        session.tell(f"refining, view {num_refined // step} of {len(asked) // step}")


def _read(
    answers: Answers, asked: Sequence[Question], *, deadline: float, follow: bool = True
) -> list[Grid | None]:
    """What the reader writes, also into `answers`, and what it cost into the clock."""
    session, begin, expected = answers.session, time.monotonic(), answers.expected()
    assert session.solver.reader is not None
    size = session.config.judge.batch_size
    ask = partial(write, session.solver.reader, asked, batch_size=size, deadline=deadline)
    texts = ask(expected=expected) if follow else ask(follow=False)
    session.clock.record("read", reading_work(asked), time.monotonic() - begin)
    answers.add(written(asked, texts))
    return [text.grid for text in texts]


def _refine(
    answers: Answers,
    refiner: Refiner,
    asked: Sequence[Question],
    drafts: Drafts | None,
    num_steps: int | None,
) -> None:
    session, begin = answers.session, time.monotonic()
    tokens = session.config.inference.tokens_per_batch
    answers.add(refine(refiner, asked, drafts, num_steps=num_steps, tokens_per_batch=tokens))
    work = refining_work(asked, num_steps or session.most_steps, 1 if drafts is None else 2)
    session.clock.record("refine", work, time.monotonic() - begin)


# ---- 6. the reader judges


class TimedJudge:
    """Scores view by view while there is time; fewer grids where one view of all would end too
    late. Ctrl-C ends it with the views scored by then.
    """

    def __init__(self, session: Session, stopped: bool = False):
        self.session, self.stopped = session, stopped

    def __call__(self, questions: Sequence[Question], grids: Grids) -> Scores:
        """See `rank.Judge`."""
        scores: Scores = []
        session, clock, reader = self.session, self.session.clock, self.session.solver.reader
        assert reader is not None
        groups = [list(own) for _, own in itertools.groupby(questions, lambda one: one.number)]
        if max(map(len, grids.values()), default=0) < 2:
            groups = groups[:1]  # there is nothing to choose
        slow = lambda own: session.pass_seconds(judging_work(own, grids)) >= clock.left()
        while groups and slow(groups[0]) and max(map(len, grids.values()), default=0) > 1:
            grids = {key: own[: -(-len(own) // 2)] for key, own in grids.items()}
        try:
            for number, group in enumerate(groups, 1):
                if self.stopped or slow(group):
                    break
                session.tell(f"judging, view {number} of {len(groups)}")
                begin = time.monotonic()
                scores += judged(reader, group, grids, batch_size=session.config.judge.batch_size)
                clock.record("judge", judging_work(group, grids), time.monotonic() - begin)
        except KeyboardInterrupt:
            self.stopped = True
        return scores


def _table(solver: Solver, tasks: Sequence[Task], config: SolveConfig) -> Table:
    table = Table(title="solve (dry run)", title_justify="left", show_header=False)
    for row in (
        ("checkpoint, voices", plain(f"{solver.name}, {' and '.join(solver.voices)}")),
        ("tasks, test inputs", f"{len(tasks)}, {sum(len(task.test) for task in tasks)}"),
        ("known to the model", str(sum(solver.row_of(task) is not None for task in tasks))),
        ("time at most", f"{len(tasks) * config.budget / 60:.1f} min"),
    ):
        table.add_row(*row)
    return table
