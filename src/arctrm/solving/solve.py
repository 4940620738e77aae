"""`arctrm solve`: one task or many, each within a wall-clock budget, always two grids."""

from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from arctrm.config import SolveConfig
from arctrm.console import console, note
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task
from arctrm.planner.trace import attempts_table
from arctrm.solving import scoring
from arctrm.solving.adaptation import require_adaptable
from arctrm.solving.anytime import Interrupted, solve_task
from arctrm.solving.candidates import require_test_inputs
from arctrm.solving.planning import can_plan
from arctrm.solving.report import Solution, solution_report
from arctrm.solving.submission import check_complete, submission, write_submission
from arctrm.solving.weights import load_solver
from arctrm.training.files import disk_errors, write_text_atomically


def run(
    config: SolveConfig, target: str, out: Path | None, check: bool, trace: bool = False
) -> None:
    """Solve the tasks of `target`, print each, write submission.json to `out`.

    `check` says at the end whether the answers are right, where they are known; `trace` shows the
    planner's attempts.

    Raises:
        UserError: the target or the checkpoint cannot be used; with `keep_going` a bad task in a
            folder is reported instead.

    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks = _load(config, target)
    known = scoring.answers(tasks)
    solver = load_solver(config.checkpoint, config.inference, device)
    require_adaptable(solver, "solve", "`arctrm eval` takes any checkpoint")
    if trace and not can_plan(solver):
        note(escape(f"{solver.name} has no coupling of a reader and a TRM to plan with"))
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
        if trace and can_plan(solver):
            _show_attempts(solutions)
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


def _show_attempts(solutions: list[Solution]) -> None:
    for number, solution in enumerate(solutions, 1):
        if solution.history is None:
            note(f"test {number}: no attempt of the planner fitted into the budget")
        else:
            console().print(attempts_table(solution.history, f"test {number}: attempts"))


def _write(answered: dict[str, list[Solution]], tasks: list[Task], out: Path) -> None:
    content = submission({task: [s.attempts for s in found] for task, found in answered.items()})
    check_complete(content, [task.without_answers() for task in tasks])
    write_submission(out / "submission.json", content)


def describe(config: SolveConfig, target: str) -> Table:
    """What `solve` would run."""
    tasks = _load(config, target)
    solver = load_solver(config.checkpoint, config.inference, torch.device("cpu"))
    require_adaptable(solver, "solve", "`arctrm eval` takes any checkpoint")
    table = Table(title="solve (dry run)", title_justify="left", show_header=False)
    table.add_row("checkpoint", escape(solver.name))
    table.add_row("tasks, test inputs", f"{len(tasks)}, {sum(len(t.test) for t in tasks)}")
    table.add_row("known to the model", str(sum(solver.row_of(t) is not None for t in tasks)))
    table.add_row("time at most", f"{len(tasks) * config.budget / 60:.1f} min")
    return table
