"""`arctrm solve`: the tasks of a file or folder, one after another."""

from collections.abc import Sequence

import torch

from arctrm.config import SolveConfig
from arctrm.console import console, note, plain, progress_console
from arctrm.data.sources import load_tasks
from arctrm.solve import scoring
from arctrm.solve.adapt import require_adaptable
from arctrm.solve.questions import Key, keys_of, require_test_inputs
from arctrm.solve.rank import Ranked
from arctrm.solve.report import dry_run_table, progress_bar, solution_json, solution_report
from arctrm.solve.results import write_submission
from arctrm.solve.solution import Answer, Solution
from arctrm.solve.solve import Stopped, solve_task
from arctrm.solve.weights import load_solver


def solve(
    config: SolveConfig,
    target: str,
    *,
    check: bool = False,
    verbose: bool = False,
    json: bool = False,
    dry_run: bool = False,
) -> None:
    """Solve the tasks of `target`, print each, write submission.json to `config.out`, if any; what
    is answered before Ctrl-C is written.

    `check` says whether the answers are right, where they are known; `verbose` adds the numbers and
    the planner's attempts; `json` prints a line of JSON for each task, and all else to stderr;
    `dry_run` only says what would be done. With `keep_going` a bad task of a folder is
    reported and left out, and one that fails is answered by its inputs.
    """
    say = (progress_console() if json else console()).print
    left_out = (lambda error: note(plain(f"left out: {error}"))) if config.keep_going else None
    tasks = load_tasks(target, on_error=left_out)
    require_test_inputs(tasks, target)
    known, out = scoring.answers(tasks), config.out
    device = torch.device("cuda" if torch.cuda.is_available() and not dry_run else "cpu")
    solver = load_solver(config.checkpoint, config.inference, device)
    require_adaptable(solver, "solve", "`arctrm eval` takes any checkpoint")
    if dry_run:
        rows = {
            "checkpoint, voices": f"{solver.name}, {' and '.join(solver.voices)}",
            "tasks, test inputs": f"{len(tasks)}, {sum(len(task.test) for task in tasks)}",
            "known to the model": sum(solver.row_of(task) is not None for task in tasks),
            "time at most": f"{len(tasks) * config.budget / 60:.1f} min",
        }
        return say(dry_run_table("solve", rows))
    ranked: dict[Key, Sequence[Ranked]] = {}
    right: list[bool] = []
    for number, task in enumerate(tasks, 1):
        if len(tasks) > 1:
            note(plain(f"task {number} of {len(tasks)}: {task.id}"))
        stop: Stopped | None = None
        try:
            with progress_bar(config.budget) as on_progress:
                solution = solve_task(solver, task, config, on_progress)
        except Stopped as error:
            solution, stop = error.solution, error
        except Exception as error:
            if len(tasks) == 1 or not config.keep_going:
                raise
            said = f"{task.id}: failed ({type(error).__name__}: {error}); its inputs are submitted"
            note(plain(said))
            answers = tuple(Answer(pair.input) for pair in task.test)
            solution = Solution(task.without_answers(), answers)
        ranked |= zip(keys_of([task]), solution.candidates, strict=True)
        correct = None
        if check:
            correct = scoring.verdicts(solution.attempts, known[task.id])
            right += [any(own) for own in correct if None not in own]
        if json:
            print(solution_json(solution, correct), flush=True)
        else:
            say(solution_report(solution, correct, verbose=verbose))
        if out is not None:  # after every task, so that an interrupt loses none
            write_submission(out, tasks[:number], ranked)
        if stop is not None:
            raise stop
    if check:
        told = f"{sum(right)} of {len(right)} test inputs with a known answer solved"
        say(told if right else "no answer is known, so nothing is checked")
