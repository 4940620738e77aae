"""The invariants of a task: what all its demonstrations share, and what a candidate breaks of it.

A broken invariant has a weight in nats, by its name: the logarithm of how much oftener wrong
candidates break it than right answers do, where all demonstrations keep it.
`benchmarks/invariant_weights.py` counts them on ARC-AGI-1 training tasks and writes `weights.json`.
(The idea is that of version spaces: Mitchell 1982, "Generalization as search".)
"""

import json
from collections.abc import Hashable, Iterator, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from arctrm.data.task import Grid, Pair, Task, grid_key, pair_key
from arctrm.invariants.properties import Side, cells_against, properties

COPY = "copy of the input"
"""Name of what a candidate breaks that equals its input, where no demonstration leaves it as it is.
A rule of its own: it is not among the counted weights."""
COPY_NATS = 10.0  # no right answer of ARC-AGI-1's training tasks breaks it

Table = dict[Hashable, int]  # the colour of the output's cell, by what was seen in the input


def broken(task: Task, given: Grid, grid: Grid) -> list[tuple[str, float]]:
    """What `grid` breaks as the answer to the input `given`: (name, nats), heaviest first."""
    names = _of(tuple(map(pair_key, task.demonstrations))).broken(given, grid)
    found = [(name, weights().get(name, 0.0)) for name in names]
    if np.array_equal(given, grid) and changes(task):
        found.append((COPY, COPY_NATS))
    return sorted(found, key=lambda item: (-item[1], item[0]))


def broken_cells(task: Task, given: Grid, grid: Grid) -> dict[str, np.ndarray]:
    """The cells, bool [H, W], that break what `broken` names, where that is about cells."""
    return _of(tuple(map(pair_key, task.demonstrations))).where(given, grid)


def changes(task: Task) -> bool:
    """Whether the output differs from the input in every demonstration (and there is one)."""
    pairs = [(grid_key(pair.input), grid_key(pair.output)) for pair in task.demonstrations]
    return bool(pairs) and all(given != made for given, made in pairs)


@cache
def weights() -> dict[str, float]:
    """Nats of each invariant that is worth something, by name."""
    text = files("arctrm.invariants").joinpath("weights.json").read_text(encoding="utf-8")
    return json.loads(text)["weights"]


class Invariants:
    """What all `demonstrations` share; nothing where there are none."""

    def __init__(self, demonstrations: Sequence[Pair]):
        known = [(Side(p.input), Side(p.output)) for p in demonstrations if p.output is not None]
        found = [properties(*both) for both in known]
        self._shared = {
            key: value
            for key, value in (found[0] if found else {}).items()
            if value is not False and all(own.get(key) == value for own in found)
        }
        self._tables = _tables(known)
        self.names = frozenset(name for name, _ in self._shared) | frozenset(self._tables)
        self._inputs: dict[Hashable, tuple[Side, dict, dict[Hashable, frozenset[str]]]] = {}

    def broken(self, given: Grid, made: Grid) -> frozenset[str]:
        """Names of those that `made` breaks as the output of the input `given`."""
        if (key := grid_key(given)) not in self._inputs:
            side = Side(given)
            self._inputs[key] = side, dict(surroundings(side)) if self._tables else {}, {}
        before, seen, known = self._inputs[key]
        if (key := grid_key(made)) not in known:
            own = properties(before, Side(made))
            gone = {which[0] for which, value in self._shared.items() if own.get(which) != value}
            for name, table in self._tables.items() if given.shape == made.shape else ():
                cells = zip(seen[name], made.ravel().tolist(), strict=True)
                if any(table.get(one, colour) != colour for one, colour in cells):
                    gone.add(name)
            known[key] = frozenset(gone)
        return known[key]

    def where(self, given: Grid, made: Grid) -> dict[str, np.ndarray]:
        """The cells, bool [H, W], of `made` by the broken names that are about cells."""
        before, after = Side(given), Side(made)
        own, against = properties(before, after), cells_against(before, after)
        facts = [("colours of the output", made, np.full(made.shape, True))]
        if given.shape == made.shape:
            names = ("colours that change", given), ("colours they change to", made)
            facts += [(name, grid, given != made) for name, grid in names]
        for name, grid, cells in facts:
            colours: Any = self._shared.get((name, -1), frozenset())
            against[name, -1] = cells & ~np.isin(grid, sorted(colours))
        found: dict[str, np.ndarray] = {}
        for which, value in self._shared.items():
            if own.get(which) != value and which in against:
                found[which[0]] = found.get(which[0], False) | against[which]
        seen = dict(surroundings(before)) if given.shape == made.shape else {}
        for name, table in self._tables.items() if seen else ():
            both = zip(seen[name], made.ravel().tolist(), strict=True)
            found[name] = np.array([table.get(one, c) != c for one, c in both]).reshape(made.shape)
        return {name: cells for name, cells in found.items() if cells.any()}


