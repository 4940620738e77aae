"""A hub reader in joint training: the packed sequences as padded batches of the model's own tokens.

The layout is that of the tiny reader, with the model's marks around the grids (`marks_of`); codes
become token ids, and a soft prefix takes the place of the embeddings of its tokens, which stand
after the text. The reader's own loss is that of decoding: among the 12 tokens that spell grids.

Legend: T tokens, n sequences at once, S tokens of the longest of them, H width of the reader.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arctrm.data.task import Grid, Pair
from arctrm.errors import ConfigError
from arctrm.hybrid import Hybrid
from arctrm.reader.grammar import choice_ids
from arctrm.reader.hub_codes import HubCodes
from arctrm.reader.hub_module import HubModule
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.prompts import pairs_prompt
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import END, FIRST_MARK, PREFIX, ROW_END, Marks
from arctrm.training.joint_reader import JointReader, TinyJointReader
from arctrm.training.losses import IGNORE
from arctrm.training.reader_step import ReaderLosses, reader_losses
from arctrm.training.reader_stream import ReaderBatch

SEQUENCES_AT_ONCE = 8
"""Sequences of about the same length that are padded to the longest of them."""
LABELS_AT_ONCE = 1024
"""Output tokens whose logits over the whole vocabulary are held at once."""


class HubJointReader:
    """Reads packed sequences with a hub model."""

    dtype = torch.float32

    def __init__(self, module: HubModule):
        self.reader, self.config = module.hub, module.config
        self.codes = HubCodes(module.hub)
        reader, spelt = self.reader, self.reader.grid_tokens
        self.ids = torch.tensor(self.codes.ids, device=reader.device)
        self.choices = torch.tensor(choice_ids(spelt), device=reader.device)
        choice = torch.full((FIRST_MARK,), IGNORE, device=reader.device)
        choice[: len(spelt.colours)] = torch.arange(len(spelt.colours), device=reader.device)
        choice[ROW_END], choice[END] = len(spelt.colours), len(spelt.colours) + 1
        self.choice_of = choice

    @property
    def grids(self) -> GridReader:
        """What decodes grids."""
        return self.reader

    @property
    def marks(self) -> Marks:
        """What stands around the grids of its sequences."""
        return self.codes.marks

    @property
    def longest_prompt(self) -> int:
        """Bound on a prompt, in tokens with the tiny reader's marks: hub.max_tokens."""
        bound, pairs = self.reader.config.max_tokens, self.config.pairs_per_sequence
        longest = self.config.longest_sequence
        return longest if bound is None else min(longest, bound - self.marks.length(0, pairs))

    def marked(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is laid out for the tiny reader, with the model's marks."""
        return self.codes.marked(tokens, positions)

    def own(self, layout: Prompt) -> Prompt:
        """A prompt of the tiny reader in the model's own tokens."""
        return self.codes.prompt(layout)

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


def joint_reader(reader: nn.Module) -> JointReader:
    """A tiny reader, or what is trained of a hub reader, as training and answering see it."""
    if isinstance(reader, HubModule):
        return HubJointReader(reader)
    assert isinstance(reader, TinyReader)
    return TinyJointReader(reader)


def check_fits(hybrid: Hybrid) -> None:
    """Refuse sequences that a hub model has no positions for, the soft prefix included.

    Raises:
        ConfigError: names both numbers.
    """
    reader = hybrid.hub
    if reader is None:
        return
    config, coupling = hybrid.sequences, hybrid.config
    marks = HubCodes(reader).marks
    longest = marks.length(config.longest_sequence, config.pairs_per_sequence)
    longest += coupling.num_back_vectors if coupling.back else 0
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
