"""The tasks of an evaluation, answered part by part, without and with each ablation."""

import time
from collections.abc import Iterator

from accelerate import Accelerator

from arctrm.config import EvalConfig
from arctrm.console import note
from arctrm.data.task import Task
from arctrm.solving.answering import Workers, answer_all, ask, rank_all
from arctrm.solving.unfinished import EVERYTHING, Unfinished
from arctrm.solving.weights import Solver

NO_ADAPTATION = "no-adaptation"
NO_ENSEMBLE = "no-ensemble"
PROMPTS_AT_ONCE = 64
"""Of a part: some batches of a CPU, or of a hub model."""


def rank_in_parts(
    solver: Solver,
    before: Solver,
    tasks: list[Task],
    unfinished: Unfinished,
    config: EvalConfig,
    accelerator: Accelerator,
) -> Iterator[str]:
    """Rank what is left of `tasks` into `unfinished`; the rows of the table of ablations, each as
    soon as all tasks are ranked for it.

    `before` is the solver before adaptation.
    """
    rows: list[str] = [EVERYTHING, *config.evaluation.ablate]
    ready = [row for row in rows if unfinished.has(row, tasks)]
    yield from ready
    parts = _parts(unfinished.left(tasks, rows), solver, config)
    workers = Workers(accelerator, in_parts=len(parts) > 1)
    for part in parts:
        begin, asked = time.monotonic(), ask(solver, part, config, workers)
        for row in rows:
            if unfinished.has(row, part):
                continue
            who, what, ablation = solver, asked, None if row == EVERYTHING else row
            if ablation is not None and not workers.in_parts and accelerator.is_main_process:
                note(f"ablation {row}")
            if row == NO_ADAPTATION:
                who, what = before, ask(before, part, config, workers)
            elif row == NO_ENSEMBLE:
                who = solver.without_ensemble()
            found = answer_all(who, what, config, workers, ablation)
            ranked = rank_all(who, part, found, config, workers, ablation)
            seconds = (time.monotonic() - begin) * accelerator.num_processes
            unfinished.add(row, part, ranked, seconds, write=accelerator.is_main_process)
            if row not in ready and unfinished.has(row, tasks):
                ready.append(row)
                yield row
        if workers.in_parts and accelerator.is_main_process:
            left = len(unfinished.left(tasks, rows))
            note(f"answered: {len(tasks) - left} of {len(tasks)} tasks")


def _parts(tasks: list[Task], solver: Solver, config: EvalConfig) -> list[list[Task]]:
    """Tasks that are answered together, one part after another.

    All of them at once where that is quick, on a GPU with models of our own, and where each task
    needs another one beside it (swap-context). Else some prompts at a time, the largest test inputs
    first: what does not fit into memory should say so at once.
    """
    quick = solver.device.type == "cuda" and solver.hub is None
    if quick or "swap-context" in config.evaluation.ablate:
        return [tasks] if tasks else []
    size = max(1, PROMPTS_AT_ONCE // config.inference.views)
    ordered = sorted(tasks, key=_num_cells, reverse=True)
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _num_cells(task: Task) -> int:
    return sum(pair.input.size for pair in task.test)
