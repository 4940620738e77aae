"""What joint training asks of a reader: hidden states of packed sequences, its own loss, prompts.

Sequences are laid out by `ReaderStream` for every reader; here is what a reader makes of them.

Legend: T tokens, H width of the reader.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from arctrm.config.reader import ReaderConfig
from arctrm.data.task import Grid, Pair
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import Marks, prompt
from arctrm.training import reader_stream as reading
from arctrm.training.reader_step import ReaderLosses, reader_losses
from arctrm.training.reader_stream import ReaderBatch


class JointReader(Protocol):
    """A reader that TRM is trained and answers with."""

    @property
    def grids(self) -> GridReader:
        """What decodes grids."""

    @property
    def config(self) -> ReaderConfig:
        """What sequences it is shown."""

    @property
    def marks(self) -> Marks:
        """What stands around the grids of its sequences."""

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of packed sequences."""

    @property
    def longest_prompt(self) -> int:
        """Bound on a prompt, in tokens with the tiny reader's marks."""

    def marked(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and positions, int64 [m], of what is laid out for the tiny reader, int64 [n]."""

    def own(self, layout: Prompt) -> Prompt:
        """A prompt of the tiny reader in the reader's own tokens."""

    def prompt(self, pairs: Sequence[Pair], query: Grid, condition: tuple[int, int, int]) -> Prompt:
        """The prompt that asks for the output of `query` after complete `pairs`."""

    def hidden(self, batch: ReaderBatch, soft_TH: Tensor | None = None) -> Tensor:
        """Hidden states [T, H] of a batch, `soft_TH` on the tokens of a soft prefix."""

    def losses(self, batch: ReaderBatch) -> ReaderLosses:
        """The reader's own loss on output tokens, with gradient."""


class TinyJointReader:
    """The tiny reader reads packed sequences as they are."""

    marks = Marks()

    def __init__(self, reader: TinyReader):
        self.reader, self.config, self.dtype = reader, reader.config, reader.dtype

    @property
    def grids(self) -> GridReader:
        """What decodes grids."""
        return self.reader

    @property
    def longest_prompt(self) -> int:
        """Bound on a prompt: that on a sequence."""
        return self.config.longest_sequence

    def marked(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The layout as it is."""
        return tokens, positions

    def own(self, layout: Prompt) -> Prompt:
        """The prompt as it is."""
        return layout

    def prompt(self, pairs: Sequence[Pair], query: Grid, condition: tuple[int, int, int]) -> Prompt:
        """The prompt that asks for the output of `query` after complete `pairs`."""
        return prompt(pairs, query, condition)

    def hidden(
        self, batch: ReaderBatch, soft_TH: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Hidden states [T, H] of a batch; a soft prefix is added to its tokens' embeddings."""
        rows = batch.rows
        condition = self.reader.condition(
            rows[:, reading.TASK],
            rows[:, reading.DIHEDRAL],
            rows[:, reading.FLAG],
            scale=rows[:, reading.SCALE] if self.config.scaling.share else None,
            mosaic=rows[:, reading.MOSAIC] if self.config.mosaic_share else None,
        )
        added = condition.index_select(0, batch.row.clamp(max=rows.shape[0] - 1))
        if soft_TH is not None:
            added = added + soft_TH
        return self.reader.hidden(batch.tokens, batch.positions, added, batch.packing, dropout)

    def losses(self, batch: ReaderBatch) -> ReaderLosses:
        """The reader's own loss on output tokens, with gradient; here layers drop out."""
        logits = self.reader.head(self.hidden(batch, dropout=self.config.dropout))
        return reader_losses(logits, batch.labels, batch.row, batch.rows.shape[0])
