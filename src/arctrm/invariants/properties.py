"""Properties of an input and an output, by name, such as "same size" or "colours lost".

A property is a value. What is True, or the same fact, of all demonstrations of a task is likely to
be so of its test pair; how likely was counted (`invariants.task`). False says nothing. A name may
be there for several colours; it counts once.
"""

from collections.abc import Callable, Hashable, Iterator
from fractions import Fraction
from functools import cached_property

import numpy as np

from arctrm.data.task import NUM_COLOURS, Grid

Key = tuple[str, int]  # name of a property and the colour that it is about; -1: about none
Named = Iterator[tuple[str, Hashable]]
Cells = np.ndarray  # bool [H, W]
DIAGONAL = "mirrored diagonally"
PATTERNS: dict[str, Callable[[Grid], Grid]] = {
    "mirrored left to right": lambda grid: grid[:, ::-1],
    "mirrored top to bottom": lambda grid: grid[::-1],
    "turned by half": lambda grid: grid[::-1, ::-1],
    DIAGONAL: lambda grid: grid.T,
    "rows alike": lambda grid: grid[:1],
    "columns alike": lambda grid: grid[:, :1],
}
"""Name of a property -> what the output equals where it has it."""
ENCLOSED: Key = ("what is enclosed changes", -1)


class Side:
    """A grid and what is counted of it, once."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.counts: list[int] = np.bincount(grid.ravel(), minlength=NUM_COLOURS).tolist()
        """Cells of each colour."""
        self.colours = frozenset(c for c, count in enumerate(self.counts) if count)
        self.empty = self.counts.index(max(self.counts))  # the background: the commonest colour
        self.full: Cells = grid != self.empty

    @cached_property
    def objects(self) -> np.ndarray:
        """int64 [H, W]: components of whatever colours, connected by corners, too."""
        return components(self.grid, self.empty, corners=True, one_colour=False)

    @cached_property
    def pieces(self) -> np.ndarray:
        """int64 [H, W]: components of one colour, connected by sides."""
        return components(self.grid, self.empty, corners=False, one_colour=True)

    @cached_property
    def shapes(self) -> list[tuple[tuple[int, int], bytes, int]]:
        """Size, mask and colour of every component of one colour, connected by corners, too."""
        numbers = components(self.grid, self.empty, corners=True, one_colour=True)
        found = []
        for number in range(1, int(numbers.max(initial=0)) + 1):
            ys, xs = np.nonzero(numbers == number)
            box = numbers[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] == number
            found.append((box.shape, box.tobytes(), int(self.grid[ys[0], xs[0]])))
        return sorted(found)

    @cached_property
    def enclosed(self) -> Cells:
        """Background cells from which no way over sides leads out of the grid."""
        outside = np.pad(self.grid == self.empty, 1, constant_values=True)
        ways = components(outside, 0, corners=False, one_colour=True)
        return ((ways > 0) & (ways != ways[0, 0]))[1:-1, 1:-1]

    @cached_property
    def box(self) -> tuple[int, int, int, int] | None:
        """Top, bottom, left and right of what is not background."""
        ys, xs = np.nonzero(self.full)
        return (int(ys.min()), int(ys.max()), int(xs.min()), int(xs.max())) if len(ys) else None


def properties(given: Side, made: Side) -> dict[Key, Hashable]:
    """All properties of an input and an output."""
    parts = [_size, _colours, _pattern, _objects]
    parts += [_changes] if given.grid.shape == made.grid.shape else []
    found: dict[Key, Hashable] = {
        (name, -1): value for part in parts for name, value in part(given, made)
    }
    found |= {key: not cells.any() for key, cells in cells_against(given, made).items()}
    for name in PATTERNS:
        found[f"not {name}", -1] = not found.setdefault((name, -1), False)
    # What is not there is not kept.
    absent = [] if given.enclosed.any() else [ENCLOSED]
    for colour, there in enumerate(given.counts):
        what, now = _named(colour), made.counts[colour]
        found[f"{what} is there", colour] = bool(now)
        found[f"cells of {what}", colour] = bool(there) and there == now
        absent += [] if there else [(f"{what} {verb}", colour) for verb in ("stays", "goes")]
    found |= {key: False for key in absent if key in found}
    return {k: bool(v) if isinstance(v, np.bool_) else v for k, v in found.items()}


def cells_against(given: Side, made: Side) -> dict[Key, Cells]:
    """Of each property that the cells of the output keep one by one: those that break it."""
    before, after = given.grid, made.grid
    is_square, new = len(after) == len(after.T), ~np.isin(after, sorted(given.colours))
    found = {name: after != own(after) for name, own in PATTERNS.items() if name != DIAGONAL}
    found |= {"no new colour": new, **({DIAGONAL: after != after.T} if is_square else {})}
    of_colours = {(f"{_named(c)} is missing", c): after == c for c in range(NUM_COLOURS)}
    if before.shape == after.shape:
        changed, full, inside = before != after, given.full, given.enclosed
        edge = np.ones(after.shape, bool)
        edge[1:-1, 1:-1] = False
        rows, columns = full.any(1, keepdims=True), full.any(0, keepdims=True)
        found |= {
            "changes to colours of the input": changed & new,
            "what is filled stays": changed & full,
            "what is empty stays": ~full & (after != given.empty),
            "filled where it was": full != made.full,
            "the edge stays": changed & edge,
            "changes are enclosed": changed & ~inside,
            ENCLOSED[0]: inside & ~changed,
            "changes in rows of something": changed & ~rows,
            "changes in columns of something": changed & ~columns,
            "changes in line with something": changed & ~rows & ~columns,
        }
        for colour in range(NUM_COLOURS):
            what, was, becomes = _named(colour), before == colour, after == colour
            of_colours[f"{what} stays", colour] = was & ~becomes
            of_colours[f"{what} goes", colour] = was & becomes
            of_colours[f"{what} does not come", colour] = becomes & ~was
    return {(name, -1): cells for name, cells in found.items()} | of_colours


def _named(colour: int) -> str:
    """0, which mostly means nothing, has properties of its own."""
    return "black" if colour == 0 else "a colour"


def _or_not(name: str, value: Hashable) -> Named:
    yield name, value
    yield f"not {name}", not value


def _size(given: Side, made: Side) -> Named:
    (big_h, big_w), (h, w) = given.grid.shape, made.grid.shape
    yield "same size", (h, w) == (big_h, big_w)
    yield "same height", h == big_h
    yield "same width", w == big_w
    yield from _or_not("square", h == w)
    yield "smaller", h * w < big_h * big_w
    yield "larger", h * w > big_h * big_w
    yield "height by height", Fraction(h, big_h)
    yield "width by width", Fraction(w, big_w)
    yield "height", h
    yield "width", w
    if given.box is not None:
        top, bottom, left, right = given.box
        yield "size of what there is", (h, w) == (bottom - top + 1, right - left + 1)


def _colours(given: Side, made: Side) -> Named:
    before, after = given.colours, made.colours
    yield "no colour lost", before <= after
    yield "same colours", before == after
    yield "not the same colours", before != after
    yield "colours of the output", after
    yield "new colours", after - before
    yield "lost colours", before - after
    yield "number of colours", len(after)
    yield "more or fewer colours", len(after) - len(before)
    yield "more than one colour", len(after) > 1
    yield "background", made.empty
    yield "same background", made.empty == given.empty
    filled_before, filled = int(given.full.sum()), int(made.full.sum())
    yield "cells of each colour", given.counts == made.counts
    yield "cells filled", filled_before == filled
    yield "more cells filled", filled > filled_before
    yield "fewer cells filled", filled < filled_before


def _pattern(given: Side, made: Side) -> Named:
    grid = made.grid
    yield from _or_not("periodic downwards", _period(grid) <= len(grid) // 2)
    yield from _or_not("periodic across", _period(grid.T) <= len(grid.T) // 2)
    if given.grid.shape != grid.shape:
        yield "part of the input", _is_part(given.grid, grid)
        yield "holds the input", _is_part(grid, given.grid)
    if given.grid.shape[1] == grid.shape[1]:
        yield "rows of the input", _rows(grid) <= _rows(given.grid)
    if given.grid.shape[0] == grid.shape[0]:
        yield "columns of the input", _rows(grid.T) <= _rows(given.grid.T)


def _objects(given: Side, made: Side) -> Named:
    for name in ("objects", "pieces"):
        sizes = np.bincount(getattr(made, name).ravel())[1:].tolist()
        yield name, len(sizes)
        yield f"as many {name}", len(sizes) == getattr(given, name).max()
        yield f"{name} of one size", len(set(sizes)) == 1
        yield "no lone cell" if name == "objects" else "no lone piece", 1 not in sizes
    sizes = np.bincount(made.objects.ravel())[1:].tolist()
    yield "a lone cell", 1 in sizes
    yield from _or_not("one object", len(sizes) == 1)
    before, after = given.shapes, made.shapes
    forms_before, forms = sorted(s[:2] for s in before), sorted(s[:2] for s in after)
    yield "forms of the input", set(forms) <= set(forms_before)
    yield "the same forms", forms == forms_before
    yield "forms and colours of the input", set(after) <= set(before)
    yield "the same forms and colours", after == before
    yield "one form", len(set(forms)) == 1
    yield "rectangles", all(all(mask) for _, mask in forms)
    yield "lines", all(min(size) == 1 for size, _ in forms)


def _changes(given: Side, made: Side) -> Named:
    before, after = given.grid, made.grid
    changed = before != after
    old, new = set(before[changed].tolist()), set(after[changed].tolist())
    yield "something changes", bool(changed.any())
    yield "colours that change", frozenset(old)
    yield "colours they change to", frozenset(new)
    yield "one colour changes", len(old) == 1
    yield "one colour comes", len(new) == 1
    yield "colour for colour", all(len(np.unique(after[before == c])) == 1 for c in given.colours)
    yield "rows rearranged", np.array_equal(np.sort(before, 1), np.sort(after, 1))
    yield "columns rearranged", np.array_equal(np.sort(before, 0), np.sort(after, 0))
    full = given.full
    around = np.pad(full, 1)
    beside = full | around[:-2, 1:-1] | around[2:, 1:-1] | around[1:-1, :-2] | around[1:-1, 2:]
    corner = around[:-2, :-2] | around[:-2, 2:] | around[2:, :-2] | around[2:, 2:]
    yield "changes beside something", not (changed & ~beside).any()
    yield "changes next to something", not (changed & ~beside & ~corner).any()
    yield "the box around it", given.box is not None and given.box == made.box


def _rows(grid: Grid) -> set[bytes]:
    return {row.tobytes() for row in grid}


def _period(grid: Grid) -> int:
    """The least number of rows after which they repeat; all of them where they do not."""
    periods = (p for p in range(1, len(grid)) if np.array_equal(grid[p:], grid[:-p]))
    return next(periods, len(grid))


def _is_part(whole: Grid, part: Grid) -> bool:
    if part.shape[0] > whole.shape[0] or part.shape[1] > whole.shape[1]:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(whole, part.shape)
    return bool((windows == part).all((2, 3)).any())


def components(grid: Grid, empty: int, corners: bool, one_colour: bool) -> np.ndarray:
    """Numbers int64 [H, W], from 1, of the components of the cells that are not `empty` (0), which
    are connected by sides (and `corners`), with `one_colour` only to cells of their colour.
    """
    width = grid.shape[1] + 2
    cells = np.pad(grid, 1, constant_values=empty).ravel().tolist()
    steps = [1, width, -1, -width]
    steps += [width + 1, width - 1, -width - 1, 1 - width] if corners else []
    found, count = [0] * len(cells), 0
    for start, colour in enumerate(cells):
        if colour == empty or found[start]:
            continue
        count += 1
        found[start], todo = count, [start]
        while todo:
            here = todo.pop()
            for there in [here + step for step in steps]:
                other = cells[there]
                if not found[there] and other != empty and (other == colour or not one_colour):
                    found[there] = count
                    todo.append(there)
    return np.array(found, dtype=np.int64).reshape(-1, width)[1:-1, 1:-1]
