"""Small builders that tests of several rooms share."""

import numpy as np

from arctrm.data.parse import parse_grid
from arctrm.data.task import Grid, Pair, Task


def random_grid(rng: np.random.Generator, height: int, width: int) -> Grid:
    """A grid of random colours."""
    return rng.integers(0, 10, (height, width)).astype(np.uint8)


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
