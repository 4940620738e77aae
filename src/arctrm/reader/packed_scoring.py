"""Scoring by the tiny reader on packed places: a prompt is read once, its keys and values are
copied for each of its candidates, and the tokens of many candidates go through the layers together.

Legend: R rows (prompt and candidate), N output tokens of all rows, 12 choices.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import Grid
from arctrm.reader import grammar
from arctrm.reader.grammar import GridState
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

    By default that is what the device can spare.
    """

    def __init__(self, reader: TinyReader, max_side: int, max_places: int | None = None):
        self.lean, self.max_side = Lean(reader), max_side
        self.max_places = affordable_places(reader) if max_places is None else max_places

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[Prompt, Grid]], batch_size: int) -> list[float]:
        """The score of each pair of prompt and candidate; at most `batch_size` rows at a time."""
        rows = [_Row(prompt, grid) for prompt, grid in pairs]
        parts = groups([row.places for row in rows], batch_size, self.max_places)
        return [value for part in parts for value in self._scores(rows[part])]

    def _scores(self, rows: Sequence["_Row"]) -> list[float]:
        sizes = np.array([row.places for row in rows])
        places = Places(self.lean, int(sizes.sum()))
        begin = offsets(sizes)[:-1]
        first_R12 = places.read([row.prompt for row in rows], begin)
        parts = groups([row.fed for row in rows], len(rows), TOKENS_AT_ONCE)
        found = [self._score(places, rows[s], begin[s], first_R12[s]) for s in parts]
        return torch.cat(found).tolist()

    def _score(
        self, places: Places, rows: Sequence["_Row"], begin: np.ndarray, first_R12: Tensor
    ) -> Tensor:
        """Scores float64 [R], on the device, of rows whose prompts are in their places."""
        choices_N = places.to_device(np.concatenate([row.choices for row in rows]), torch.long)
        state_N = GridState(
            *(
                torch.cat([getattr(row.state, name) for row in rows]).to(places.device)
                for name in ("y", "x", "width", "finished")
            )
        )
        counts = np.array([row.fed + 1 for row in rows])
        row_N = places.to_device(np.repeat(np.arange(len(rows)), counts), torch.long)
        starts = offsets(counts)[:-1]
        fed = places.to_device(ranges(starts, counts - 1), torch.long)  # nothing after the end
        logits_N12 = torch.empty(len(choices_N), first_R12.shape[1], device=places.device)
        logits_N12.index_copy_(0, places.to_device(starts, torch.long), first_R12)
        logits_N12.index_copy_(
            0, fed + 1, self._fed(places, rows, begin, choices_N, state_N, row_N, fed)
        )
        log_p = grammar.log_probabilities(logits_N12, state_N, self.max_side)
        own = log_p.gather(1, choices_N[:, None])[:, 0].double()
        return own.new_zeros(len(rows)).index_add(0, row_N, own)

    def _fed(
        self,
        places: Places,
        rows: Sequence["_Row"],
        begin: np.ndarray,
        choices_N: Tensor,
        state_N: GridState,
        row_N: Tensor,
        fed: Tensor,
    ) -> Tensor:
        """Logits [len(fed), 12] after each of the output tokens number `fed`."""
        counts = np.array([row.fed for row in rows])
        lengths = np.array([len(row.prompt.tokens) for row in rows])
        row = row_N.index_select(0, fed)
        starts = places.to_device([r.prompt.output_start for r in rows], torch.long)
        condition = places.to_device([r.prompt.condition for r in rows], torch.long)
        at = state_N.index_select(fed)
        appended = Appended(
            places,
            places.to_device(ranges(begin + lengths, counts), torch.long),
            places.to_device(offsets(counts), torch.int32),
            places.to_device(np.append(begin, begin[-1] + rows[-1].places), torch.int32),
            int(counts.max()),
            int((lengths + counts).max()),
        )
        hidden = self.lean.hidden(
            self.lean.grid_ids.index_select(0, choices_N.index_select(0, fed)),
            self.lean.reader.output_positions(starts.index_select(0, row), 0, at.y, at.x),
            self.lean.condition(condition).index_select(0, row),
            appended,
        )
        return self.lean.logits(hidden)


class _Row:
    """A prompt and a candidate behind it."""

    def __init__(self, prompt: Prompt, grid: Grid):
        self.prompt = prompt
        self.choices, self.state = grammar.encode_choices(grid)
        self.fed = len(self.choices) - 1
        """Output tokens that something comes after."""
        self.places = len(prompt.tokens) + self.fed
