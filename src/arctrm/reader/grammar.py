"""The grammar of a grid spelled token by token, for any number of grids at once.

A grid is its rows of cells, a row end after each, and an end: every row as wide as the first, at
most 30 x 30. What may come next depends only on where the next token stands and on the width, so
the state is four tensors of one shape: [R] while grids are written, [N] when grids are scored.

Probabilities are the model's softmax over the 12 choices (whatever else its vocabulary holds),
renormalised over those that the grammar allows in the state. A token without an alternative (the
row end of a later row, the end after row 30) therefore costs nothing, and the probabilities of all
grids sum to 1.

Legend: ... the shape of the state, 12 choices: 0-9 a cell of that colour, 10 row end, 11 end,
G grids, N tokens of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid

ROW_END, END = NUM_COLOURS, NUM_COLOURS + 1
NUM_CHOICES = NUM_COLOURS + 2

MAX_OUTPUT_TOKENS = MAX_SIDE * (MAX_SIDE + 1) + 1
"""Tokens of the largest grid."""


@dataclass(frozen=True, eq=False)
class GridState:
    """What is known before the next token of each grid."""

    y: Tensor  # int64 [...]: row of the next token; the height at the end token
    x: Tensor  # int64 [...]: column of the next token; the width at a row end, 0 at the end token
    width: Tensor  # int64 [...]: cells of a row, 0 while the first row is open
    finished: Tensor  # bool [...]: the end token was seen; the state no longer changes

    def index_select(self, index: Tensor) -> "GridState":
        """The states [len(index)] of some grids or tokens."""
        fields = (self.y, self.x, self.width, self.finished)
        return GridState(*(field.index_select(0, index) for field in fields))


class Spelled(NamedTuple):
    """The tokens of grids, one grid after another."""

    choices: Tensor  # int64 [N]
    states: GridState  # [N]: before each of them
    grid: Tensor  # int64 [N]: number of the grid that the token is of
    first: Tensor  # int64 [G]: number of each grid's first token


def start(num_grids: int, device: torch.device | str = "cpu") -> GridState:
    """The state [num_grids] before the first token."""
    y, x, width = torch.zeros(3, num_grids, dtype=torch.long, device=device).unbind()
    return GridState(y, x, width, torch.zeros(num_grids, dtype=torch.bool, device=device))


def allowed(state: GridState, max_side: int = MAX_SIDE) -> Tensor:
    """Which choices continue a well-formed grid, bool [..., 12]; a finished one may only end."""
    first_row = state.width == 0
    longest = torch.where(first_row, max_side, state.width)
    cell = (state.x < longest) & (state.y < max_side) & ~state.finished
    row_end = (state.x > 0) & (first_row | (state.x == state.width)) & ~state.finished
    end = (state.x == 0) & (state.y > 0) | state.finished
    cells = cell[..., None].expand(*cell.shape, NUM_COLOURS)
    return torch.cat([cells, row_end[..., None], end[..., None]], dim=-1)


def advance(state: GridState, choice: Tensor) -> GridState:
    """The state after an allowed `choice`, int64 [...]."""
    row_end = choice == ROW_END
    return GridState(
        y=state.y + row_end,
        x=torch.where(row_end, 0, state.x + (choice < ROW_END)),
        width=torch.where(row_end, state.x, state.width),
        finished=state.finished | (choice == END),
    )


def log_probabilities(logits: Tensor, state: GridState, max_side: int = MAX_SIDE) -> Tensor:
    """Log-probabilities (nats) [..., 12] of the choices, -inf where not allowed.

    `logits`, float [..., 12], are the model's for the 12 choices.
    """
    forbidden = ~allowed(state, max_side)
    return logits.float().masked_fill(forbidden, float("-inf")).log_softmax(dim=-1)


def num_tokens(grid: Grid) -> int:
    """Output tokens that spell a grid."""
    height, width = grid.shape
    return height * (width + 1) + 1


def spell(grids: Sequence[Grid], device: torch.device | str = "cpu") -> Spelled:
    """Spell grids; the host does a few array operations, whatever their number."""
    shapes = np.array([grid.shape for grid in grids])
    assert shapes.min() >= 1, shapes
    assert shapes.max() <= MAX_SIDE, shapes
    counts = shapes[:, 0] * (shapes[:, 1] + 1) + 1
    begins = (sizes.cumsum() - sizes for sizes in (counts, shapes.prod(1)))
    columns = torch.from_numpy(np.stack([*shapes.T, counts, *begins])).to(device)
    height, width, count, first, first_cell = columns.unbind()
    cells = torch.from_numpy(np.concatenate([grid.ravel() for grid in grids])).to(device)
    grid = torch.arange(len(grids), device=device)
    grid = grid.repeat_interleave(count, output_size=int(counts.sum()))
    number = torch.arange(len(grid), device=device) - first[grid]
    own_width = width[grid]
    y, x = number // (own_width + 1), number % (own_width + 1)
    cell = (first_cell[grid] + y * own_width + x).clamp(max=len(cells) - 1)
    choices = torch.where(x == own_width, ROW_END, cells[cell].long())
    choices = torch.where(y == height[grid], END, choices)
    known = torch.where(y > 0, own_width, 0)
    state = GridState(y, x, known, torch.zeros_like(y, dtype=torch.bool))
    return Spelled(choices, state, grid, first)


def encode_choices(grid: Grid) -> tuple[np.ndarray, GridState]:
    """Choices int64 [N] that spell one grid, and the state [N] before each of them."""
    spelled = spell([grid])
    return spelled.choices.numpy(), spelled.states


def decode_choices(choices: Sequence[int] | np.ndarray) -> Grid | None:
    """The grid that choices spell, from its first cell to its end; None if they spell no grid."""
    codes = np.asarray(choices, dtype=np.int64)
    width = int((codes == ROW_END).argmax()) if len(codes) else 0
    height, left = divmod(len(codes) - 1, width + 1)
    if left or not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        return None
    rows = codes[:-1].reshape(height, width + 1)
    cells = rows[:, :width]
    ended = codes[-1] == END and (rows[:, width] == ROW_END).all()
    if not ended or cells.min() < 0 or cells.max() >= NUM_COLOURS:
        return None
    return cells.astype(np.uint8)
