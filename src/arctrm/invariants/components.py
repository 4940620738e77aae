"""Connected components of a grid."""

import numpy as np

from arctrm.data.task import Grid

SIDES = ((0, 1), (1, 0), (0, -1), (-1, 0))
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def background(grid: Grid) -> int:
    """The commonest colour; of equally common ones the first."""
    return int(np.bincount(grid.ravel(), minlength=10).argmax())


def components(grid: Grid, empty: int, corners: bool, one_colour: bool) -> np.ndarray:
    """Numbers int64 [H, W], from 1, of the components of the cells that are not `empty` (0).

    Cells are connected by their sides, with `corners` by these, too; with `one_colour` only where
    they have the same colour.
    """
    height, width = grid.shape
    cells, found = grid.tolist(), [[0] * width for _ in range(height)]
    steps = SIDES + CORNERS if corners else SIDES
    count = 0
    for top in range(height):
        for left in range(width):
            colour = cells[top][left]
            if colour == empty or found[top][left]:
                continue
            count += 1
            found[top][left], todo = count, [(top, left)]
            while todo:
                y, x = todo.pop()
                for dy, dx in steps:
                    b, a = y + dy, x + dx
                    if not (0 <= b < height and 0 <= a < width) or found[b][a]:
                        continue
                    if cells[b][a] == empty or (one_colour and cells[b][a] != colour):
                        continue
                    found[b][a] = count
                    todo.append((b, a))
    return np.array(found, dtype=np.int64)


def enclosed(grid: Grid, empty: int) -> np.ndarray:
    """bool [H, W]: `empty` cells from which no way over sides leads out of the grid."""
    open_air = np.pad(np.where(grid == empty, 1, 0), 1, constant_values=1)
    ways = components(open_air, 0, corners=False, one_colour=True)
    inside = (open_air == 1) & (ways != ways[0, 0])
    return inside[1:-1, 1:-1]


def shapes(grid: Grid, empty: int) -> list[tuple[tuple[int, int], bytes, int]]:
    """Size, mask and colour of every component of one colour, connected by corners, too; sorted."""
    numbers = components(grid, empty, corners=True, one_colour=True)
    found = []
    for number in range(1, int(numbers.max(initial=0)) + 1):
        ys, xs = np.nonzero(numbers == number)
        box = numbers[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] == number
        found.append((box.shape, box.tobytes(), int(grid[ys[0], xs[0]])))
    return sorted(found)
