"""`arctrm solve`: one task or many, each within a wall-clock budget, always two grids.

Per task: a first answer from the model as it is; then adaptation on the demonstrations; then
answers of the adapted model under as many views as the budget allows, which replace the first
ones. Votes are never pooled over different weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arctrm.config import SolveConfig
from arctrm.console import console, note, progress_console
from arctrm.data.render import grid_panel, side_by_side
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task
from arctrm.errors import CheckpointError
from arctrm.solving import scoring
from arctrm.solving.adaptation import Adapter, held_out, probe_task
from arctrm.solving.candidates import (
    Key,
    answer,
    answer_batch,
    batches,
    require_test_inputs,
    task_queries,
)
from arctrm.solving.report import Solution, solution_report
from arctrm.solving.submission import check_complete, submission, write_submission
from arctrm.solving.vote import Candidate, attempts, evidence, vote
from arctrm.solving.weights import Solver, load_solver
from arctrm.training.files import disk_errors, write_text_atomically

PROBE_VIEWS = 2
"""Views under which a held-out demonstration is asked for."""
PROBE_SHARE = 0.5
"""Share of the adaptation time before the probe."""
WARM_SHARE = 0.5
"""Guess of how much of the very first batch's time was not warming up."""
RESERVE = 1.2
"""Time kept for the answers, as a multiple of what they should take."""

Tell = Callable[[str], None]


@dataclass
class Round:
    """What one set of weights answered."""

    candidates: dict[Key, list[Candidate]] = field(default_factory=dict)
    adaptation_steps: int = 0
    seconds: float = 0.0
    """From the start of the task to these answers."""

    def complete(self, task: Task) -> bool:
        """Whether every test input has a candidate."""
        return all((task.id, index) in self.candidates for index in range(len(task.test)))


class Pace:
    """Whether another batch of answers ends before the deadline, judged by those so far."""

    def __init__(self, end: float):
        self.end = end
        self.seconds_per_token = 0.0
        self.warm = False

    def left(self) -> float:
        """Seconds to the end."""
        return max(0.0, self.end - time.monotonic())

    def seconds(self, num_tokens: int) -> float:
        """Seconds that answering `num_tokens` will take."""
        return num_tokens * self.seconds_per_token

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from a batch; the very first one, which pays for warming up, is soon forgotten."""
        now = seconds / num_tokens
        if self.seconds_per_token == 0:
            self.seconds_per_token = now * WARM_SHARE
        else:
            self.seconds_per_token = (self.seconds_per_token + now) / 2 if self.warm else now
            self.warm = True


def run(config: SolveConfig, target: str, out: Path | None, check: bool) -> None:
    """Solve the tasks of `target`, print each, write submission.json to `out`.

    `check` says at the end whether the answers are right, where they are known.

    Raises:
        UserError: the target or the checkpoint cannot be used; with `keep_going` a bad task in a
            folder is reported instead.

    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks = _load(config, target)
    known = scoring.answers(tasks)
    solver = load_solver(config.checkpoint, config.inference, device)
    _check_solver(solver)
    if out is not None:
        _open_folder(out)
    answered: dict[str, list[Solution]] = {}
    verdicts: list[bool] = []
    for number, task in enumerate(tasks, 1):
        if len(tasks) > 1:
            note(escape(f"task {number} of {len(tasks)}: {task.id}"))
        stop: Interrupted | None = None
        try:
            solutions = solve_task(solver, task.without_answers(), config, len(tasks) == 1)
        except Interrupted as interrupt:
            solutions, stop = interrupt.solutions, interrupt
        answered[task.id] = solutions
        correct = scoring.judge([s.attempts for s in solutions], known[task.id]) if check else None
        console().print(solution_report(task.without_answers(), solutions, correct))
        if correct is not None:
            verdicts += [any(pair) for pair in correct if None not in pair]
        if out is not None:  # after every task, so that an interrupt loses none
            _write(answered, tasks[:number], out)
        if stop is not None:
            raise stop
    if check:
        solved = f"{sum(verdicts)} of {len(verdicts)}"
        known_answers = f"{solved} test inputs with a known answer solved"
        console().print(known_answers if verdicts else "no answer is known, so nothing is checked")


def _load(config: SolveConfig, target: str) -> list[Task]:
    """The tasks of the target; with `keep_going` what cannot be used is said and left out."""
    left_out = lambda error: note(escape(f"left out: {error}"))
    tasks = load_tasks(target, on_error=left_out if config.keep_going else None)
    require_test_inputs(tasks, target)
    return tasks


def _open_folder(out: Path) -> None:
    """Make sure before the work that the submission can be written."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    probe = out / ".probe"
    write_text_atomically(probe, "\n")
    probe.unlink()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after a first answer: carries the best solutions so far."""

    def __init__(self, solutions: list[Solution]):
        super().__init__("stopped before the budget was used; the answers are those found by then")
        self.solutions = solutions


def solve_task(
    solver: Solver, task: Task, config: SolveConfig, show_first: bool = False
) -> list[Solution]:
    """Two grids and their evidence for every test input, within `config.budget` seconds.

    Raises:
        Interrupted: Ctrl-C came when there was an answer already.

    """
    end = time.monotonic() + config.budget
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        bar = progress.add_task("reading", total=config.budget)

        def tell(text: str) -> None:
            elapsed = min(config.budget + time.monotonic() - end, config.budget)
            progress.update(bar, completed=elapsed, description=text)

        first, later = Round(), Round()
        pace, leave_one_out, interrupted = Pace(end), None, False
        try:
            _answer_round(first, solver, task, config, pace, tell, max_views=1)
            if show_first:
                progress.console.print(_first_answer(solver, task, first, config))
            adapted, leave_one_out = _adapt(solver, task, config, pace, tell)
            later.adaptation_steps = adapted.steps if adapted else 0
            answering = adapted.solver if adapted else solver
            _answer_round(later, answering, task, config, pace, tell)
        except KeyboardInterrupt:
            if not first.complete(task):
                raise
            interrupted = True
    best = later if later.complete(task) else first
    solutions = _solutions(solver, task, best, leave_one_out, config)
    if interrupted:
        raise Interrupted(solutions)
    return solutions


