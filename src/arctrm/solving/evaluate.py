"""`arctrm eval`: answer a test set with one checkpoint, vote, then score.

Answers are set aside before any model sees a task; only `arctrm.solving.scoring` reads them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from arctrm.config import BaselineConfig, EvalConfig, EvaluationConfig
from arctrm.console import console, note
from arctrm.data.overlap import check_demonstrations
from arctrm.data.sources import load_tasks
from arctrm.data.task import Grid, Task, held_out_ids
from arctrm.errors import ConfigError, DataError
from arctrm.solving import scoring
from arctrm.solving.adaptation import require_adaptable
from arctrm.solving.answering import say_what_is_unusual
from arctrm.solving.candidates import Key, require_test_inputs
from arctrm.solving.kept import KEPT, write_candidates
from arctrm.solving.parts import NO_ADAPTATION, NO_ENSEMBLE, rank_in_parts
from arctrm.solving.questions import weights_fingerprint
from arctrm.solving.side_by_side import Adapted, adapt
from arctrm.solving.submission import check_complete, submission, write_submission
from arctrm.solving.unfinished import EVERYTHING, Unfinished, open_unfinished
from arctrm.solving.vote import Ranked, attempts, submitted
from arctrm.solving.weights import Solver, load_solver
from arctrm.training.devices import new_accelerator
from arctrm.training.files import disk_errors, write_text_atomically
from arctrm.training.provenance import run_record, write_run_record

PASS_AT_MOST = 10
"""Ranked grids kept per test input."""


def run(config: EvalConfig, out: Path, resume: bool = False) -> scoring.Scores | None:
    """Write scores.json, submission.json and config.json to `out`; print the score table. With
    `resume`, answer what an interrupted evaluation has left.

    Returns the scores, or None where no answer is known (the submission is written all the same).

    Raises:
        UserError: tasks or checkpoint cannot be used, or `out` cannot be written.
        KeyboardInterrupt: when interrupted; says how much is kept.
    """
    accelerator = new_accelerator()
    tasks, known = load(config)
    # Every process reads what there is before any of them can write: all decide the same.
    unfinished = open_unfinished(out, config, tasks, resume)
    before = load_solver(config.checkpoint, config.inference, accelerator.device)
    _check(before, config)
    weights = weights_fingerprint(before.model)
    unfinished.check_weights(before.name, weights)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        open_folder(out, config)  # now, not after hours of answering
        unfinished.begin(config, before.name, weights)
        say_what_is_unusual(before, tasks, config, config.evaluation.adapts)
    adapted = adapt(before, tasks, config, accelerator) if config.evaluation.adapts else None
    solver = before if adapted is None else adapted.solver
    rows: dict[str, scoring.Scores] = {}
    with _saying_what_is_kept(unfinished, tasks, out):
        for row in rank_in_parts(solver, before, tasks, unfinished, config, accelerator):
            if not accelerator.is_main_process:
                continue
            ranked = unfinished.rows[row]
            if row == EVERYTHING:
                _submit(tasks, ranked, out)
                if config.evaluation.keep_candidates:
                    write_candidates(out / KEPT, tasks, ranked)
                seconds = unfinished.seconds(tasks)
                if adapted is not None:
                    seconds += adapted.seconds * accelerator.num_processes
                per_task = seconds / len(tasks)
                scores = _report(config, before, adapted, tasks, ranked, known, per_task, out)
                rows |= {} if scores is None else {EVERYTHING: scores}
            elif rows:
                rows[row] = scoring.score(_predictions(tasks, ranked), known)
                _write_ablations(rows, out)  # each as it comes: an interruption loses one
    accelerator.end_training()
    if accelerator.is_main_process:
        unfinished.finish(tasks)
        if len(rows) > 1:
            console().print(scoring.comparison_table(rows))
    return rows.get(EVERYTHING)


@contextmanager
def _saying_what_is_kept(unfinished: Unfinished, tasks: list[Task], out: Path) -> Iterator[None]:
    """Add to an interruption how many tasks are answered, where they are kept."""
    try:
        yield
    except KeyboardInterrupt:
        done = len(tasks) - len(unfinished.left(tasks, [EVERYTHING]))
        if unfinished.path is None or not done:
            raise
        raise KeyboardInterrupt(
            f"stopped after {done} of {len(tasks)} tasks, which are kept in {out}; go on with "
            "--resume"
        ) from None


def _submit(tasks: list[Task], ranked: dict[Key, list[Ranked]], out: Path) -> None:
    """Write submission.json: two grids for every test input."""
    content = submission(
        {
            task.id: [attempts(ranked[task.id, i], pair.input) for i, pair in enumerate(task.test)]
            for task in tasks
        }
    )
    check_complete(content, tasks)
    write_submission(out / "submission.json", content)


def _check(solver: Solver, config: EvalConfig) -> None:
    """Refuse, before the work, ablations of a model alone and what cannot be adapted."""
    names = [name for name in config.evaluation.ablate if name != NO_ADAPTATION]
    if config.evaluation.adapts:
        wanted = f"evaluation.{config.evaluation.adapted_for}"
        require_adaptable(solver, "adaptation", f"{wanted} here; leave it out to answer as it is")
    if names and solver.hybrid is None:
        raise ConfigError(
            f"evaluation.ablate = {names}: {solver.name} holds one model, so there is nothing to "
            "leave out; give a checkpoint of `arctrm joint`"
        )
    if NO_ENSEMBLE in names and not solver.ensemble:
        raise ConfigError(
            f"evaluation.ablate names {NO_ENSEMBLE!r}: {solver.name} holds one reader; leave that "
            "row out, or give a checkpoint with an ensemble (recipe.readers)"
        )


def _write_ablations(rows: dict[str, scoring.Scores], out: Path) -> None:
    """The rows so far as ablations.json."""
    content = {name: scoring.scores_dict(scores) for name, scores in rows.items()}
    write_text_atomically(out / "ablations.json", json.dumps(content, indent=1) + "\n")


def open_folder(out: Path, config: EvalConfig) -> None:
    """Begin a result folder: the record of this evaluation, and no older score beside it."""
    if (out / "checkpoints").is_dir():
        raise DataError(f"{out}: is the folder of a training run; choose another --out")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for older in ("scores.json", "ablations.json", KEPT):
            (out / older).unlink(missing_ok=True)
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
    if chosen.held_out:
        ids = held_out_ids((task.id for task in tasks), chosen.held_out)
        tasks = [task for task in tasks if task.id in ids]
    tasks = tasks[: chosen.max_tasks]
    require_test_inputs(tasks, chosen.test_set)
    if isinstance(chosen, EvaluationConfig) and chosen.adapts:
        check_demonstrations(tasks, chosen.test_set)
    return [task.without_answers() for task in tasks], scoring.answers(tasks)


def _report(
    config: EvalConfig,
    solver: Solver,
    adapted: Adapted | None,
    tasks: list[Task],
    ranked: dict[Key, list[Ranked]],
    known: dict[str, list[Grid | None]],
    gpu_seconds: float,
    out: Path,
) -> scoring.Scores | None:
    if not any(answer is not None for grids in known.values() for answer in grids):
        written = escape(str(out / "submission.json"))
        note(f"no answers are known: {written} is written, nothing is scored")
        return None
    scores = scoring.score(_predictions(tasks, ranked), known)
    content = {
        "checkpoint": solver.name,
        "views": config.inference.views,
        "steps": _steps(solver, config),
        "halt": config.inference.halt,
        "reader": config.reader.model_dump() if solver.reader is not None else None,
        "readers": len(solver.readers),
        "adaptation": None if adapted is None else adapted.record(),
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


def _predictions(tasks: list[Task], ranked: dict[Key, list[Ranked]]) -> dict[str, list[list[Grid]]]:
    """What is scored: the grids that `_submit` writes, and those that come after them."""
    return {
        task.id: [
            submitted([r.grid for r in ranked[task.id, index][:PASS_AT_MOST]], pair.input)
            for index, pair in enumerate(task.test)
        ]
        for task in tasks
    }


def describe(config: EvalConfig, out: Path, resume: bool = False) -> Table:
    """What `eval` would run in the folder `out`."""
    tasks, known = load(config)
    unfinished = open_unfinished(out, config, tasks, resume)
    solver = load_solver(config.checkpoint, config.inference, torch.device("cpu"))
    _check(solver, config)
    inputs = sum(len(task.test) for task in tasks)
    table = Table(title="eval (dry run)", title_justify="left", show_header=False)
    table.add_row("checkpoint", escape(solver.name))
    table.add_row("tasks, test inputs", f"{len(tasks)}, {inputs}")
    if resume:
        left = len(unfinished.left(tasks, [EVERYTHING]))
        table.add_row("answered before", str(len(tasks) - left))
    table.add_row("in the id map", str(sum(solver.row_of(task) is not None for task in tasks)))
    table.add_row("answers known", str(sum(a is not None for g in known.values() for a in g)))
    views, steps = config.inference.views, _steps(solver, config)
    table.add_row("queries", f"{inputs * views:,} ({views} views)")
    if steps is not None:
        at_most = "at most " if config.inference.halt else ""
        table.add_row("supervision steps", f"{at_most}{steps}")
    if config.evaluation.adapts:
        demonstrations = sum(len(task.demonstrations) for task in tasks)
        how = f"{config.evaluation.adapted_for}, {demonstrations:,} demonstrations"
        table.add_row("adapted to before", how)
    return table


def _steps(solver: Solver, config: EvalConfig) -> int | None:
    """Supervision steps of TRM, where there is one."""
    if not solver.has_trm:
        return None
    return config.inference.steps or solver.trm.config.halt_max_steps
