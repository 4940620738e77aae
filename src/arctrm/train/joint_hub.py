"""One joint training step with a hub reader: reader, adapters and TRM, gradients from end to end.

A sequence is K pairs of one task under one view, read once and anew in every step. Every pair is a
row of TRM, which hears what stands before its own output: a held-out question. The last pair may
show the reader's draft instead of its output. TRM refines; behind what it says the reader writes.

Legend: N sequences, K pairs in each, R rows (pairs that are there), T tokens, H reader's width.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.config import JointConfig
from arctrm.data.base_set import BaseSet
from arctrm.errors import ConfigError
from arctrm.model.hybrid import Heard, HybridModel
from arctrm.model.layout import CHOICE_OF, prompt
from arctrm.model.trm import Asked, Prediction
from arctrm.train.drafts import DraftPool, questions_of
from arctrm.train.losses import IGNORE, RowCounts, halting_loss, halting_mean, row_counts
from arctrm.train.refining import Questions, draw_drafted, questions, with_drafts
from arctrm.train.sequences import INDEX, LENGTH, Batch, Sequences
from arctrm.train.sharding import gathered
from arctrm.train.source import PairSource
from arctrm.train.steps import COUNTS, READER, TRM, Step, metrics_of, room_for


class JointBatch(NamedTuple):
    """What one joint step computes on."""

    read: Batch  # sequences as the reader is shown them; no label where a draft is shown
    at: Tensor  # int64 [R]: each of TRM's rows among the rows of `read`
    slot: Tensor  # int64 [T]: place of each of TRM's tokens in its row
    asked: Questions  # the same pairs for TRM


class JointStep(Step):
    """Adds the gradient of one batch of sequences to reader, adapters and trunk."""

    def __init__(self, hybrid: HybridModel, sequences: Sequences, config: JointConfig):
        """`sequences` are what the reader reads, without scaling and inverse tasks."""
        num_tokens = config.coupling.reader_tokens_per_batch
        room = room_for(sequences, num_tokens, config.batch_size)
        super().__init__(
            hybrid.trunk, sequences, num_tokens, room, scale=1 / config.training.grad_accum
        )
        self.hybrid, self.trm, self.coupling = hybrid, config.trm, config.coupling
        self.refined = Sequences(sequences.source, hybrid.trunk.dtype, whole=True)
        self.attempts = config.max_attempts if config.coupling.back else 1
        self.trm_tokens = config.training.tokens_per_batch
        self.reader_is_trained = any(p.requires_grad for p in hybrid.reader.parameters())
        self.choice_of = torch.from_numpy(CHOICE_OF).to(hybrid.reader.device)

    def __call__(self) -> None:
        """Add the gradient of one batch."""
        (self.loss(self.draw()) * self.scale).backward()

    @torch.no_grad()
    def draw(self) -> JointBatch:
        """The next sequences, and their pairs as rows of TRM: as many as its budget holds."""
        read = self.next_batch()
        per, rows = self.sequences.num_pairs, read.rows
        number = torch.arange(len(rows), device=rows.device)
        drafted = torch.zeros_like(number, dtype=torch.bool)
        if self.drafts is not None:
            drawn = draw_drafted(rows, self.sequences.source, self.drafts, self.trm.draft_share)
            drafted = drawn & (number % per == per - 1) & (rows[:, LENGTH] > 0)
            shown = self.sequences.tokens_of(read, with_drafts(rows, self.drafts, drafted))
            labels = torch.where(drafted[read.own_row], IGNORE, read.labels)
            read = read._replace(tokens=shown, labels=labels)
        there = (rows[:, LENGTH] > 0) & (rows[:, LENGTH].cumsum(0) <= self.trm_tokens)
        at = there.nonzero()[:, 0]
        own = rows[at]
        own[:, INDEX] = 0
        packed = self.refined.pack(own, len(own), int(own[:, LENGTH].sum()))
        asked = questions(packed, self.refined, self.trm, self.drafts, drafted[at])
        return JointBatch(read, at, packed.slot, asked)

    def loss(self, batch: JointBatch) -> Tensor:
        """The joint loss of a batch, counted in `counts`."""
        coupling, asked = self.coupling, batch.asked
        # 1. The reader reads the sequences, and learns to write their outputs.
        offsets = batch.read.seen.offsets[: batch.read.num_sequences + 1]
        with torch.set_grad_enabled(self.reader_is_trained):
            hidden = self.hybrid.reader.run_packed(batch.read.tokens, offsets)
        total = self.counts.new_zeros((), dtype=torch.float32)
        if self.reader_is_trained and coupling.reader_weight:
            own = self.read_losses(batch.read, hidden)
            total = total + coupling.reader_weight * own.mean.to(total.device)
            self.count(READER, own, batch.read.row)
        # 2. TRM hears it and refines; behind what TRM then says, the reader writes the answer.
        heard = self.heard(batch, hidden) if coupling.context or coupling.aligned else None
        rounds, every = max(1, self.attempts - 1), self.trm.supervision_steps
        num_rows = len(batch.at)
        taken = torch.zeros(num_rows, device=batch.at.device)
        going, written = torch.ones_like(taken), taken.new_zeros(())
        steps = self.hybrid.steps(asked.rows, heard, every * rounds)
        for number, prediction in enumerate(steps, 1):
            losses = row_counts(prediction.logits, asked.labels, asked.rows.row, num_rows)
            loss = losses.mean + halting_mean(prediction.q_halt, losses)
            total = total + coupling.trm_weight * loss / (every * rounds)
            q_halt = prediction.q_halt.detach()
            taken, going = taken + going, going * (q_halt <= 0)
            if self.attempts > 1 and number % every == 0:
                mean = self.written_losses(batch, prediction).mean().to(total.device)
                total = total + coupling.reader_weight * mean / rounds
                written = written + mean.detach() / rounds
        # 3. What is logged.
        lengths = batch.read.rows[batch.at, LENGTH] - asked.prompts[:num_rows]
        more = {
            "halt_loss": halting_loss(q_halt, losses),
            "attempts": losses.real * self.attempts,
            "trm_steps": taken,
            "drafted": asked.drafted,
            "draft_tokens": asked.drafted * lengths,
            "written_loss": losses.real * written,
        }
        self.count(TRM, losses, asked.rows.row, more)
        return total

    def read_losses(self, read: Batch, hidden: Tensor) -> RowCounts:
        """The reader's own loss: the next token of every output that is there."""
        labels, row = read.labels.to(hidden.device), read.row.to(hidden.device)
        known = (labels != IGNORE).nonzero()[:, 0]
        logits = self.hybrid.reader.grid_logits(hidden[known])
        return row_counts(logits, self.choice_of[labels[known]], row[known], len(read.rows))

    def heard(self, batch: JointBatch, hidden: Tensor) -> Heard:
        """What TRM's rows may know of the reader's states [T, H]: of own outputs only drafts."""
        read, asked, at = batch.read, batch.asked, batch.at
        lengths = read.rows[:, LENGTH]
        own_begin = (lengths.cumsum(0) - lengths)[at]
        begin = read.seen.offsets[at // self.sequences.num_pairs].long()
        own = torch.where(asked.drafted, lengths[at], asked.prompts[: len(at)])
        row = asked.rows.row
        state = torch.where(batch.slot < own[row], own_begin[row] + batch.slot, -1)
        return Heard(hidden.to(state.device), state, begin, own_begin - begin + own)

    def written_losses(self, batch: JointBatch, prediction: Prediction) -> Tensor:
        """Loss [n] of the last pairs' answers, written behind the soft prefix that TRM gives."""
        per = self.sequences.num_pairs
        last = (batch.at % per == per - 1).nonzero()[:, 0]
        soft = self.hybrid.soft_prefix(batch.asked.rows, prediction)
        rows = batch.read.rows.unflatten(0, (-1, per))[batch.at[last] // per]
        found = questions_of(self.sequences.source.base, rows)
        answers = [one.answer for one in found]
        spelt = ((one, prompt(one.query, one.condition)) for one in found)
        asked = [Asked(q.query, told, q.answer.shape, pairs=q.pairs) for q, told in spelt]
        return self.hybrid.written_loss(asked, answers, soft[last.to(soft.device)])


def hub_steps(config: JointConfig, hybrid: HybridModel, base: BaseSet) -> list[Step]:
    """The steps of a joint run with a hub reader, on the trunk's device."""
    reader, longest = hybrid.reader, config.hub.training_tokens
    needed = longest + config.coupling.num_back_vectors * config.coupling.back
    if needed > reader.max_tokens:
        raise ConfigError(
            f"hub.max_tokens makes training sequences of {needed} tokens, soft prefix included; "
            f"{reader.name} holds {reader.max_tokens}; lower hub.max_tokens or use another model"
        )
    # The model spells marks with several tokens.
    spelling, num_pairs = reader.spelling, config.hub.max_pairs
    marks = len(spelling.input_mark) + len(spelling.output_mark) - 2
    longest -= len(spelling.start) + num_pairs * marks
    plain = config.data.model_copy(update={"scaling": type(config.data.scaling)()})
    source = PairSource(base, plain, config.seed, hybrid.trunk.device)
    sequences = Sequences(source, hybrid.trunk.dtype, num_pairs=num_pairs, longest=longest)
    steps: list[Step] = []
    for number in range(config.training.grad_accum):
        steps.append(JointStep(hybrid, sequences, config))
        steps[-1].keeper = number == 0
    if config.trm.draft_share:
        drafts = DraftPool(sequences, config.trm, reader)
        drafts.gathered = partial(gathered, reader.layers)
        for step in steps:
            step.drafts = drafts
    hybrid.train()
    return steps


def hub_metrics(counts: Tensor) -> dict[str, float]:
    """As `steps.metrics_of`, and the loss of what the reader writes behind a soft prefix."""
    sums = dict(zip(COUNTS, counts[TRM].tolist(), strict=True))
    return metrics_of(counts) | {"written_loss": sums["written_loss"] / max(sums["rows"], 1.0)}
