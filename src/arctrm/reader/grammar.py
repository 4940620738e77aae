"""The grammar of a grid spelled token by token, for any number of rows at once.

A grid is its rows of cells, a row end after each, and an end: every row as wide as the first, at
most 30 x 30. What may come next depends only on where the next token stands and on the width, so
the state is four tensors of one shape: [B] while decoding, [B, S] when whole grids are scored.

Probabilities are the model's softmax over the 12 grid tokens (whatever else its vocabulary holds),
renormalised over those that the grammar allows in the state. A token without an alternative (the
row end of a later row, the end after row 30) therefore costs nothing, and the probabilities of all
grids sum to 1.

Legend: ... the shape of the state, 12 choices: 0-9 a cell of that colour, 10 row end, 11 end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid
from arctrm.reader.interface import GridTokens

ROW_END, END = NUM_COLOURS, NUM_COLOURS + 1
UNWRITTEN = -1
"""Where a row of choices has none, because it ended or was given up before."""
NUM_CHOICES = NUM_COLOURS + 2

MAX_OUTPUT_TOKENS = MAX_SIDE * (MAX_SIDE + 1) + 1
"""Tokens of the largest grid."""


@dataclass(frozen=True, eq=False)
class GridState:
    """What is known before the next token of each grid."""

    y: Tensor
    """int64 [...]: row of the next token; the height at the end token."""
    x: Tensor
    """int64 [...]: column of the next token; the width at a row end, 0 at the end token."""
    width: Tensor
    """int64 [...]: cells of a row, 0 while the first row is open."""
    finished: Tensor
    """bool [...]: the end token was seen; the state no longer changes."""

    def index_select(self, index: Tensor) -> "GridState":
        """The states [len(index)] of some grids of a state [B]."""
        fields = (self.y, self.x, self.width, self.finished)
        return GridState(*(field.index_select(0, index) for field in fields))


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

    `logits`, float [..., 12], are the model's for the 12 grid tokens.
    """
    forbidden = ~allowed(state, max_side)
    return logits.float().masked_fill(forbidden, float("-inf")).log_softmax(dim=-1)


def choice_ids(tokens: GridTokens) -> tuple[int, ...]:
    """The reader's token id of each choice, 12 of them."""
    return (*tokens.colours, tokens.row_end, tokens.end)


def num_tokens(grid: Grid) -> int:
    """Output tokens that spell a grid."""
    height, width = grid.shape
    return height * (width + 1) + 1


def encode_choices(grid: Grid) -> tuple[np.ndarray, GridState]:
    """Choices int64 [n] that spell a grid, and the state [n] before each of them."""
    height, width = grid.shape
    assert 1 <= min(grid.shape) <= max(grid.shape) <= MAX_SIDE, grid.shape
    rows = np.full((height, width + 1), ROW_END, dtype=np.int64)
    rows[:, :width] = grid
    y, x = np.mgrid[:height, : width + 1]
    y, x = np.append(y, height), np.append(x, 0)
    before = (y, x, np.where(y > 0, width, 0), np.zeros(len(y), dtype=bool))
    return np.append(rows, END), GridState(*(torch.from_numpy(field) for field in before))


def encode_grid(grid: Grid, tokens: GridTokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid's tokens in the reader's vocabulary and the row y and column x of each, int64 [n]."""
    choices, state = encode_choices(grid)
    return np.array(choice_ids(tokens))[choices], state.y.numpy(), state.x.numpy()


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


def decode_grid(ids: Sequence[int] | np.ndarray, tokens: GridTokens) -> Grid | None:
    """The grid that tokens of the reader's vocabulary spell; None if they spell no grid."""
    choice_of = {token: choice for choice, token in enumerate(choice_ids(tokens))}
    return decode_choices([choice_of.get(int(token), -1) for token in ids])
