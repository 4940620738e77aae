"""What grid decoding, scoring and the coupling ask of a reader, whichever model is behind it.

A reader turns tokens into logits through a key-value cache. Prompts of different lengths stand
left-padded side by side, so that one place in the cache serves the whole batch; positions are
explicit, because a tiny reader counts rows and columns where a hub model counts tokens.

Legend: B prompts, S tokens fed now, V vocabulary, D width of the reader.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaModel, StaticCache

CACHE = next(
    name
    for name in ("cache", "past_key_values")  # the older name goes with transformers 5.40
    if name in inspect.signature(LlamaModel.forward).parameters
)
"""The argument by which transformers' models take a cache."""


@dataclass(frozen=True)
class GridTokens:
    """The token ids that spell a grid: one token per cell, one after each row, one at the end."""

    colours: tuple[int, ...]
    """Ids of colours 0..9."""
    row_end: int
    """Comes after every row, the last one included."""
    end: int
    """Comes after the last row's end: the grid is complete."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Everything before the first cell of an output grid."""

    tokens: np.ndarray
    """int64 [n]."""
    positions: np.ndarray
    """int64 [n]: position numbers as the reader counts them."""
    output_start: int
    """Position number of the first output token; see `GridReader.output_positions`."""
    condition: tuple[int, int, int] = (0, 0, 0)
    """Task embedding row, dihedral, colour flag (tiny readers; hub models ignore it). The flag is
    `tokens.INVERSE` more where the prompt shows an output and asks for its input."""


class GridReader(Protocol):
    """A language model that reads prompts and spells grids."""

    @property
    def grid_tokens(self) -> GridTokens:
        """The ids that spell a grid."""

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def new_cache(self, length: int) -> StaticCache:
        """An empty cache for `length` tokens, padding included."""

    def output_positions(self, start_B: Tensor, count: int, y_B: Tensor, x_B: Tensor) -> Tensor:
        """Position numbers int64 [B] of output token number `count` (from 0) at row y, column x.

        The row-end token of row y has x = width; the end token has y = height, x = 0.
        """

    def logits(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        condition_B3: Tensor,
        attention_mask: Tensor,
        cache: StaticCache,
        keep: int = 0,
    ) -> Tensor:
        """Next-token logits, float32 [B, S, V], or of the last `keep` tokens only [B, keep, V].

        The tokens are appended to the cache. `attention_mask` int64 [B, tokens in the cache after
        this call]: 0 on padding.
        """


def left_padded(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and attention mask, int64 [B, longest], of prompts side by side."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens, positions, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in "tpm")
    for row, prompt in enumerate(prompts):
        begin = longest - len(prompt.tokens)
        tokens[row, begin:] = torch.from_numpy(prompt.tokens)
        positions[row, begin:] = torch.from_numpy(prompt.positions)
        mask[row, begin:] = 1
    return tokens, positions, mask
