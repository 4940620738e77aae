"""Draft and refine: the reader's hidden state of each drafted cell goes onto that very cell of TRM.

Both models spend one position per cell, so nothing has to be learned about where things are. The
initial latents alone would get no gradient (all but the last cycle run without one), therefore the
hidden states are also injected into TRM's input, which every supervision step reads.

Placing is an index table: reader token of (row, kind, y, x), looked up for every TRM token.

Legend: N reader tokens, R rows, T packed TRM tokens, H width of the reader, D width of TRM.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from arctrm.adapters.layers import Z_SCALE, linear, masked
from arctrm.data.task import MAX_SIDE
from arctrm.trm.layers import rms_norm

INPUT, OUTPUT = 0, 1
"""Kinds of reader tokens that are cells; any other number (say -1) marks a token that is none."""


class PlacedHidden(NamedTuple):
    """Hidden states of the reader on the cells of TRM, as `DraftAdapter` takes them."""

    input_hidden: Tensor
    """[T, H]: state of the input grid's cell; zero where there is none."""
    output_hidden: Tensor
    """[T, H]: state of the drafted output grid's cell; zero where there is none."""
    has_input: Tensor
    """bool [T]."""
    has_output: Tensor
    """bool [T]."""


class DraftCells(NamedTuple):
    """What the draft adds to TRM; all zero on tokens without a cell."""

    z_H: Tensor
    """[T, D]: to TRM's initial answer latent."""
    z_L: Tensor
    """[T, D]: to TRM's initial reasoning latent."""
    injection: Tensor
    """[T, D]: to TRM's (scaled) input embedding, at every supervision step."""


def cell_table(row_N: Tensor, kind_N: Tensor, y_N: Tensor, x_N: Tensor, num_rows: int) -> Tensor:
    """Which reader token holds a cell: int64 [R, 2, 30, 30] by row, kind, y, x; -1 where none.

    `y_N`, `x_N` count on TRM's canvas (its offset included). Left out are tokens that are no cell
    (kind other than INPUT and OUTPUT), of no row, or outside 30 x 30; of two tokens for one cell
    the later one holds it.
    """
    is_cell = (kind_N == INPUT) | (kind_N == OUTPUT)
    for value, limit in ((row_N, num_rows), (y_N, MAX_SIDE), (x_N, MAX_SIDE)):
        is_cell = is_cell & (value >= 0) & (value < limit)
    size = num_rows * 2 * MAX_SIDE * MAX_SIDE
    place = ((row_N * 2 + kind_N) * MAX_SIDE + y_N) * MAX_SIDE + x_N
    place = torch.where(is_cell, place, size)  # one entry more takes those that are no cell
    token = torch.arange(row_N.shape[0], device=row_N.device)
    held = torch.full((size + 1,), -1, device=row_N.device).scatter_reduce(0, place, token, "amax")
    return held[:size].view(num_rows, 2, MAX_SIDE, MAX_SIDE)


def place_hidden(
    hidden_NH: Tensor,
    table: Tensor,
    row_T: Tensor,
    y_T: Tensor,
    x_T: Tensor,
    is_cell_T: Tensor | None = None,
) -> PlacedHidden:
    """Gather the reader's hidden states onto TRM's tokens (`TokenMap`'s row, y and x).

    Tokens of no row (`row_T` >= R), and those where the bool `is_cell_T` is False (prefix slots),
    get nothing. `hidden_NH` may be narrower than the reader, if it was projected before.
    """
    there = row_T < table.shape[0] if is_cell_T is None else is_cell_T & (row_T < table.shape[0])
    row, y, x = (torch.where(there, value, 0) for value in (row_T, y_T, x_T))
    padded = torch.nn.functional.pad(hidden_NH, (0, 0, 0, 1))  # the last row: no hidden state
    token = torch.where(there[:, None], table[row, :, y, x], -1)  # (T, 2)
    place = torch.where(token >= 0, token, hidden_NH.shape[0])
    has = token >= 0
    return PlacedHidden(
        padded.index_select(0, place[:, INPUT]),
        padded.index_select(0, place[:, OUTPUT]),
        has[:, INPUT],
        has[:, OUTPUT],
    )


class DraftAdapter(nn.Module):
    """Reader's cells -> TRM's cells, one by one: no cell sees another one's hidden state."""

    def __init__(self, llm_hidden_size: int = 4096, trm_hidden_size: int = 512):
        super().__init__()
        self.llm_hidden_size = llm_hidden_size
        self.project = linear(llm_hidden_size, trm_hidden_size)
        self.input_head = linear(trm_hidden_size, 2 * trm_hidden_size)
        self.output_head = linear(trm_hidden_size, 2 * trm_hidden_size)

    def forward(
        self,
        input_hidden_TH: Tensor,
        output_hidden_TH: Tensor,
        has_input_T: Tensor,
        has_output_T: Tensor,
    ) -> DraftCells:
        """z_H from the drafted output's cells, z_L from the input's, the injection from both."""
        z_L, seen = self._read(input_hidden_TH, has_input_T, self.input_head)
        z_H, drafted = self._read(output_hidden_TH, has_output_T, self.output_head)
        return DraftCells(z_H, z_L, seen + drafted)

    def _read(self, hidden_TH: Tensor, has_T: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
        """(latent, injection) of one kind of cells; without biases, zero stays zero."""
        hidden = masked(hidden_TH, has_T, self.llm_hidden_size, "DraftAdapter")
        latent, injection = (head(rms_norm(self.project(rms_norm(hidden)))) * Z_SCALE).chunk(2, -1)
        return latent, injection
