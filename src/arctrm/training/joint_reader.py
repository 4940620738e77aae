"""What joint training asks of a reader: hidden states of packed sequences, its own loss, prompts.

Sequences are laid out by `ReaderStream` for every reader; here is what a reader makes of them.

Legend: T tokens, H width of the reader.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from arctrm.data.task import Grid, Pair
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import prompt
from arctrm.training import reader_stream as reading
from arctrm.training.reader_step import ReaderLosses, reader_losses
from arctrm.training.reader_stream import ReaderBatch


class JointReader(Protocol):
    """A reader that TRM is trained with."""

    @property
    def grids(self) -> GridReader:
        """What decodes grids."""

    def prompt(self, pairs: Sequence[Pair], query: Grid, condition: tuple[int, int, int]) -> Prompt:
        """The prompt that asks for the output of `query` after complete `pairs`."""

    def hidden(self, batch: ReaderBatch, soft_TH: Tensor | None = None) -> Tensor:
        """Hidden states [T, H] of a batch, `soft_TH` on the tokens of a soft prefix."""

    def losses(self, batch: ReaderBatch) -> ReaderLosses:
        """The reader's own loss on output tokens, with gradient."""


class TinyJointReader:
    """The tiny reader reads packed sequences as they are."""

    def __init__(self, reader: TinyReader):
        self.reader = reader

    @property
    def grids(self) -> GridReader:
        """What decodes grids."""
        return self.reader

    def prompt(self, pairs: Sequence[Pair], query: Grid, condition: tuple[int, int, int]) -> Prompt:
        """The prompt that asks for the output of `query` after complete `pairs`."""
        return prompt(pairs, query, condition)

    def hidden(self, batch: ReaderBatch, soft_TH: Tensor | None = None) -> Tensor:
        """Hidden states [T, H] of a batch; a soft prefix is added to its tokens' embeddings."""
        rows = batch.rows
        condition = self.reader.condition(
            rows[:, reading.TASK], rows[:, reading.DIHEDRAL], rows[:, reading.FLAG]
        )
        added = condition.index_select(0, batch.row.clamp(max=rows.shape[0] - 1))
        if soft_TH is not None:
            added = added + soft_TH
        return self.reader.hidden(batch.tokens, batch.positions, added, batch.packing)

    def losses(self, batch: ReaderBatch) -> ReaderLosses:
        """The reader's own loss on output tokens, with gradient."""
        logits = self.reader.head(self.hidden(batch))
        return reader_losses(logits, batch.labels, batch.row, batch.rows.shape[0])
