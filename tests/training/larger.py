"""How a grid is shown larger, or with another as one, said once more in numpy."""

import numpy as np

from arctrm.training.scales import ACROSS, DOWN, FILL, SCALE


def larger(grid, shown, scaling):
    """`grid` as the columns of `Scales` show it; `scaling`: factors and names of shapes."""
    scale, patterns, fill = int(shown[SCALE]), shown[[DOWN, ACROSS]].tolist(), int(shown[FILL])
    if scale == 0:
        return grid
    factors = scaling["factors"]
    if scale <= len(factors):
        return np.kron(grid, np.ones(factors[scale - 1], dtype=np.uint8))
    shape = scaling["shapes"][scale - 1 - len(factors)]
    return {"pad": pad, "lines": lines, "tile": tile, "stretch": stretch}[shape](
        grid, patterns, fill
    )


def side_by_side(first, second, axis, fill):
    """Two grids as one: the second below the first (axis 1) or right of it (2)."""
    sides = [max(pair) for pair in zip(first.shape, second.shape, strict=True)]
    own = []
    for grid in (first, second):
        shape = sides.copy()
        shape[axis - 1] = grid.shape[axis - 1]
        whole = np.full(shape, fill, dtype=np.uint8)
        whole[: grid.shape[0], : grid.shape[1]] = grid
        own.append(whole)
    return np.concatenate(own, axis - 1)


def pad(grid, patterns, fill):
    widths = [(pattern % 3, pattern // 3 % 3) for pattern in patterns]
    return np.pad(grid, widths, constant_values=fill)


def lines(grid, patterns, fill):
    height, width = grid.shape
    found = np.full((2 * height - 1, 2 * width - 1), fill, dtype=np.uint8)
    found[::2, ::2] = grid
    return found


def tile(grid, patterns, fill):
    (axis,) = [i for i, pattern in enumerate(patterns) if pattern & 1]
    second = np.flip(grid, axis) if patterns[axis] & 2 else grid
    return np.concatenate([grid, second], axis)


def stretch(grid, patterns, fill):
    for axis, pattern in enumerate(patterns):
        times = [1 + (pattern >> i & 1) for i in range(grid.shape[axis])]
        grid = np.repeat(grid, times, axis)
    return grid
