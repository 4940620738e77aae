"""The reader's hidden states into TRM: context slots, and a start for the latents of every cell.

Learned queries read the sequence: one per context slot, one per canvas row, one per canvas column.
A cell's latents come from its row and its column vector through a small head, so the map from a
4096-wide reader to 900 cells of 512 costs 6 million parameters where a dense one costs 1.9 billion.

Units: `context` is in those of TRM's prefix tables (TRM scales its input by sqrt(D) afterwards),
the latents are to be added to TRM's initial ones.

Legend: B rows, S reader tokens, H width of the reader, C context slots, T packed TRM tokens,
D width of TRM, N rows (= columns) of the canvas.
"""

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arctrm.adapters.layers import Z_SCALE, CrossBlock, dense, linear, masked, table
from arctrm.errors import ConfigError
from arctrm.trm.layers import rms_norm

NUM_BLOCKS = 2


class Resampled(NamedTuple):
    """What the learned queries have read: everything the adapter says follows from it."""

    context: Tensor
    """[B, C, D]: prefix slots."""
    rows: Tensor
    """[B, N, D]: one vector per canvas row."""
    columns: Tensor
    """[B, N, D]: one vector per canvas column."""


class TextToLatentAdapter(nn.Module):
    """Reader -> TRM.

    Args:
        llm_hidden_size: width H of the reader.
        trm_hidden_size: width D of TRM.
        trm_seq_len: cells of the full canvas, a square number (900 = 30 x 30).
        num_context_slots: prefix slots that `context` gives.
        num_heads: heads of the cross-attention; must divide D.

    Raises:
        ConfigError: `trm_seq_len` is no square, or the heads do not divide the width.
    """

    def __init__(
        self,
        llm_hidden_size: int = 4096,
        trm_hidden_size: int = 512,
        trm_seq_len: int = 900,
        num_context_slots: int = 16,
        num_heads: int = 8,
    ):
        super().__init__()
        self.side = isqrt(trm_seq_len)
        if self.side**2 != trm_seq_len or not trm_seq_len:
            raise ConfigError(
                f"TextToLatentAdapter: trm_seq_len = {trm_seq_len} is not the number of cells of a "
                "square canvas; use 900 (30 x 30)"
            )
        width = trm_hidden_size
        self.llm_hidden_size = llm_hidden_size
        self.num_context_slots = num_context_slots
        self.project = linear(llm_hidden_size, width)
        self.queries = table(num_context_slots + 2 * self.side, width)
        self.blocks = nn.ModuleList(CrossBlock(width, num_heads) for _ in range(NUM_BLOCKS))
        self.slot_head = linear(width, width)
        self.cell_head = linear(width, 2 * width)

    def forward(self, llm_hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What to add to TRM's initial z_H and z_L, each [B, N x N, D], cells row-major.

        `llm_hidden` is [B, H] or [B, S, H] with a bool mask [B, S] (True: a token).
        """
        read = self.resample(llm_hidden, mask)
        z_H, z_L = self._latents(read.rows[:, :, None], read.columns[:, None])
        return z_H.flatten(1, 2), z_L.flatten(1, 2)

    def context(self, llm_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prefix slots [B, C, D] for TRM to attend to at every supervision step."""
        return self.resample(llm_hidden, mask).context

    def cells(
        self, llm_hidden: Tensor, mask: Tensor | None, row_T: Tensor, y_T: Tensor, x_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward`'s z_H and z_L, [T, D], of only the cells of a packed batch; see `gather`."""
        return self.gather(self.resample(llm_hidden, mask), row_T, y_T, x_T)

    def resample(self, llm_hidden: Tensor, mask: Tensor | None = None) -> Resampled:
        """Read the sequence once, for callers who want both the context and the cells."""
        if llm_hidden.ndim == 2:
            llm_hidden = llm_hidden[:, None]
        if mask is None:
            mask = torch.ones(llm_hidden.shape[:2], dtype=torch.bool, device=llm_hidden.device)
        hidden = masked(llm_hidden, mask, self.llm_hidden_size, "TextToLatentAdapter")
        keys = rms_norm(self.project(rms_norm(hidden)))
        x = self.queries.expand(hidden.shape[0], -1, -1)
        attend = dense(mask)
        for block in self.blocks:
            x = block(x, keys, attend)
        slots, rows, columns = rms_norm(x).split(
            (self.num_context_slots, self.side, self.side), dim=1
        )
        scale = Z_SCALE * slots.shape[-1] ** -0.5
        return Resampled(self.slot_head(slots) * scale, rows, columns)

    def gather(
        self,
        read: Resampled,
        row_T: Tensor,
        y_T: Tensor,
        x_T: Tensor,
        is_cell_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z_H and z_L, [T, D], of the cells (row, y, x) of a packed batch.

        Zero for tokens of no row (`row_T` >= B) and where the bool `is_cell_T` is False (prefix
        slots, which stand at y = x = 0 in a token map).
        """
        num_rows = read.rows.shape[0]
        there = row_T < num_rows if is_cell_T is None else is_cell_T & (row_T < num_rows)
        place = torch.where(there, row_T, 0) * self.side
        rows = read.rows.flatten(0, 1).index_select(0, place + y_T)
        columns = read.columns.flatten(0, 1).index_select(0, place + x_T)
        z_H, z_L = self._latents(rows, columns)
        return z_H * there[:, None], z_L * there[:, None]

    def _latents(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """z_H and z_L [..., D] of cells whose row and column vectors [..., D] broadcast."""
        cell = rms_norm(row + column + row * column)
        z_H, z_L = (self.cell_head(cell) * Z_SCALE).chunk(2, dim=-1)
        return z_H, z_L
