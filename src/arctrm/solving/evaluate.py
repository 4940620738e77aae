"""`arctrm eval`: answer a test set with one checkpoint, vote, then score.

Answers are set aside before any model sees a task; only `arctrm.solving.scoring` reads them.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arctrm.config import BaselineConfig, EvalConfig
from arctrm.console import console, note, progress_console
from arctrm.data.sources import load_tasks
from arctrm.data.task import Grid, Task
from arctrm.errors import DataError
from arctrm.solving import scoring
from arctrm.solving.candidates import Key, answer, by_key, require_test_inputs, task_queries
from arctrm.solving.reading import judge, read, reranked, task_readings, to_judge
from arctrm.solving.submission import check_complete, submission, write_submission
from arctrm.solving.vote import Candidate, Ranked, attempts, vote
from arctrm.solving.weights import Solver, load_solver
from arctrm.training.devices import new_accelerator
from arctrm.training.files import disk_errors, write_text_atomically
from arctrm.training.provenance import run_record, write_run_record

PASS_AT_MOST = 10
"""Ranked grids kept per test input."""


def run(config: EvalConfig, out: Path) -> scoring.Scores | None:
    """Write scores.json, submission.json and config.json to `out`; print the score table.

    Returns the scores, or None where no answer is known (the submission is written all the same).

    Raises:
        UserError: tasks or checkpoint cannot be used, or `out` cannot be written.

    """
    accelerator = new_accelerator()
    tasks, known = load(config)
    solver = load_solver(config.checkpoint, config.inference, accelerator.device)
    if accelerator.is_main_process:
        _open_folder(out, config)  # now, not after hours of answering
    begin = time.monotonic()
    found = answer_all(solver, tasks, config, accelerator)
    ranked = rank_all(solver, tasks, found, config, accelerator)
    seconds = time.monotonic() - begin
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    content = submission(
        {
            task.id: [attempts(ranked[task.id, i], pair.input) for i, pair in enumerate(task.test)]
            for task in tasks
        }
    )
    check_complete(content, tasks)
    write_submission(out / "submission.json", content)
    gpu_seconds = seconds * accelerator.num_processes / len(tasks)
    return _report(config, solver, tasks, ranked, known, gpu_seconds, out)


def _open_folder(out: Path, config: EvalConfig) -> None:
    """Begin a result folder: the record of this evaluation, and no older score beside it."""
    if (out / "checkpoints").is_dir():
        raise DataError(f"{out}: is the folder of a training run; choose another --out")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "scores.json").unlink(missing_ok=True)
    write_run_record(out, run_record(config))


def load(config: EvalConfig | BaselineConfig) -> tuple[list[Task], dict[str, list[Grid | None]]]:
    """Tasks without answers, and the answers apart."""
    chosen = config.evaluation
    solutions = Path(chosen.solutions) if chosen.solutions else None
    tasks = load_tasks(chosen.test_set, solutions=solutions)
    unknown = set(chosen.tasks) - {task.id for task in tasks}
    if unknown:
        raise DataError(
            f"evaluation.tasks names {sorted(unknown)[0]!r}, which is not in {chosen.test_set}; "
            "give ids of that set, or none for all"
        )
    if chosen.tasks:
        tasks = [task for task in tasks if task.id in chosen.tasks]
    tasks = tasks[: chosen.max_tasks]
    require_test_inputs(tasks, chosen.test_set)
    return [task.without_answers() for task in tasks], scoring.answers(tasks)


def answer_all(
    solver: Solver, tasks: list[Task], config: EvalConfig, accelerator: Accelerator
) -> dict[Key, list[Candidate]]:
    """Candidates of every test input, the views split over the processes."""
    views, seed, found = config.inference.views, config.seed, []
    if accelerator.is_main_process:
        say_what_is_unusual(solver, tasks, config)
    if solver.has_trm:
        queries = [q for task in tasks for q in task_queries(solver, task, views, seed)]
        asked: Work = lambda own, told: answer(solver, own, config.inference, told)
        found += _spread("answering", asked, queries, accelerator)
    if solver.reader is not None:
        readings = [r for task in tasks for r in task_readings(solver, task, views, seed)]
        reader = solver.reader
        asked = lambda own, told: read(reader, own, config.reader, told)
        found += _spread("reading", asked, readings, accelerator)
    return by_key(found)


Work = Callable[[list, Callable[[int], None]], list]
"""(items, told how many are done) -> results."""


def _spread(what: str, work: Work, items: list, accelerator: Accelerator) -> list:
    """Results of all items, split over the processes, with a progress bar on the main one."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not accelerator.is_main_process
    with (
        accelerator.split_between_processes(items) as mine,
        Progress(*columns, console=progress_console(), disable=hidden) as progress,
    ):
        bar = progress.add_task("", total=len(mine))
        found = work(mine, lambda done: progress.advance(bar, done))
    return gather_object(found) if accelerator.num_processes > 1 else found


