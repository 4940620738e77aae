"""One joint training step: reader, adapters and TRM on one batch, attempts and all.

    read the sequences (drafts shown) -> adapters -> TRM refines -> latents back as a soft prefix
    -> read again -> adapters -> TRM refines again; loss after every supervision step

The reader is run anew in every step, so its contexts are never stale and get gradient; the back
path gets its gradient through the second attempt.

Legend: N sequences, K pairs in each, R = N x K rows of TRM, T tokens, H width of the reader.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.errors import ResourceError
from arctrm.hybrid import Hybrid, ReaderStates, Start
from arctrm.reader.decoding import usual_batch_size
from arctrm.reader.tokens import SIDE
from arctrm.training import reader_stream as reading
from arctrm.training.joint_reader import JointReader
from arctrm.training.joint_stream import JointBatch, JointStream
from arctrm.training.losses import HALT_WEIGHT, RowLosses, row_losses
from arctrm.training.reader_stream import ReaderBatch
from arctrm.training.step import COUNTS
from arctrm.trm.model import Latents

JOINT_COUNTS = (
    *COUNTS,
    "batches",
    "attempts",
    "reader_loss",
    "reader_labels",
    "contrast",
    "context_variance",
    "drafted",
)
"""What `JointStep.counts` sums up, in this order."""

TEMPERATURE = 0.1
"""Of the contrastive loss."""


class Attempt(NamedTuple):
    """What one attempt of a batch gave."""

    losses: list[RowLosses]
    """After each supervision step."""
    latents: Latents
    start: Start


class JointStep:
    """Adds the gradient of one batch; sums counts into `counts` [JOINT_COUNTS]."""

    def __init__(
        self,
        hybrid: Hybrid,
        reader: JointReader,
        stream: JointStream,
        *,
        max_attempts: int,
        loss_scale: float,
    ):
        self.hybrid, self.reader, self.stream = hybrid, reader, stream
        self.reader_is_trained = bool(hybrid.parts()["reader"])
        self.max_attempts = max_attempts if hybrid.closes_the_loop else 1
        self.loss_scale = loss_scale
        self.counts = torch.zeros(len(JOINT_COUNTS), device=stream.device, dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.long)
        self.drafts_made = torch.zeros(2, dtype=torch.float64)
        """Of the last round of drafting: share that is right, mean length in tokens."""
        self.batch: JointBatch | None = None
        self.fixed_shapes = False
        """Whether shapes are the largest possible, so that a CUDA graph can hold the step."""

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        own = {"counts": self.counts, "steps": self.steps, "drafts_made": self.drafts_made}
        return own | self.stream.drafts.carry()

    def prepare(self) -> None:
        """Draft now and then."""
        config = self.hybrid.config
        if config.draft and int(self.steps) % config.draft_every == 0:
            self._draft()
        self.steps += 1

    def __call__(self) -> None:
        """One batch; nothing here waits for the device where `fixed_shapes`."""
        with torch.no_grad():
            self.batch = self.stream.draw()
        total, counts = self.loss(self.batch)
        (total * self.loss_scale).backward()
        with torch.no_grad():
            zero = torch.zeros((), device=self.counts.device)
            sums = [counts.get(name, zero) for name in JOINT_COUNTS]
            self.counts += torch.stack([value.detach().double() for value in sums])

    def _draft(self) -> None:
        config = self.hybrid.config
        at_once = config.draft_batch_size or usual_batch_size(self.reader.grids)
        try:
            made = self.stream.drafts.refresh(
                self.reader, config.drafted_pairs, at_once, config.draft_temperature
            )
        except ResourceError as error:  # decoding names the key of `baseline`
            said = str(error).replace("reader.batch_size", "coupling.draft_batch_size")
            raise ResourceError(said) from error
        self.drafts_made.copy_(torch.tensor(made))

    def loss(self, batch: JointBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The joint loss of a batch, and what is counted of it."""
        config, counts = self.hybrid.config, dict[str, Tensor]()
        total = torch.zeros((), device=self.counts.device)
        if config.reader_weight and self.reader_is_trained:
            own, counts = self._reader_loss(batch)
            total = total + config.reader_weight * own
        attempts = self.attempts(batch)
        for number, attempt in enumerate(attempts):
            for losses in attempt.losses:
                total = total + config.trm_weight * self._trm_loss(batch, losses, number) / (
                    len(attempt.losses) * len(attempts)
                )
        contrast = self._contrast(attempts[0].start, batch)
        total = total + config.contrast_weight * contrast
        counts |= self._counts(batch, attempts)
        return total, counts | {"contrast": contrast}

    def attempts(self, batch: JointBatch, swap: bool = False) -> list[Attempt]:
        """All attempts on a batch; with `swap` every row gets another task's context and draft."""
        found: list[Attempt] = []
        soft: Tensor | None = None
        for number in range(self.max_attempts):
            states = self._read(batch, soft)
            if swap:
                states = swapped(states, self._present(batch), 2 * self.stream.reader.num_pairs)
            found.append(self._attempt(batch, states))
            if number + 1 < self.max_attempts:
                soft = self._soft_prefix(batch, found[-1].latents)
        return found

    def _read(self, batch: JointBatch, soft_NPH: Tensor | None) -> ReaderStates:
        """The reader's states of the sequences as TRM may see them."""
        with torch.no_grad():
            shown = self.stream.shown_sequences(batch, with_soft=soft_NPH is not None)
        soft = None if soft_NPH is None else _on_soft_tokens(soft_NPH, shown)
        return self.stream.states(batch, shown, self.reader.hidden(shown, soft))

    def _present(self, batch: JointBatch) -> int:
        """Rows of the sequences that are there; they come first (this waits for the device)."""
        there = batch.sequences[:, -1, reading.LENGTH] > 0
        return int(there.sum()) * self.stream.reader.num_pairs

    def _attempt(self, batch: JointBatch, states: ReaderStates) -> Attempt:
        rows = batch.rows
        longest = self._longest(states)
        start = self.hybrid.start(states, rows.tokens, longest)
        num_steps, stablemax = (
            self.hybrid.config.supervision_steps,
            self.hybrid.trm.config.stablemax,
        )
        steps = list(self.hybrid.refine(rows, start, num_steps))
        losses = [
            row_losses(said.logits, said.q_halt, batch.labels, rows.tokens.row, stablemax)
            for _, said in steps
        ]
        return Attempt(losses, steps[-1][0], start)

    def _longest(self, states: ReaderStates) -> int:
        """States that the longest row sees, rounded up (looking waits for the device)."""
        if self.fixed_shapes:
            return self.stream.longest_shown
        return -(-max(int(states.visible.max()), 1) // 128) * 128

    def _soft_prefix(self, batch: JointBatch, latents: Latents) -> Tensor:
        """Soft prefix [N, P, H] of the sequences, from the latents of their last rows."""
        num_rows = batch.rows.embedding.shape[0]
        vectors = self.hybrid.soft_prefix(latents, batch.rows.tokens, num_rows)
        return vectors.unflatten(0, (self.stream.num_sequences, -1))[:, -1]

    def _trm_loss(self, batch: JointBatch, losses: RowLosses, attempt: int) -> Tensor:
        """Mean over rows; after the first attempt only the queries count, who alone see more."""
        of_row = losses.cells + HALT_WEIGHT * losses.halt
        real = losses.real
        if attempt:
            per = self.stream.reader.num_pairs
            real = real & (torch.arange(len(real), device=real.device) % per == per - 1)
        return (of_row * real).sum() / real.sum().clamp(min=1)

    def _reader_loss(self, batch: JointBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            true = self.stream.true_sequences(batch)
        losses = self.reader.losses(true)
        counts = {"reader_loss": losses.total, "reader_labels": losses.num_labels}
        return losses.total / losses.num_labels.clamp(min=1), counts

    def _contrast(self, start: Start, batch: JointBatch) -> Tensor:
        """Of all sequences' contexts, the other sequence of the same task should be nearest."""
        if start.context is None or not self.stream.in_twos:
            return torch.zeros((), device=self.counts.device)
        told = self._told(batch).view(-1, 2).all(1).repeat_interleave(2)
        return contrast(self._contexts(start), batch.sequences[:, -1, reading.TASK], told)

    def _told(self, batch: JointBatch) -> Tensor:
        """bool [N]: sequences for whose last row TRM hears the reader."""
        return batch.heard.view(self.stream.num_sequences, -1)[:, -1]

    def _contexts(self, start: Start) -> Tensor:
        """Context of each sequence's last row, float32 [N, C x D]."""
        assert start.context is not None
        per_sequence = start.context.unflatten(0, (self.stream.num_sequences, -1))
        return per_sequence[:, -1].float().flatten(1)

    def _counts(self, batch: JointBatch, attempts: list[Attempt]) -> dict[str, Tensor]:
        last = attempts[-1].losses[-1]
        one = torch.ones((), device=self.counts.device)
        real = last.real
        num_steps = float(len(attempts) * len(attempts[0].losses))
        counts = {
            "rows": real.sum(),
            "cell_loss": (last.cells * real).sum(),
            "halt_loss": (last.halt * real).sum(),
            "exact": last.exact.sum(),
            "shape": last.shape.sum(),
            "cell_accuracy": (last.cell_accuracy * real).sum(),
            "finished": real.sum(),
            "finished_steps": real.sum() * num_steps,
            "tokens": (batch.rows.tokens.row < real.shape[0]).sum(),
            "batches": one,
            "attempts": one * len(attempts),
            "drafted": batch.drafted.sum(),
        }
        if attempts[0].start.context is not None:
            contexts = self._contexts(attempts[0].start)
            counts["context_variance"] = context_variance(contexts, self._told(batch))
        return counts

    @torch.no_grad()
    def swap_difference(self) -> float:
        """Cell loss of the last batch with another task's context and draft, minus its own.

        Near 0: TRM ignores the reader.
        """
        assert self.batch is not None
        means = []
        for swap in (False, True):
            last = self.attempts(self.batch, swap)[-1].losses[-1]
            means.append(float((last.cells * last.real).sum() / last.real.sum().clamp(min=1)))
        return means[1] - means[0]


def _on_soft_tokens(soft_NPH: Tensor, shown: ReaderBatch) -> Tensor:
    """The soft prefix on its tokens, zero elsewhere: [T, H]."""
    per = shown.rows.shape[0] // shown.num_sequences
    there = (shown.row < shown.rows.shape[0]) & (shown.row % per == per - 1)
    sequence = torch.where(there, torch.div(shown.row, per, rounding_mode="floor"), 0)
    slot = torch.where(there, shown.positions % SIDE, 0)
    return soft_NPH[sequence, slot] * there[:, None]


def swapped(states: ReaderStates, num_rows: int, shift: int) -> ReaderStates:
    """What row r sees becomes what row r + `shift` sees, in the circle of the first `num_rows`."""

    def turned(of_row: Tensor) -> Tensor:
        return torch.cat((of_row[:num_rows].roll(shift), of_row[num_rows:]))

    return states._replace(
        row=torch.where(states.row < num_rows, (states.row + shift) % max(num_rows, 1), states.row),
        begin=turned(states.begin),
        visible=turned(states.visible),
    )


def contrast(contexts_NE: Tensor, task_N: Tensor, there_N: Tensor) -> Tensor:
    """Cross entropy (nats) of finding, among all contexts, the other one of the same task."""
    unit = F.normalize(contexts_NE - contexts_NE.mean(0), dim=1)
    near = unit @ unit.T / TEMPERATURE
    number = torch.arange(len(near), device=near.device)
    partner = number ^ 1
    same_task = task_N[:, None] == task_N
    hidden = (same_task & (number[:, None] != number) & (partner[:, None] != number)) | ~there_N
    near = near.masked_fill(
        hidden | torch.eye(len(near), dtype=torch.bool, device=near.device), -1e4
    )
    losses = F.cross_entropy(near, partner, reduction="none")
    return (losses * there_N).sum() / there_N.sum().clamp(min=1)


def context_variance(contexts_NE: Tensor, there_N: Tensor) -> Tensor:
    """Variance of the contexts between sequences, as a share of their mean square."""
    count = there_N.sum().clamp(min=1)
    weight = there_N[:, None].to(contexts_NE.dtype)
    mean = (contexts_NE * weight).sum(0) / count
    spread = ((contexts_NE - mean).square() * weight).sum() / count
    return spread / ((contexts_NE.square() * weight).sum() / count).clamp(min=1e-12)