@lru_cache(128)
def _of(demonstrations: tuple) -> Invariants:
    """The invariants of pairs, given as their keys."""
    grid = lambda shape, cells: np.frombuffer(cells, np.uint8).reshape(shape)
    return Invariants([Pair(*(grid(*side) for side in pair)) for pair in demonstrations])


def _tables(demonstrations: Sequence[tuple[Side, Side]]) -> dict[str, Table]:
    """Rules for single cells: for every kind of surroundings that says the same in all
    demonstrations, what becomes of such a cell. None where inputs and outputs differ in size.
    """
    found: dict[str, Table] = {}
    torn: set[str] = set()
    same_size = all(given.grid.shape == made.grid.shape for given, made in demonstrations)
    for given, made in demonstrations if same_size else ():
        colours = made.grid.ravel().tolist()
        for name, seen in surroundings(given):
            table, cells = found.setdefault(name, {}), zip(seen, colours, strict=True)
            if any(table.setdefault(one, colour) != colour for one, colour in cells):
                torn.add(name)
    return {name: table for name, table in found.items() if name not in torn}


def surroundings(given: Side) -> Iterator[tuple[str, Sequence[Hashable]]]:
    """Names of the kinds, and what is seen so from every cell of the input, row by row."""
    grid, width = given.grid, given.grid.shape[1]
    near, far = _windows(grid, 1), _windows(grid, 2)
    cells = grid.ravel().tolist()
    with_cells = lambda values: list(zip(cells, values.ravel().tolist(), strict=True))
    yield "the eight cells around", [row.tobytes() for row in near]
    yield "the cells around, two deep", [row.tobytes() for row in far]
    yield "the four cells around", [row.tobytes() for row in near[:, [1, 3, 4, 5, 7]].copy()]
    own = np.concatenate([near[:, 4:5], np.sort(near, axis=1)], axis=1)
    yield "what is around, in any order", [row.tobytes() for row in own]
    # Of each cell's component: its number of cells, and how many components are larger, from 1.
    objects, pieces = (np.bincount(of.ravel()) for of in (given.objects, given.pieces))
    objects[0] = pieces[0] = 0  # the background
    yield "size of the object", with_cells(objects[given.objects])
    yield "size of the piece", with_cells(pieces[given.pieces])
    larger = (objects[None, 1:] > objects[1:, None]).sum(1) + 1
    yield "rank of the object", with_cells(np.concatenate([[0], larger])[given.objects])
    yield "enclosed or not", with_cells(given.enclosed)
    mirrored = np.stack([grid, grid[::-1], grid[:, ::-1], grid[::-1, ::-1]], axis=-1)
    yield "the mirrored cells", [row.tobytes() for row in mirrored.reshape(-1, 4).copy()]
    rows = [bytes(sorted(set(row))) for row in grid.tolist()]
    columns = [bytes(sorted(set(column))) for column in grid.T.tolist()]
    places = [(c, *divmod(i, width)) for i, c in enumerate(cells)]
    yield "colours of the row", [(c, rows[y]) for c, y, _ in places]
    yield "colours of the column", [(c, columns[x]) for c, _, x in places]
    yield "colours of row and column", [(c, rows[y], columns[x]) for c, y, x in places]
    yield "odd or even", [(c, y % 2, x % 2) for c, y, x in places]
    yield "the place", places


def _windows(grid: Grid, radius: int) -> np.ndarray:
    """The cells around every cell, itself in the middle, [H x W, (2 x radius + 1) squared]."""
    side = 2 * radius + 1
    around = np.pad(grid, radius, constant_values=10)  # stands for cells beyond the edge
    windows = np.lib.stride_tricks.sliding_window_view(around, (side, side))
    return windows.reshape(grid.size, side * side).copy()
