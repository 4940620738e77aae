"""Small builders that tests of several rooms share."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from arctrm.data.parse import parse_grid
from arctrm.data.task import Grid, Pair, Task


def random_grid(rng: np.random.Generator, height: int, width: int) -> Grid:
    """A grid of random colours."""
    return rng.integers(0, 10, (height, width)).astype(np.uint8)


def grid(*rows: str | list[int]) -> Grid:
    """Rows of digits, or of numbers, as a grid."""
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


def random_task(
    rng: np.random.Generator, name: str = "task", pairs: int = 3, side: int = 4
) -> Task:
    """Demonstrations and one test pair: square grids, the output is the input mirrored."""

    def pair() -> Pair:
        grid = random_grid(rng, side, side)
        return Pair(grid, np.ascontiguousarray(grid[:, ::-1]))

    return Task(name, tuple(pair() for _ in range(pairs)), (pair(),))


def is_grid(grid: Grid) -> bool:
    """Whether this is a grid as ARC knows it."""
    return np.array_equal(parse_grid(grid.tolist(), "a grid"), grid)


def as_json(task: Task) -> dict[str, Any]:
    """A task as its file has it; outputs that it lacks are left out."""

    def pairs(own: Iterable[Pair]) -> list[dict[str, Any]]:
        shown = ({"input": pair.input, "output": pair.output} for pair in own)
        return [{k: g.tolist() for k, g in one.items() if g is not None} for one in shown]

    return {"train": pairs(task.demonstrations), "test": pairs(task.test)}


def write_tasks(folder: Path, tasks: Iterable[Task]) -> Path:
    """A folder with a file of each task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        (folder / f"{task.id}.json").write_text(json.dumps(as_json(task)))
    return folder
