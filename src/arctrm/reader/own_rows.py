"""Rows of the tiny reader on a CPU, each with keys and values of its own, as long as it is.

Nothing is padded: the tokens of all rows go through the layers together, only attention is a row's
own business. A row that is made shorter forgets its end, which is then overwritten; so what several
continuations of a prompt begin with is read once.

Legend: R rows, T tokens fed now, D width, A heads, K head width, P places of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.reader.interface import Prompt
from arctrm.reader.lean import Lean
from arctrm.reader.tiny import TinyReader


@dataclass(eq=False, kw_only=True)
class HeldRow:
    """A prompt and what comes behind it."""

    start: int
    """Position number of the first output token."""
    held: Tensor
    """[layers, 2, A, P, K]: keys and values."""
    length: int = 0
    """Places that are filled."""


class OwnRows:
    """Reads and continues rows; a copy of the reader's weights as they are now."""

    def __init__(self, reader: TinyReader):
        self.reader, self.lean = reader, Lean(reader)

    def room(self, places: int) -> Tensor:
        """Empty keys and values of a row of so many places."""
        lean = self.lean
        shape = lean.num_layers, 2, lean.num_heads, places, lean.head_width
        return torch.empty(shape, dtype=lean.dtype)

    def read(self, rows: Sequence[HeldRow], prompts: Sequence[Prompt]) -> Tensor:
        """Read the prompts of empty rows; the hidden states [R, D] of their last tokens."""
        tokens = torch.from_numpy(np.concatenate([prompt.tokens for prompt in prompts]))
        positions = [torch.from_numpy(prompt.positions) for prompt in prompts]
        lengths = [len(own) for own in positions]
        spans = torch.tensor(lengths)
        condition = self.lean.condition(torch.tensor([prompt.condition for prompt in prompts]))
        each = condition.repeat_interleave(spans, dim=0)
        masks = [self._prompt_mask(own) for own in positions]
        hidden = self.append(rows, tokens, torch.cat(positions), each, lengths, masks)
        return hidden[spans.cumsum(0) - 1]

    def _prompt_mask(self, positions: Tensor) -> Tensor | None:
        """What the tokens of a prompt see of it, bool [S, S]; None: everything."""
        if not self.reader.config.sees_inputs_whole:
            return _after(0, len(positions))
        there = torch.ones(1, len(positions), dtype=torch.long)
        seen = self.reader.seen(positions[None], there, None)[0, 0]
        return None if bool(seen.all()) else seen

    def append(
        self,
        rows: Sequence[HeldRow],
        tokens_T: Tensor,
        positions_T: Tensor,
        condition_TD: Tensor,
        lengths: Sequence[int],
        masks: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Append tokens, `lengths` of them to each row; their hidden states [T, D].

        `masks`: what those of each row see (None: everything); by default all before them.
        """
        if masks is None:
            masks = [_after(row.length, length) for row, length in zip(rows, lengths, strict=True)]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = (x.transpose(0, 1).split(list(lengths), dim=1) for x in (query, key, value))
            done = []
            for row, mask, q, k, v in zip(rows, masks, *parts, strict=True):
                end = row.length + q.shape[1]
                keys, values = row.held[layer]
                keys[:, row.length : end], values[:, row.length : end] = k, v
                done.append(
                    F.scaled_dot_product_attention(
                        q[None], keys[None, :, :end], values[None, :, :end], attn_mask=mask
                    )[0]
                )
            return torch.cat(done, dim=1).transpose(0, 1)

        hidden = self.lean.hidden(tokens_T, positions_T, condition_TD, attend)
        for row, length in zip(rows, lengths, strict=True):
            row.length += length
        return hidden


def _after(seen: int, new: int) -> Tensor | None:
    """What `new` tokens see of those before them and of each other; None: everything."""
    if new == 1:
        return None
    return torch.ones(new, seen + new, dtype=torch.bool).tril(seen)
