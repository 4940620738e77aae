"""How a grid is shown larger, said once more in numpy."""

import numpy as np

from arctrm.train.scaling import ACROSS, DOWN, FILL, SCALE


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
