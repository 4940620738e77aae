"""The canvas codec: a grid <-> the cell codes that TRM reads and writes.

Codes: PAD 0, EOS 1, colour c -> c + 2. EOS fills the row below and the column right of the grid
where they are on the canvas; the corner where they would meet stays PAD (as in TRM's reference
data), so the size of a grid can be read off its first row and first column.
"""

import numpy as np

from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid, Pair

PAD = 0
EOS = 1
COLOUR = 2
"""Code of colour 0."""
VOCABULARY = COLOUR + NUM_COLOURS


def encode(grid: Grid, height: int, width: int, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Codes, uint8 [height, width], of `grid` placed with its first cell at `offset`.

    Raises:
        ValueError: the grid does not fit on the canvas at that offset.

    """
    top, left = offset
    bottom, right = top + grid.shape[0], left + grid.shape[1]
    if bottom > height or right > width:
        raise ValueError(f"a {grid.shape} grid at {offset} does not fit on {(height, width)}")
    codes = np.full((height, width), PAD, dtype=np.uint8)
    codes[top:bottom, left:right] = grid + COLOUR
    codes[bottom : bottom + 1, left:right] = EOS
    codes[top:bottom, right : right + 1] = EOS
    return codes


def decode(codes: np.ndarray, offset: tuple[int, int] = (0, 0)) -> Grid | None:
    """The grid whose first cell is at `offset`, or None where the codes hold no grid.

    Width and height are the runs of colour codes in the first row and the first column; the grid
    is malformed (None) if a run is empty or a cell inside is not a colour.
    """
    placed = codes[offset[0] :, offset[1] :]
    is_colour = placed >= COLOUR
    height, width = _leading(is_colour[:, 0]), _leading(is_colour[0])
    if height == 0 or not is_colour[:height, :width].all():
        return None
    return (placed[:height, :width] - COLOUR).astype(np.uint8)


def pair_canvas(pair: Pair) -> tuple[int, int]:
    """(height, width) of the canvas that a pair needs: its larger grid plus the EOS border."""
    grids = [pair.input] if pair.output is None else [pair.input, pair.output]
    height = max(grid.shape[0] for grid in grids)
    width = max(grid.shape[1] for grid in grids)
    return min(MAX_SIDE, height + 1), min(MAX_SIDE, width + 1)


def _leading(flags: np.ndarray) -> int:
    """Number of True values before the first False."""
    return len(flags) if flags.all() else int(flags.argmin())
