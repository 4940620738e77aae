"""Scores by name, from ranked grids and answers: the only module that reads test outputs.

Nothing here knows a model; `score` could rate any solver. task_fraction is what the ARC Prize
scorer and TRM report: the mean over tasks of the share of a task's test pairs that are solved.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from arctrm.data.task import Grid, Task
from arctrm.errors import DataError

PASSES = (1, 2, 10)
"""Grids per test input among which the answer may be."""

ATTEMPTS = 2
"""Grids per test input that may be submitted."""

PassAt = dict[int, float]
"""Number of grids allowed -> score (0..1)."""

NAMED_SCORES = {
    "task_fraction": "mean over tasks of the share of test pairs solved",
    "pair_fraction": "share of all test pairs solved",
    "whole_task": "share of tasks with every test pair solved",
}


@dataclass(frozen=True)
class TaskScore:
    """One task: its scored test pairs, how many are solved in two attempts, and attempt_1."""

    id: str
    solved: int
    total: int
    shape: float
    """Share of test pairs (0..1) whose attempt_1 has the answer's size."""
    cells: float
    """Mean share of cells (0..1) that attempt_1 has right; 0 where the size is wrong."""


@dataclass(frozen=True)
class Scores:
    """The scores of one set of predictions, all between 0 and 1."""

    task_fraction: PassAt
    pair_fraction: PassAt
    whole_task: PassAt
    shape_accuracy: float
    """Mean over test pairs, attempt_1."""
    cell_accuracy: float
    """Mean over test pairs, attempt_1; 0 where the size is wrong."""
    num_tasks: int
    num_pairs: int
    num_unscored: int
    """Test pairs left out because their answer is not known."""
    tasks: tuple[TaskScore, ...]
    """One row per task, by id."""


@dataclass(frozen=True)
class _PairScore:
    rank: int | None
    shape: float
    cells: float

    def solved(self, allowed: int) -> bool:
        return self.rank is not None and self.rank < allowed


def answers(tasks: Iterable[Task]) -> dict[str, list[Grid | None]]:
    """Test outputs by task id, in the order of the test inputs; None where not known."""
    return {task.id: [pair.output for pair in task.test] for task in tasks}


def is_right(grid: Grid | None, answer: Grid | None) -> bool | None:
    """Whether `grid` equals `answer`; None if the answer is not known. Empty equals nothing."""
    if answer is None:
        return None
    if grid is None or grid.size == 0 or grid.shape != answer.shape:
        return False
    return bool((grid == answer).all())


def judge(
    attempts: Sequence[Sequence[Grid]], known: Sequence[Grid | None]
) -> list[tuple[bool | None, ...]]:
    """For each test input, whether each of its grids is right (None: answer not known)."""
    return [
        tuple(is_right(grid, answer) for grid in grids)
        for grids, answer in zip(attempts, known, strict=True)
    ]


def score(
    predictions: Mapping[str, Sequence[Sequence[Grid]]],
    answers: Mapping[str, Sequence[Grid | None]],
) -> Scores:
    """Score ranked grids (task id -> test input -> grids, best first) against the answers.

    Every test pair with a known answer counts: one without a prediction is wrong. Pairs without
    a known answer are left out and counted in `num_unscored`.

    Raises:
        DataError: no test pair has a known answer.
    """
    pairs_by_task = {
        task_id: _task_pairs(predictions.get(task_id, ()), known)
        for task_id, known in sorted(answers.items())
    }
    num_unscored = sum(grid is None for known in answers.values() for grid in known)
    scored = {task_id: pairs for task_id, pairs in pairs_by_task.items() if pairs}
    if not scored:
        raise DataError(
            f"nothing to score: {len(answers)} tasks, {num_unscored} test pairs, no known answer; "
            "give a solutions file or a test set with outputs"
        )
    return _aggregate(scored, num_unscored)


def scores_dict(scores: Scores, most: int = PASSES[-1]) -> dict[str, object]:
    """The scores as JSON-ready values, for `scores.json`; `most` grids were kept per test input."""
    named = {
        name: {f"pass@{k}": value for k, value in getattr(scores, name).items() if k <= most}
        for name in NAMED_SCORES
    }
    return named | {
        "shape_accuracy": scores.shape_accuracy,
        "cell_accuracy": scores.cell_accuracy,
        "num_tasks": scores.num_tasks,
        "num_pairs": scores.num_pairs,
        "num_unscored": scores.num_unscored,
        "tasks": {row.id: _row_dict(row) for row in scores.tasks},
    }


