"""One training step of a reader on one packed batch: loss on output tokens, gradient out.

Legend: T tokens, R rows (pairs).
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.config.reader import ReaderConfig
from arctrm.data.task import NUM_COLOURS
from arctrm.reader.tokens import OUTPUT_PART, part_of
from arctrm.training.losses import IGNORE
from arctrm.training.reader_stream import ReaderBatch, ReaderStream
from arctrm.training.step import COUNTS


class ReaderLosses(NamedTuple):
    """Loss and counts of a packed batch; rows without output tokens count nothing."""

    total: Tensor
    """Sum of cross entropies over the output tokens (nats)."""
    num_labels: Tensor
    """Output tokens."""
    rows: dict[str, Tensor]
    """By name of `COUNTS`, per row [R]."""


def reader_losses(
    logits_TV: Tensor, labels_T: Tensor, row_T: Tensor, num_rows: int
) -> ReaderLosses:
    """Cross entropy of the next output token, and which grids are right token for token.

    (Right with the right tokens before: an upper bound of what decoding gets right.)
    """
    entropy = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="none")
    valid = labels_T != IGNORE
    predicted = logits_TV.argmax(-1)
    right = valid & (predicted == labels_T)
    same_kind = valid & ((predicted < NUM_COLOURS) == (labels_T < NUM_COLOURS))

    def per_row(values: Tensor) -> Tensor:
        total = torch.zeros(num_rows + 1, dtype=torch.float32, device=values.device)
        return total.index_add(0, row_T.clamp(max=num_rows), values.float())[:num_rows]

    counts, num_right = per_row(valid), per_row(right)
    real = counts > 0
    divisor = counts.clamp(min=1)
    rows = {
        "rows": real,
        "cell_loss": per_row(entropy.detach()) / divisor,
        "exact": real & (num_right == counts),
        "shape": real & (per_row(same_kind) == counts),
        "cell_accuracy": num_right / divisor,
    }
    return ReaderLosses(entropy.sum(), valid.sum(), rows)


class TrainedReader(Protocol):
    """A reader that can be trained alone."""

    @property
    def config(self) -> ReaderConfig:
        """What sequences it is shown."""

    def losses(self, batch: ReaderBatch) -> ReaderLosses:
        """Loss of a batch, with gradient."""


class ReaderStep:
    """Next batch, forward, loss, backward; sums counts into `counts` [COUNTS].

    Everything it touches has a fixed address and shape, so that one CUDA graph can replay it (but
    for hub readers, which pad their batches).
    """

    def __init__(
        self,
        reader: TrainedReader,
        stream: ReaderStream,
        num_tokens: int,
        num_rows: int,
        scale: float,
    ):
        self.reader, self.stream = reader, stream
        self.num_tokens, self.loss_scale = num_tokens, scale
        self.queue = stream.draw(num_rows)
        self.counts = torch.zeros(len(COUNTS), device=stream.device, dtype=torch.float64)

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        return {"queue": self.queue, "counts": self.counts}

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def __call__(self) -> None:
        """Add the gradient of one packed batch."""
        with torch.no_grad():
            batch = self._noisy(self.stream.next_batch(self.queue, self.num_tokens))
        losses = self.reader.losses(batch)
        (losses.total / losses.num_labels.clamp(min=1) * self.loss_scale).backward()
        with torch.no_grad():
            self._count(losses, batch)

    def _noisy(self, batch: ReaderBatch) -> ReaderBatch:
        """The batch with some output cells shown in random colours, in every other row."""
        share, tokens = self.reader.config.output_noise, batch.tokens
        if not share:
            return batch
        cells = (
            (part_of(batch.positions) == OUTPUT_PART)
            & (tokens < NUM_COLOURS)
            & (batch.row % 2 == 0)
        )
        changed = cells & (torch.rand(tokens.shape, device=tokens.device) < share)
        colours = torch.randint(NUM_COLOURS, tokens.shape, device=tokens.device)
        return batch._replace(tokens=torch.where(changed, colours, tokens))

    def _count(self, losses: ReaderLosses, batch: ReaderBatch) -> None:
        sums = {name: values.sum() for name, values in losses.rows.items()}
        sums["tokens"] = (batch.row < batch.rows.shape[0]).sum()
        zero = torch.zeros((), device=self.counts.device)
        self.counts += torch.stack([sums.get(name, zero).double() for name in COUNTS])
