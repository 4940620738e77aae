"""Scores by name, from ranked grids and answers: the only module that reads test outputs.

Nothing here knows a model; `score` could rate any solver. task_fraction is what the ARC Prize
scorer and TRM report: the mean over tasks of the share of a task's test pairs that are solved.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf

import numpy as np
from rich.table import Table

from arctrm.data.task import Grid, Task
from arctrm.errors import DataError

PASSES, ATTEMPTS = (1, 2, 10), 2  # grids per test input: scored, and submitted
NAMED_SCORES = {
    "task_fraction": "mean over tasks of the share of test pairs solved",
    "pair_fraction": "share of all test pairs solved",
    "whole_task": "share of tasks with every test pair solved",
}
Verdicts = Sequence[Sequence[bool | None]]  # test input -> grid -> right; None: not known
# Task id -> test outputs in the order of the test inputs; None where not known.
Answers = Mapping[str, Sequence[Grid | None]]


@dataclass(frozen=True)
class TaskScore:
    """One task."""

    solved: int  # test pairs, in two attempts
    total: int  # scored test pairs
    shape: float  # share of right sizes of attempt_1
    cells: float  # mean share of right cells of attempt_1; 0 where the size is wrong


@dataclass(frozen=True)
class Scores:
    """The scores of one set of predictions, all between 0 and 1."""

    task_fraction: dict[int, float]  # number of grids allowed -> score; so are the next two
    pair_fraction: dict[int, float]
    whole_task: dict[int, float]
    shape_accuracy: float  # mean over test pairs, attempt_1; so is the next one
    cell_accuracy: float
    num_tasks: int
    num_pairs: int
    num_unscored: int  # test pairs left out because their answer is not known
    tasks: dict[str, TaskScore]


def answers(tasks: Iterable[Task]) -> dict[str, list[Grid | None]]:
    """Test outputs by task id, in the order of the test inputs; None where not known."""
    return {task.id: [pair.output for pair in task.test] for task in tasks}


def num_known(known: Answers) -> int:
    """Test pairs with a known answer."""
    return sum(answer is not None for own in known.values() for answer in own)


def is_right(grid: Grid | None, answer: Grid | None) -> bool | None:
    """Whether `grid` equals `answer`; None if the answer is not known. Empty equals nothing."""
    if answer is None:
        return None
    return grid is not None and grid.size > 0 and np.array_equal(grid, answer)


def verdicts(attempts: Sequence[Sequence[Grid]], known: Sequence[Grid | None]) -> Verdicts:
    """For each test input, whether each of its grids is right (None: answer not known)."""
    both = zip(attempts, known, strict=True)
    return [tuple(is_right(grid, answer) for grid in grids) for grids, answer in both]


def score(predictions: Mapping[str, Sequence[Sequence[Grid]]], known: Answers) -> Scores:
    """Score ranked grids (task id -> test input -> grids, best first) against the answers."""
    scored: dict[str, list[tuple[float, float, float]]] = {}
    for name, own in sorted(known.items()):
        ranked = [*predictions.get(name, ()), *([()] * len(own))]
        both = zip(ranked, own, strict=False)
        if any(answer is not None for answer in own):
            scored[name] = [_pair_score(grids, right) for grids, right in both if right is not None]
    num_unscored = sum(map(len, known.values())) - num_known(known)
    if not scored:
        raise DataError("nothing to score: no answer is known; give a solutions file")
    pairs = [pair for own in scored.values() for pair in own]
    share = {k: [_mean(rank < k for rank, *_ in own) for own in scored.values()] for k in PASSES}
    return Scores(
        task_fraction={k: _mean(share[k]) for k in PASSES},
        pair_fraction={k: _mean(rank < k for rank, *_ in pairs) for k in PASSES},
        whole_task={k: _mean(s == 1 for s in share[k]) for k in PASSES},
        shape_accuracy=_mean(shape for _, shape, _ in pairs),
        cell_accuracy=_mean(cells for *_, cells in pairs),
        num_tasks=len(scored),
        num_pairs=len(pairs),
        num_unscored=num_unscored,
        tasks={name: _task_score(own) for name, own in scored.items()},
    )


def _pair_score(ranked: Sequence[Grid], answer: Grid) -> tuple[float, float, float]:
    """Place of the answer; of the first grid whether the size is right, and the share of cells."""
    rank = next((i for i, grid in enumerate(ranked) if is_right(grid, answer)), inf)
    if not len(ranked) or not ranked[0].size or ranked[0].shape != answer.shape:
        return rank, 0.0, 0.0
    return rank, 1.0, float((ranked[0] == answer).mean())


def _task_score(pairs: Sequence[tuple[float, float, float]]) -> TaskScore:
    ranks, shapes, cells = zip(*pairs, strict=True)
    solved = sum(rank < ATTEMPTS for rank in ranks)
    return TaskScore(solved, len(pairs), _mean(shapes), _mean(cells))


def scores_dict(scores: Scores, most: int = PASSES[-1]) -> dict[str, object]:
    """The scores as JSON-ready values, for `scores.json`; `most` grids were kept per test input."""
    content = asdict(scores)
    for name in NAMED_SCORES:
        content[name] = {f"pass@{k}": v for k, v in content[name].items() if k <= most}
    return content


def scores_table(scores: Scores, most: int = PASSES[-1]) -> Table:
    """The scores by name, in percent: one column per number of grids allowed, up to `most`."""
    passes = [k for k in PASSES if k <= most]
    unscored = f", {scores.num_unscored} without a known answer" if scores.num_unscored else ""
    title = f"{scores.num_tasks} tasks, {scores.num_pairs} test pairs{unscored}"
    table = _table(title, "score (%)", *(f"pass@{k}" for k in passes))
    table.add_column("meaning", style="dim")
    for name, meaning in NAMED_SCORES.items():
        table.add_row(name, *(_percent(getattr(scores, name)[k]) for k in passes), meaning)
    for name, what in (("shape", "size"), ("cell", "cells")):
        cells = [_percent(getattr(scores, f"{name}_accuracy")), *[""] * (len(passes) - 1)]
        table.add_row(f"{name}_accuracy", *cells, f"attempt_1 {what} right")
    return table


def comparison_table(rows: Mapping[str, Scores]) -> Table:
    """task_fraction of several rankings of the same tasks, in percent, one row each."""
    passes = (f"pass@{k}" for k in PASSES)
    table = _table("ablations, task_fraction (%)", "candidates of", *passes, "shape")
    for name, scores in rows.items():
        found = (*(scores.task_fraction[k] for k in PASSES), scores.shape_accuracy)
        table.add_row(name, *map(_percent, found))
    return table


def task_table(scores: Scores) -> Table:
    """One row per task: test pairs solved in two attempts, size and cells of attempt_1."""
    table = _table("per task", "task", "solved in two attempts", "shape (%)", "cells (%)")
    for name, own in scores.tasks.items():
        style = "green" if own.solved == own.total else None
        solved = f"{own.solved} of {own.total}"
        table.add_row(name, solved, _percent(own.shape), _percent(own.cells), style=style)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