def scores_table(scores: Scores, most: int = PASSES[-1]) -> Table:
    """The scores by name, in percent: one column per number of grids allowed, up to `most`."""
    passes = [k for k in PASSES if k <= most]
    unscored = f", {scores.num_unscored} without a known answer" if scores.num_unscored else ""
    table = Table(title=f"{scores.num_tasks} tasks, {scores.num_pairs} test pairs{unscored}")
    table.add_column("score (%)")
    for k in passes:
        table.add_column(f"pass@{k}", justify="right")
    table.add_column("meaning", style="dim")
    for name, meaning in NAMED_SCORES.items():
        table.add_row(name, *(_percent(getattr(scores, name)[k]) for k in passes), meaning)
    empty = [""] * (len(passes) - 1)
    table.add_row("shape_accuracy", _percent(scores.shape_accuracy), *empty, "attempt_1 size right")
    table.add_row("cell_accuracy", _percent(scores.cell_accuracy), *empty, "attempt_1 cells right")
    return table


def comparison_table(rows: Mapping[str, Scores]) -> Table:
    """task_fraction of several rankings of the same tasks, in percent, one row each."""
    table = Table(title="ablations, task_fraction (%)")
    table.add_column("candidates of")
    for k in PASSES:
        table.add_column(f"pass@{k}", justify="right")
    table.add_column("shape", justify="right")
    for name, scores in rows.items():
        passes = (_percent(scores.task_fraction[k]) for k in PASSES)
        table.add_row(name, *passes, _percent(scores.shape_accuracy))
    return table


def task_table(scores: Scores) -> Table:
    """One row per task: test pairs solved in two attempts, size and cells of attempt_1."""
    table = Table(title="per task")
    table.add_column("task")
    for column in ("solved in two attempts", "shape (%)", "cells (%)"):
        table.add_column(column, justify="right")
    for row in scores.tasks:
        style = "green" if row.solved == row.total else None
        solved = f"{row.solved} of {row.total}"
        table.add_row(row.id, solved, _percent(row.shape), _percent(row.cells), style=style)
    return table


def _task_pairs(ranked: Sequence[Sequence[Grid]], known: Sequence[Grid | None]) -> list[_PairScore]:
    missing: list[Sequence[Grid]] = [()] * max(0, len(known) - len(ranked))
    proposals = [*ranked, *missing]
    return [
        _pair_score(grids, answer)
        for grids, answer in zip(proposals, known, strict=False)
        if answer is not None
    ]


def _pair_score(ranked: Sequence[Grid], answer: Grid) -> _PairScore:
    rank = next((i for i, grid in enumerate(ranked) if is_right(grid, answer)), None)
    first = ranked[0] if len(ranked) else None
    if first is None or first.size == 0 or first.shape != answer.shape:
        return _PairScore(rank, shape=0.0, cells=0.0)
    return _PairScore(rank, shape=1.0, cells=float((first == answer).mean()))


def _aggregate(scored: Mapping[str, list[_PairScore]], num_unscored: int) -> Scores:
    tasks = list(scored.values())
    pairs = [pair for task in tasks for pair in task]
    share = {k: [_mean(p.solved(k) for p in task) for task in tasks] for k in PASSES}
    return Scores(
        task_fraction={k: _mean(share[k]) for k in PASSES},
        pair_fraction={k: _mean(p.solved(k) for p in pairs) for k in PASSES},
        whole_task={k: _mean(s == 1 for s in share[k]) for k in PASSES},
        shape_accuracy=_mean(p.shape for p in pairs),
        cell_accuracy=_mean(p.cells for p in pairs),
        num_tasks=len(tasks),
        num_pairs=len(pairs),
        num_unscored=num_unscored,
        tasks=tuple(_task_score(task_id, task) for task_id, task in scored.items()),
    )


def _task_score(task_id: str, pairs: list[_PairScore]) -> TaskScore:
    return TaskScore(
        id=task_id,
        solved=sum(pair.solved(ATTEMPTS) for pair in pairs),
        total=len(pairs),
        shape=_mean(pair.shape for pair in pairs),
        cells=_mean(pair.cells for pair in pairs),
    )


def _row_dict(row: TaskScore) -> dict[str, float]:
    return {"solved": row.solved, "total": row.total, "shape": row.shape, "cells": row.cells}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
