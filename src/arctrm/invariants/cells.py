"""Rules for single cells: where all demonstrations agree that what stands around a cell of the
input says what becomes of it, a grid that says otherwise is likely to be wrong.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from arctrm.data.task import Grid
from arctrm.invariants.components import enclosed
from arctrm.invariants.properties import Side

OUTSIDE = 10
"""Stands for cells beyond the edge."""
Table = dict[Hashable, int]
"""The colour of the output's cell, by what was seen in the input."""


def tables(demonstrations: Sequence[tuple[Side, Side]]) -> dict[str, Table]:
    """For every kind of surroundings that says the same in all demonstrations, what it says. None
    where inputs and outputs differ in size.
    """
    if any(given.grid.shape != made.grid.shape for given, made in demonstrations):
        return {}
    found: dict[str, Table] = {}
    torn: set[str] = set()
    for given, made in demonstrations:
        colours = made.grid.ravel().tolist()
        for name, seen in surroundings(given):
            if name not in torn and not _learn(found.setdefault(name, {}), seen, colours):
                torn.add(name)
    return {name: table for name, table in found.items() if name not in torn}


def contradicted(known: dict[str, Table], given: Side, made: Side) -> Iterator[str]:
    """Names of the tables that an output contradicts in some cell."""
    if not known or given.grid.shape != made.grid.shape:
        return
    colours = made.grid.ravel().tolist()
    for name, seen in surroundings(given):
        table = known.get(name)
        if table is None:
            continue
        if any(table.get(one, colour) != colour for one, colour in zip(seen, colours, strict=True)):
            yield name


def _learn(table: Table, seen: Iterable[Hashable], colours: Iterable[int]) -> bool:
    """Add what cells say; whether they agree."""
    return all(
        table.setdefault(one, colour) == colour for one, colour in zip(seen, colours, strict=True)
    )


def surroundings(given: Side) -> Iterator[tuple[str, Sequence[Hashable]]]:
    """Names of the kinds, and what is seen so from every cell of the input, row by row."""
    grid = given.grid
    width = grid.shape[1]
    near, far = _windows(grid, 1), _windows(grid, 2)
    cells = grid.ravel().tolist()
    yield "the eight cells around", [row.tobytes() for row in near]
    yield "the cells around, two deep", [row.tobytes() for row in far]
    yield "the four cells around", [row.tobytes() for row in near[:, [1, 3, 4, 5, 7]].copy()]
    own = np.concatenate([near[:, 4:5], np.sort(near, axis=1)], axis=1)
    yield "what is around, in any order", [row.tobytes() for row in own]
    objects, pieces = given.objects, given.pieces
    yield "size of the object", _pairs(cells, _size_of(objects))
    yield "size of the piece", _pairs(cells, _size_of(pieces))
    yield "rank of the object", _pairs(cells, _rank_of(objects))
    yield "enclosed or not", _pairs(cells, enclosed(grid, given.empty))
    mirrored = np.stack([grid, grid[::-1], grid[:, ::-1], grid[::-1, ::-1]], axis=-1)
    yield "the mirrored cells", [row.tobytes() for row in mirrored.reshape(-1, 4).copy()]
    rows = [bytes(sorted(set(row))) for row in grid.tolist()]
    columns = [bytes(sorted(set(column))) for column in grid.T.tolist()]
    yield "colours of the row", [(c, rows[i // width]) for i, c in enumerate(cells)]
    yield "colours of the column", [(c, columns[i % width]) for i, c in enumerate(cells)]
    both = [(c, rows[i // width], columns[i % width]) for i, c in enumerate(cells)]
    yield "colours of row and column", both
    yield "odd or even", [(c, i // width % 2, i % width % 2) for i, c in enumerate(cells)]
    yield "the place", [(c, i // width, i % width) for i, c in enumerate(cells)]


def _windows(grid: Grid, radius: int) -> np.ndarray:
    """The cells around every cell, itself in the middle, [H x W, (2 x radius + 1) squared]."""
    around = np.pad(grid, radius, constant_values=OUTSIDE)
    side = 2 * radius + 1
    windows = np.lib.stride_tricks.sliding_window_view(around, (side, side))
    return windows.reshape(grid.size, side * side).copy()


def _pairs(cells: list[int], values: np.ndarray) -> Sequence[Hashable]:
    return list(zip(cells, values.ravel().tolist(), strict=True))


def _size_of(numbers: np.ndarray) -> np.ndarray:
    """Of the component that each cell belongs to; 0 for the background."""
    sizes = np.bincount(numbers.ravel())
    sizes[0] = 0
    return sizes[numbers]


def _rank_of(numbers: np.ndarray) -> np.ndarray:
    """How many components are larger than that of each cell, from 1; 0 for the background."""
    sizes = np.bincount(numbers.ravel())[1:]
    larger = (sizes[None] > sizes[:, None]).sum(1) + 1
    return np.concatenate([[0], larger])[numbers]
