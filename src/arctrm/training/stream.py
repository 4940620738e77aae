"""The stream of training rows: drawn, augmented and packed on the device, without a host sync.

A packed batch keeps its unfinished rows and their latents from step to step (the persistent carry
of deep supervision) and fills the room of the finished ones from a queue of freshly drawn rows.
The queue keeps its order, so that a large canvas that does not fit now comes first next time and
is not drawn less often than a small one. Everything has a static shape: a captured CUDA graph can
replay it.

Legend: T tokens, R rows, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.config.data import DataConfig
from arctrm.config.trm import TRMConfig
from arctrm.data.canvas import COLOUR, EOS, PAD
from arctrm.data.dataset import BaseSet
from arctrm.data.task import MAX_SIDE, NUM_COLOURS
from arctrm.training import scales
from arctrm.training.losses import IGNORE
from arctrm.training.scales import Scales
from arctrm.training.source import INPUT, OUTPUT, PairSource, same_colours
from arctrm.trm.model import TRM, Latents
from arctrm.trm.packing import TokenMap, longest_row, token_map

# Columns of a row: which pair, seen how, on which canvas, worked on for how long; SHOWN are the
# columns of `Scales`, SCALE the first of them.
PAIR, EMBEDDING, DIHEDRAL, FLAG, HEIGHT, WIDTH, SHIFT_Y, SHIFT_X, LENGTH, STEPS, SCALE = range(11)
SHOWN = slice(SCALE, SCALE + scales.NUM_COLUMNS)
COLOURS = slice(SHOWN.stop, SHOWN.stop + NUM_COLOURS)
NUM_COLUMNS = COLOURS.stop


class StreamState(NamedTuple):
    """A packed batch in flight; every tensor is updated in place."""

    rows: Tensor
    """int64 [R, columns]: rows being worked on (length 0: none)."""
    queue: Tensor
    """int64 [R, columns]: rows that come next."""
    halted: Tensor
    """bool [R]: rows to be replaced."""
    z_H: Tensor
    """[T, D]"""
    z_L: Tensor
    """[T, D]"""


class Batch(NamedTuple):
    """What one supervision step computes on."""

    rows: Tensor
    """int64 [R, columns]."""
    tokens: TokenMap
    codes: Tensor
    """int64 [T]: cell codes of the input."""
    labels: Tensor
    """int64 [T]: cell codes of the output, IGNORE where there is none."""
    latents: Latents


class PairStream:
    """Draws rows from a base set on `device`."""

    def __init__(
        self,
        base: BaseSet,
        data: DataConfig,
        trm: TRMConfig,
        seed: int,
        device: torch.device,
        source: PairSource | None = None,
        scaled: bool = False,
    ):
        """`source`: pairs that another stream draws from, too. `scaled`: some rows are shown
        larger, as `trm.scaling` says.
        """
        self.data, self.trm, self.device = data, trm, device
        self.source = source or PairSource(base, data, seed, device)
        self.scales = Scales(trm.scaling, device, enabled=scaled)

    def new_state(self, model: TRM, num_tokens: int, num_rows: int) -> StreamState:
        """An empty batch: all rows halted, the queue full."""
        latents = model.initial_latents(num_tokens)
        return StreamState(
            torch.zeros(num_rows, NUM_COLUMNS, dtype=torch.long, device=self.device),
            self.draw(num_rows),
            torch.ones(num_rows, dtype=torch.bool, device=self.device),
            latents.z_H.clone(),
            latents.z_L.clone(),
        )

    def draw(self, count: int) -> Tensor:
        """`count` fresh rows: a pair by weight, one of its task's views, a canvas."""
        uniform = torch.rand(count, 10, device=self.device, dtype=torch.float64)
        pair = self.source.draw_pairs(uniform[:, 0])
        task = self.source.pairs[pair, 0]
        view, dihedral, colours = self.source.draw_views(task, uniform[:, 1])
        rows = torch.zeros(count, NUM_COLUMNS, dtype=torch.long, device=self.device)
        rows[:, PAIR] = pair
        per_view = self.trm.task_embedding == "per_view"
        rows[:, EMBEDDING] = task * self.source.num_views + view if per_view else task
        rows[:, DIHEDRAL] = dihedral
        rows[:, FLAG] = same_colours(colours)
        rows[:, COLOURS] = colours
        if self.scales.enabled:
            rows[:, SHOWN] = self._draw_scales(rows)
        self.place(rows, uniform[:, 2:])
        return rows

    def _draw_scales(self, rows: Tensor) -> Tensor:
        """Columns of `Scales` [n, 4] of rows that do not have them yet."""
        same = self.source.same_sizes(self.source.pairs[rows[:, PAIR]])
        return self.scales.draw(*self._needed(rows), same, rows[:, COLOURS][:, 0])

    def mean_length(self, count: int) -> float:
        """Tokens of a row, the mean of `count` drawn ones."""
        return float(self.draw(count)[:, LENGTH].double().mean())

    def place(self, rows: Tensor, uniform: Tensor) -> None:
        """Fill in canvas size, shift and length; `uniform` is [n, 8]."""
        height, width = self._needed(rows)
        shifted = (uniform[:, 0] < self.data.translate).long()
        enlarged = uniform[:, 1] < self.data.enlarge_canvas
        for need, size, shift, u in (
            (height, HEIGHT, SHIFT_Y, uniform[:, 2:5]),
            (width, WIDTH, SHIFT_X, uniform[:, 5:8]),
        ):
            rows[:, shift] = shifted * (u[:, 0] * (MAX_SIDE + 1 - need)).long()
            tight = (need + rows[:, shift] + 1).clamp(max=MAX_SIDE)
            extra = (u[:, 1] * u[:, 2] * (MAX_SIDE + 1 - tight)).long() * enlarged
            rows[:, size] = tight + extra if self.trm.layout == "compact" else MAX_SIDE
        rows[:, LENGTH] = self.trm.num_slots + rows[:, HEIGHT] * rows[:, WIDTH]

    def _needed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width [n] that hold both grids of each row's pair, as they are shown."""
        pair = self.source.pairs[rows[:, PAIR]]
        sizes = [self._seen_size(pair[:, grid], rows) for grid in (INPUT, OUTPUT)]
        height, width = (torch.maximum(*both) for both in zip(*sizes, strict=True))
        return height, width

    def _seen_size(self, grid: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width [n] of grids (offset, height, width) [n, 3] as their rows show them."""
        return self.scales.larger(*self.source.seen_size(grid, rows[:, DIHEDRAL]), rows[:, SHOWN])

    def next_batch(self, state: StreamState, model: TRM) -> Batch:
        """Keep the unfinished rows, fill up from the queue; updates rows and queue in place."""
        num_rows, num_tokens = state.rows.shape[0], state.z_H.shape[0]
        index = torch.arange(num_rows, device=self.device)
        kept = ~state.halted & (state.rows[:, LENGTH] > 0)
        num_kept = kept.sum()
        old = (~kept).long().argsort(stable=True)  # kept rows first, in order
        from_queue = index >= num_kept
        source = torch.where(from_queue, num_rows + index - num_kept, old)
        rows = torch.cat((state.rows, state.queue))[source]
        fits = rows[:, LENGTH].cumsum(0) <= num_tokens
        rows = torch.where(fits[:, None], rows, 0)
        drawn = torch.cat((state.queue, self.draw(num_rows)))
        begins = state.rows[:, LENGTH].cumsum(0) - state.rows[:, LENGTH]
        tokens = self.lay_out(rows, num_tokens)
        latents = self._carry(state, model, tokens, begins[old], ~from_queue)
        state.queue.copy_(drawn[index + fits.sum() - num_kept])
        state.rows.copy_(rows)
        codes, labels = self.cells_of(rows, tokens)
        return Batch(rows, tokens, codes, labels, latents)

    def lay_out(self, rows: Tensor, num_tokens: int) -> TokenMap:
        """Where the tokens of rows [R, columns] lie on an axis of `num_tokens`."""
        slots = self.trm.num_slots
        return token_map(rows[:, LENGTH], rows[:, WIDTH], num_tokens, longest_row(self.trm), slots)

    def _carry(
        self, state: StreamState, model: TRM, tokens: TokenMap, begin_R: Tensor, kept_R: Tensor
    ) -> Latents:
        """Latents of kept rows moved to their new place, fresh ones everywhere else."""
        row = torch.where(tokens.row < kept_R.shape[0], tokens.row, kept_R.shape[0] - 1)
        keep = (kept_R[row] & (tokens.row < kept_R.shape[0]))[:, None]
        source = torch.where(keep[:, 0], begin_R[row] + tokens.slot, 0)
        fresh = model.initial_latents(tokens.row.shape[0])
        return Latents(
            torch.where(keep, state.z_H[source], fresh.z_H),
            torch.where(keep, state.z_L[source], fresh.z_L),
        )

    def cells_of(self, rows: Tensor, tokens: TokenMap) -> tuple[Tensor, Tensor]:
        """Input codes and output labels [T] of a packed batch."""
        real = (tokens.row < rows.shape[0]) & (tokens.slot >= self.trm.num_slots)
        row = rows[torch.where(real, tokens.row, 0)]
        pair = self.source.pairs[row[:, PAIR]]
        y, x = tokens.y - row[:, SHIFT_Y], tokens.x - row[:, SHIFT_X]
        codes = self._grid_codes(pair[:, INPUT], row, y, x)
        labels = self._grid_codes(pair[:, OUTPUT], row, y, x)
        codes = torch.where(real, codes, PAD)
        return codes, torch.where(real & (labels != PAD), labels, IGNORE)

    def _grid_codes(self, grid: Tensor, row: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Codes [T] of a grid (offset, height, width per token) at (y, x) of its view."""
        rows_seen, columns_seen = self._seen_size(grid, row)
        in_rows, in_columns = (y >= 0) & (y < rows_seen), (x >= 0) & (x < columns_seen)
        inside = in_rows & in_columns
        border = (in_columns & (y == rows_seen)) | (in_rows & (x == columns_seen))
        size = self.source.seen_size(grid, row[:, DIHEDRAL])
        y, x, filled = self.scales.cells(y, x, *size, row[:, SHOWN])
        colour = self.source.colour_at(
            grid, row[:, DIHEDRAL], row[:, COLOURS], y, x, inside & ~filled
        )
        colour = torch.where(filled, row[:, SHOWN][:, scales.FILL], colour)
        return torch.where(inside, colour + COLOUR, torch.where(border, EOS, PAD))