def rank_all(
    solver: Solver,
    tasks: list[Task],
    found: dict[Key, list[Candidate]],
    config: EvalConfig,
    accelerator: Accelerator,
) -> dict[Key, list[Ranked]]:
    """Each test input's grids, best first: by votes, or by the reader's log-probability."""
    ranked = rank(tasks, found, config.seed)
    reader, decoding = solver.reader, config.reader
    if reader is None or decoding.rank == "votes":
        return ranked
    grids, views = to_judge(ranked, decoding), decoding.scoring_views
    readings = [r for task in tasks for r in task_readings(solver, task, views, config.seed)]
    asked: Work = lambda own, told: judge(reader, own, grids, decoding, told)
    return reranked(ranked, _spread("scoring", asked, readings, accelerator))


def say_what_is_unusual(
    solver: Solver, tasks: list[Task], config: EvalConfig | BaselineConfig
) -> None:
    """Note tasks that the checkpoint does not know, and those it may know too well."""
    known = sum(solver.row_of(task) is not None for task in tasks)
    if known < len(tasks):
        how = "not answered" if solver.views else "answered from the mean embedding"
        note(f"{len(tasks) - known} of {len(tasks)} tasks are not in the id map: {how}")
    if known and solver.test_set not in (None, config.evaluation.test_set):
        note(
            f"the checkpoint kept the test pairs of {solver.test_set} out of training, not those "
            f"of {config.evaluation.test_set}: {known} tasks may be scored on pairs it has seen"
        )


def rank(
    tasks: list[Task], found: dict[Key, list[Candidate]], seed: int
) -> dict[Key, list[Ranked]]:
    """The vote of every test input, best first."""
    keys = [(task.id, index) for task in tasks for index in range(len(task.test))]
    return {key: vote(found.get(key, []), seed) for key in keys}


def _report(
    config: EvalConfig,
    solver: Solver,
    tasks: list[Task],
    ranked: dict[Key, list[Ranked]],
    known: dict[str, list[Grid | None]],
    gpu_seconds: float,
    out: Path,
) -> scoring.Scores | None:
    predictions = {
        task.id: [
            [r.grid for r in ranked[task.id, index][:PASS_AT_MOST]]
            for index in range(len(task.test))
        ]
        for task in tasks
    }
    if not any(answer is not None for grids in known.values() for answer in grids):
        written = escape(str(out / "submission.json"))
        note(f"no answers are known: {written} is written, nothing is scored")
        return None
    scores = scoring.score(predictions, known)
    content = {
        "checkpoint": solver.name,
        "views": config.inference.views,
        "steps": _steps(solver, config),
        "reader": config.reader.model_dump() if solver.reader is not None else None,
        "blank_task_embedding": config.inference.blank_task_embedding,
        "seed": config.seed,
        "device": str(solver.device),
        "seconds_per_task": gpu_seconds,
        **scoring.scores_dict(scores),
    }
    write_text_atomically(out / "scores.json", json.dumps(content, indent=1) + "\n")
    console().print(scoring.task_table(scores))
    console().print(scoring.scores_table(scores))
    kind = "GPU" if solver.device.type == "cuda" else "CPU"
    note(f"{kind}-seconds per task: {gpu_seconds:.2f}; written to {escape(str(out))}")
    return scores


def describe(config: EvalConfig) -> Table:
    """What `eval` would run."""
    tasks, known = load(config)
    solver = load_solver(config.checkpoint, config.inference, torch.device("cpu"))
    inputs = sum(len(task.test) for task in tasks)
    table = Table(title="eval (dry run)", title_justify="left", show_header=False)
    table.add_row("checkpoint", escape(solver.name))
    table.add_row("tasks, test inputs", f"{len(tasks)}, {inputs}")
    table.add_row("in the id map", str(sum(solver.row_of(task) is not None for task in tasks)))
    table.add_row("answers known", str(sum(a is not None for g in known.values() for a in g)))
    views, steps = config.inference.views, _steps(solver, config)
    table.add_row("queries", f"{inputs * views:,} ({views} views)")
    if steps is not None:
        table.add_row("supervision steps", str(steps))
    return table


def _steps(solver: Solver, config: EvalConfig) -> int | None:
    """Supervision steps of TRM, where there is one."""
    if not solver.has_trm:
        return None
    return config.inference.steps or solver.trm.config.halt_max_steps
