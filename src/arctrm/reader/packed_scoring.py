"""Scoring by the tiny reader on packed places: a prompt is read once, its keys and values are
copied for each of its candidates, and the tokens of many candidates go through the layers together.

Legend: R rows (prompt and candidate), N output tokens of all rows, 12 choices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import Grid
from arctrm.reader import grammar
from arctrm.reader.grammar import END, ROW_END, GridState, num_tokens
from arctrm.reader.interface import Prompt
from arctrm.reader.lean import Lean
from arctrm.reader.places import (
    TOKENS_AT_ONCE,
    Appended,
    Places,
    affordable_places,
    groups,
    offsets,
    ranges,
)
from arctrm.reader.tiny import TinyReader


class PackedScorer:
    """Log-probabilities of candidates, as many rows at a time as `max_places` holds.

    `sizes` are the places that rows need, all that will ever be asked for; `max_places` is by
    default what the device can spare.
    """

    def __init__(
        self,
        reader: TinyReader,
        sizes: Sequence[int],
        max_side: int,
        max_places: int | None = None,
    ):
        self.lean, self.max_side = Lean(reader), max_side
        most = affordable_places(reader) if max_places is None else max_places
        self.places = Places(self.lean, max(max(sizes, default=0), min(sum(sizes), most)))

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[Prompt, Grid]], batch_size: int) -> list[float]:
        """The score of each pair of prompt and candidate; at most `batch_size` rows at a time."""
        rows = [_Row(*pair) for pair in pairs]
        parts = groups([row.places for row in rows], batch_size, self.places.count)
        return [value for part in parts for value in self._scores(rows[part])]

    def _scores(self, rows: Sequence["_Row"]) -> list[float]:
        begin = offsets(np.array([row.places for row in rows]))[:-1]
        first_R12 = self.places.read([row.prompt for row in rows], begin)
        parts = groups([row.fed for row in rows], len(rows), TOKENS_AT_ONCE)
        found = [self._score(rows[part], begin[part], first_R12[part]) for part in parts]
        return torch.cat(found).tolist()

    def _score(self, rows: Sequence["_Row"], begin: np.ndarray, first_R12: Tensor) -> Tensor:
        """Scores float64 [R], on the device, of rows whose prompts are in their places."""
        spelled = _spell([row.grid for row in rows], self.places)
        fed = (spelled.choice_N != END).nonzero()[:, 0]  # nothing comes after the end
        logits_N12 = first_R12.new_empty(len(spelled.choice_N), first_R12.shape[1])
        logits_N12.index_copy_(0, spelled.first_R, first_R12)
        logits_N12.index_copy_(0, fed + 1, self._fed(rows, begin, spelled, fed))
        log_p = grammar.log_probabilities(logits_N12, spelled.state_N, self.max_side)
        own = log_p.gather(1, spelled.choice_N[:, None])[:, 0].double()
        return own.new_zeros(len(rows)).index_add(0, spelled.row_N, own)

    def _fed(
        self, rows: Sequence["_Row"], begin: np.ndarray, spelled: "_Spelled", fed: Tensor
    ) -> Tensor:
        """Logits [len(fed), 12] after each of the output tokens number `fed`."""
        places, counts = self.places, np.array([row.fed for row in rows])
        lengths = np.array([len(row.prompt.tokens) for row in rows])
        row, at = spelled.row_N.index_select(0, fed), spelled.state_N.index_select(fed)
        starts = places.to_device([r.prompt.output_start for r in rows], torch.long)
        condition = places.to_device([r.prompt.condition for r in rows], torch.long)
        appended = Appended(
            places,
            places.to_device(ranges(begin + lengths, counts), torch.long),
            places.to_device(offsets(counts), torch.int32),
            places.to_device(np.append(begin, begin[-1] + rows[-1].places), torch.int32),
            int(counts.max()),
            int((lengths + counts).max()),
        )
        hidden = self.lean.hidden(
            self.lean.grid_ids.index_select(0, spelled.choice_N.index_select(0, fed)),
            self.lean.reader.output_positions(starts.index_select(0, row), 0, at.y, at.x),
            self.lean.condition(condition).index_select(0, row),
            appended,
        )
        return self.lean.logits(hidden)


class _Row(NamedTuple):
    """A prompt and a candidate behind it."""

    prompt: Prompt
    grid: Grid

    @property
    def fed(self) -> int:
        """Output tokens that something comes after: all but the end."""
        return num_tokens(self.grid) - 1

    @property
    def places(self) -> int:
        """Places that it fills."""
        return row_size(self.prompt, self.grid)


def row_size(prompt: Prompt, grid: Grid) -> int:
    """Places that a prompt and a candidate fill; nothing comes after the end."""
    return len(prompt.tokens) + num_tokens(grid) - 1


class _Spelled(NamedTuple):
    """The output tokens of grids, one after another."""

    choice_N: Tensor
    state_N: GridState
    row_N: Tensor
    first_R: Tensor
    """int64 [R]: number of each grid's first token."""


def _spell(grids: Sequence[Grid], places: Places) -> _Spelled:
    """Spell grids on the device, as `grammar.encode_choices` does one by one."""
    shapes = np.array([grid.shape for grid in grids])
    counts = shapes[:, 0] * (shapes[:, 1] + 1) + 1
    cells = places.to_device(np.concatenate([grid.ravel() for grid in grids]), torch.long)
    columns = np.stack([*shapes.T, counts, offsets(counts)[:-1], offsets(shapes.prod(1))[:-1]])
    height, width, count, first, first_cell = places.to_device(columns, torch.long).unbind()
    numbers = torch.arange(len(grids), device=places.device)
    row = numbers.repeat_interleave(count, output_size=int(counts.sum()))
    number = torch.arange(len(row), device=places.device) - first[row]
    y, x = number // (width[row] + 1), number % (width[row] + 1)
    cell = (first_cell[row] + y * width[row] + x).clamp(max=len(cells) - 1)
    choice = torch.where(x == width[row], ROW_END, cells[cell])
    choice = torch.where(y == height[row], END, choice)
    known = torch.where(y > 0, width[row], 0)
    return _Spelled(
        choice, GridState(y, x, known, torch.zeros_like(y, dtype=torch.bool)), row, first
    )