def _first_answer(solver: Solver, task: Task, first: Round, config: SolveConfig) -> Group:
    solutions = _solutions(solver, task, first, None, config)
    grids = [grid_panel(s.attempts[0], f"test {i}") for i, s in enumerate(solutions, 1)]
    return Group(f"first answer after {first.seconds:.1f} s:", side_by_side(grids))


def _adapt(
    solver: Solver, task: Task, config: SolveConfig, pace: Pace, tell: Tell
) -> tuple[Adapter | None, float | None]:
    """The adapted model, and the share of views that got a held-out demonstration right.

    A task that the model was trained on has no demonstration left to hold out; None where the
    configuration or the time allow no step.
    """
    known = solver.row_of(task) is not None
    share = config.adaptation.known_share if known else config.adaptation.share
    if not config.adaptation.enabled or share == 0:
        return None, None
    adapter = Adapter(solver, task, config.adaptation, config.seed, pace.seconds_per_token)
    now, left = time.monotonic(), pace.left()
    queries = task_queries(solver, task, config.inference.views, config.seed)
    answers = pace.seconds(sum(query.codes.size for query in queries)) * RESERVE
    until = now + max(left * share, left - answers)  # what the answers do not need adapts, too
    told = lambda steps: tell(f"adapting, step {steps}")
    index = None if known else held_out(task, config.seed)
    score = None
    if index is not None:
        rest = [pair for i, pair in enumerate(task.demonstrations) if i != index]
        adapter.train(rest, now + (until - now) * PROBE_SHARE, told)
        score = _probe(adapter, task, index, config) if adapter.steps else None
    adapter.train(task.demonstrations, until, told)
    return (adapter, score) if adapter.steps else (None, None)


def _probe(adapter: Adapter, task: Task, index: int, config: SolveConfig) -> float:
    """Share of views under which the held-out demonstration is answered exactly."""
    probe = probe_task(task, index)
    queries = task_queries(adapter.solver, probe, PROBE_VIEWS, config.seed)
    found = answer(adapter.solver, queries, config.inference)
    truth = task.demonstrations[index].output
    return float(np.mean([bool(scoring.is_right(c.grid, truth)) for _, c in found]))


def _answer_round(
    result: Round,
    solver: Solver,
    task: Task,
    config: SolveConfig,
    pace: Pace,
    tell: Tell,
    max_views: int | None = None,
) -> None:
    """Answer view by view, into `result`, until the views or the time are used up.

    With `max_views` (the first round) the time does not matter: there must be an answer.
    """
    views = max_views or config.inference.views
    queries = task_queries(solver, task, views, config.seed)
    for batch in batches(solver, queries, config.inference):
        num_tokens = sum(query.codes.size for query in batch)
        if max_views is None and pace.seconds(num_tokens) > pace.left():
            break
        begin = time.monotonic()
        for key, candidate in answer_batch(solver, batch, config.inference):
            result.candidates.setdefault(key, []).append(candidate)
        pace.record(num_tokens, time.monotonic() - begin)
        result.seconds = config.budget + time.monotonic() - pace.end
        tell(f"answering, view {max(map(len, result.candidates.values()))} of {views}")


def _solutions(
    solver: Solver, task: Task, best: Round, leave_one_out: float | None, config: SolveConfig
) -> list[Solution]:
    solutions = []
    for index, pair in enumerate(task.test):
        candidates = best.candidates.get((task.id, index), [])
        ranked = vote(candidates, config.seed)
        solutions.append(
            Solution(
                attempts(ranked, pair.input),
                evidence(ranked, len(candidates), leave_one_out),
                best.adaptation_steps,
                best.seconds,
                solver.row_of(task) is not None,
            )
        )
    return solutions


def _write(answered: dict[str, list[Solution]], tasks: list[Task], out: Path) -> None:
    content = submission({task: [s.attempts for s in found] for task, found in answered.items()})
    check_complete(content, [task.without_answers() for task in tasks])
    write_submission(out / "submission.json", content)


def _check_solver(solver: Solver) -> None:
    if not solver.has_trm:
        raise CheckpointError(
            f"{solver.name}: holds a reader and no TRM; give solve a checkpoint of a TRM (`arctrm "
            "eval` takes any checkpoint)"
        )
    config = solver.trm.config
    if config.layout != "compact" or config.task_embedding != "shared":
        raise CheckpointError(
            f"{solver.name}: trm.layout = {config.layout!r} with trm.task_embedding = "
            f"{config.task_embedding!r} cannot adapt to a task; solve needs layout 'compact' with "
            "'shared' embeddings (`arctrm eval` takes any checkpoint)"
        )


def describe(config: SolveConfig, target: str) -> Table:
    """What `solve` would run."""
    tasks = _load(config, target)
    solver = load_solver(config.checkpoint, config.inference, torch.device("cpu"))
    _check_solver(solver)
    table = Table(title="solve (dry run)", title_justify="left", show_header=False)
    table.add_row("checkpoint", escape(solver.name))
    table.add_row("tasks, test inputs", f"{len(tasks)}, {sum(len(t.test) for t in tasks)}")
    table.add_row("known to the model", str(sum(solver.row_of(t) is not None for t in tasks)))
    table.add_row("time at most", f"{len(tasks) * config.budget / 60:.1f} min")
    return table
