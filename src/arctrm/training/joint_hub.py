"""A hub reader in joint training: the packed sequences as padded batches of the model's own tokens.

The layout is that of the tiny reader, with the model's marks around the grids (`marks_of`); codes
become token ids, and a soft prefix takes the place of the embeddings of its tokens, which stand
after the text. The reader's own loss is that of decoding: among the 12 tokens that spell grids.

Legend: T tokens, n sequences at once, S tokens of the longest of them, H width of the reader.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from arctrm.data.task import Grid, Pair
from arctrm.errors import ConfigError
from arctrm.reader.grammar import choice_ids
from arctrm.reader.hub import HubReader
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.prompts import pairs_prompt
from arctrm.reader.tokens import END, PREFIX, ROW_END
from arctrm.training.losses import IGNORE
from arctrm.training.reader_step import ReaderLosses, reader_losses
from arctrm.training.reader_stream import FIRST_MARK, Marks, ReaderBatch

SEQUENCES_AT_ONCE = 8
"""Sequences of about the same length that are padded to the longest of them."""
LABELS_AT_ONCE = 1024
"""Output tokens whose logits over the whole vocabulary are held at once."""


def marks_of(reader: HubReader) -> Marks:
    """Codes of the tokens around the grids, in the order of `_mark_ids`."""
    spelling, code = reader.spelling, FIRST_MARK
    codes = []
    for mark in (spelling.start, spelling.input_mark, spelling.output_mark):
        codes.append(tuple(range(code, code + len(mark))))
        code += len(mark)
    return Marks(*codes)


def _mark_ids(reader: HubReader) -> tuple[int, ...]:
    spelling = reader.spelling
    return (*spelling.start, *spelling.input_mark, *spelling.output_mark)


class HubJointReader:
    """Reads packed sequences with a hub model."""

    def __init__(self, reader: HubReader):
        self.reader = reader
        spelt = reader.grid_tokens
        own = [0] * FIRST_MARK  # of codes without a token: padding, the soft prefix
        own[: len(spelt.colours)] = spelt.colours
        own[ROW_END], own[END] = spelt.row_end, spelt.end
        self.ids = torch.tensor([*own, *_mark_ids(reader)], device=reader.device)
        self.choices = torch.tensor(choice_ids(spelt), device=reader.device)
        choice = torch.full((FIRST_MARK,), IGNORE, device=reader.device)
        choice[: len(spelt.colours)] = torch.arange(len(spelt.colours), device=reader.device)
        choice[ROW_END], choice[END] = len(spelt.colours), len(spelt.colours) + 1
        self.choice_of = choice

    @property
    def grids(self) -> GridReader:
        """What decodes grids."""
        return self.reader

    def prompt(self, pairs: Sequence[Pair], query: Grid, condition: tuple[int, int, int]) -> Prompt:
        """The prompt that asks for the output of `query` after complete `pairs`."""
        limit = self.reader.max_prompt_tokens
        return pairs_prompt(self.reader.spelling, pairs, query, limit).prompt

    def hidden(self, batch: ReaderBatch, soft_TH: Tensor | None = None) -> Tensor:
        """Hidden states [T, H] of a batch; a soft prefix takes the place of its embeddings."""
        places, states = [], []
        for index, mask in _padded(batch):
            codes = batch.tokens[index]
            embedded = self.reader.embed(self.ids[codes])
            if soft_TH is not None:
                soft = soft_TH[index].to(embedded.dtype)
                embedded = torch.where((codes == PREFIX)[..., None], soft, embedded)
            positions = torch.arange(index.shape[1], device=index.device).expand_as(index)
            states.append(self.reader.run(embedded, positions, mask.long())[mask])
            places.append(index[mask])
        hidden = torch.zeros(
            batch.tokens.shape[0], self.reader.hidden_size, device=batch.tokens.device
        )
        return hidden.index_copy(0, torch.cat(places), torch.cat(states)) if places else hidden

    def losses(self, batch: ReaderBatch) -> ReaderLosses:
        """Cross entropy of the next output token among those that spell grids, with gradient."""
        labelled = (batch.labels != IGNORE).nonzero()[:, 0]
        hidden = self.hidden(batch).index_select(0, labelled)
        logits = [
            checkpoint(self._logits, part, use_reentrant=False)
            for part in hidden.split(LABELS_AT_ONCE)
        ]
        labels = self.choice_of[batch.labels[labelled]]
        return reader_losses(torch.cat(logits), labels, batch.row[labelled], batch.rows.shape[0])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.reader.head(hidden).index_select(-1, self.choices)


def check_fits(reader: HubReader, longest: int) -> None:
    """Refuse sequences that the model has no positions for.

    Raises:
        ConfigError: names both numbers.
    """
    if longest > reader.max_tokens:
        raise ConfigError(
            f"reader.max_tokens and the marks make sequences of {longest} tokens, {reader.name} "
            f"holds {reader.max_tokens}; lower reader.max_tokens or use another model"
        )


def _padded(batch: ReaderBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Places on the packed axis int64 [n, S] and what is there, bool; the longest come first."""
    offsets = batch.packing.offsets[: batch.num_sequences + 1].long()
    begins, lengths = offsets[:-1], offsets.diff()
    order = lengths.argsort(descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]
    for chosen in order.split(SEQUENCES_AT_ONCE):
        own = lengths[chosen]
        place = torch.arange(int(own[0]), device=own.device)
        mask = place < own[:, None]
        yield torch.where(mask, begins[chosen, None] + place, 0), mask
