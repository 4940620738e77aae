"""Batches for joint training: sequences for the reader and the same pairs as rows for TRM.

A sequence is K pairs of one task under one view; each pair is one row of TRM, which may see of the
reader's states only what stands before its own output: every pair is a held-out probe, and the
last one is the query. The reader reads each sequence twice: with the true outputs, for its own
loss, and with the last output replaced by its own draft (or cut off), for TRM.

Where contexts are told apart by a contrastive loss, sequences come in twos of the same task with
different pairs.

Legend: N sequences, K pairs in each, R = N x K rows of TRM; T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.adapters.draft import INPUT, OUTPUT
from arctrm.data.task import MAX_SIDE, NUM_COLOURS
from arctrm.hybrid import NO_CELL, ReaderStates, Rows
from arctrm.reader.tokens import INPUT_PART, OUTPUT_PART, SIDE, grid_length, part_of
from arctrm.training import reader_stream as reading
from arctrm.training import stream as canvases
from arctrm.training.drafts import DraftPool
from arctrm.training.reader_stream import ReaderBatch, ReaderStream
from arctrm.training.stream import PairStream
from arctrm.trm.packing import sequences


class JointBatch(NamedTuple):
    """What one joint training step computes on."""

    sequences: Tensor
    """int64 [N, K, columns]: the reader's rows (length 0: none)."""
    drafted: Tensor
    """bool [N]: whether the last pair of the sequence is shown with a draft."""
    rows: Rows
    """TRM's rows, R = N x K."""
    labels: Tensor
    """int64 [T]: cell codes of the outputs, IGNORE where there is none."""
    heard: Tensor
    """bool [R]: rows that hear the reader."""


DRAFT_ROOM = grid_length(MAX_SIDE, MAX_SIDE)
"""Tokens, at most, by which a draft is longer than the answer."""


class JointStream:
    """Draws sequences and lays them out for both models."""

    def __init__(
        self,
        reader: ReaderStream,
        trm: PairStream,
        drafts: DraftPool,
        *,
        reader_tokens: int,
        trm_tokens: int,
        num_sequences: int,
        num_soft: int,
        no_draft_share: float,
        right_draft_share: float = 1.0,
        trm_dtype: torch.dtype,
        in_twos: bool = True,
    ):
        """Budgets of tokens for both models; `num_soft` vectors of the soft prefix.

        `in_twos`: the sequences 2i and 2i + 1 are of one task, else each is drawn for itself.
        Of the rows, `no_draft_share` are shown no draft, and of those whose draft is right all but
        `right_draft_share`.
        """
        self.reader, self.trm, self.drafts = reader, trm, drafts
        self.reader_tokens, self.trm_tokens = reader_tokens, trm_tokens
        self.num_sequences, self.num_soft = num_sequences, num_soft
        self.no_draft_share, self.right_draft_share = no_draft_share, right_draft_share
        self.trm_dtype, self.in_twos = trm_dtype, in_twos
        self.device = reader.device

    @property
    def longest_shown(self) -> int:
        """Tokens of the longest sequence that TRM may be told of."""
        return self.reader.longest + DRAFT_ROOM + self.num_soft

    def draw(self) -> JointBatch:
        """A fresh batch: as many of `num_sequences` sequences as both budgets hold."""
        return self.lay_out(*self._sequences())

    def lay_out(self, drawn: Tensor, drafted: Tensor) -> JointBatch:
        """The batch of sequences [N, K, columns]; those that exceed a budget are left out."""
        rows = self._trm_rows(drawn)
        fits = self._fitting(drawn, drafted, rows)
        drawn = torch.where(fits[:, None, None], drawn, 0)
        rows = torch.where(fits.repeat_interleave(drawn.shape[1])[:, None], rows, 0)
        tokens = self.trm.lay_out(rows, self.trm_tokens)
        codes, labels = self.trm.cells_of(rows, tokens)
        seq = sequences(tokens, self.trm.trm, self.trm_dtype)
        embedding, dihedral = rows[:, canvases.EMBEDDING], rows[:, canvases.DIHEDRAL]
        packed = Rows(embedding, dihedral, rows[:, canvases.FLAG], codes, tokens, seq)
        heard = (rows[:, canvases.LENGTH] > 0) & self.drafts.heard[rows[:, canvases.PAIR]]
        return JointBatch(drawn, drafted & fits, packed, labels, heard)

    def _sequences(self) -> tuple[Tensor, Tensor]:
        """N sequences, int64 [N, K, columns], and which are shown with a draft."""
        drawn = self._twos() if self.in_twos else self.reader.draw(self.num_sequences)
        return drawn, self._shows_draft(drawn[:, -1, reading.PAIR])

    def _twos(self) -> Tensor:
        """N sequences in twos, int64 [N, K, columns]."""
        stream, half = self.reader, self.num_sequences // 2
        uniform = torch.rand(half, 2, device=self.device, dtype=torch.float64)
        last = stream.source.draw_pairs(uniform[:, 0])
        task = stream.source.pairs[last, 0]
        others = stream.others(last, task, uniform[:, 1])
        partner = torch.where(others[:, 0] >= 0, others[:, 0], last)
        context = stream.num_pairs - 1
        # Two disjoint sets of about the same size, also where the task has few pairs.
        contexts = (others[:, 1::2][:, :context], others[:, 2::2][:, :context])
        twos = torch.stack(
            [
                torch.cat((before, end[:, None]), dim=1)
                for before, end in zip(contexts, (last, partner), strict=True)
            ],
            dim=1,
        ).flatten(0, 1)
        task = task.repeat_interleave(2)
        view = torch.rand(task.shape[0], device=self.device, dtype=torch.float64)
        _, dihedral, colours = stream.source.draw_views(task, view)
        return stream.sequences(twos, task, dihedral, colours)

    def _shows_draft(self, pair_N: Tensor) -> Tensor:
        """bool [N]: the pairs that are shown with their draft, by chance."""
        chance = torch.rand(2, pair_N.shape[0], device=self.device)
        trusted = ~self.drafts.right[pair_N] | (chance[1] < self.right_draft_share)
        return self.drafts.there[pair_N] & (chance[0] >= self.no_draft_share) & trusted

    def _trm_rows(self, drawn_NKC: Tensor) -> Tensor:
        """The same pairs as TRM's rows, int64 [N x K, columns]."""
        flat = drawn_NKC.flatten(0, 1)
        rows = flat.new_zeros(flat.shape[0], canvases.NUM_COLUMNS)
        for there, here in (
            (canvases.PAIR, reading.PAIR),
            (canvases.EMBEDDING, reading.TASK),
            (canvases.DIHEDRAL, reading.DIHEDRAL),
            (canvases.FLAG, reading.FLAG),
            (canvases.COLOURS, reading.COLOURS),
        ):
            rows[:, there] = flat[:, here]
        uniform = torch.rand(flat.shape[0], 8, device=self.device, dtype=torch.float64)
        self.trm.place(rows, uniform)
        rows[:, canvases.LENGTH] *= flat[:, reading.LENGTH] > 0
        return rows

    def _fitting(self, drawn: Tensor, drafted: Tensor, rows: Tensor) -> Tensor:
        """bool [N]: the sequences, from the first on, that both budgets hold, in whole twos."""
        true = drawn[..., reading.LENGTH].sum(1)
        shown = self._shown(drawn, drafted)[..., reading.LENGTH].sum(1) + self.num_soft
        on_canvas = rows[:, canvases.LENGTH].view(drawn.shape[0], -1).sum(1)
        fits = torch.ones_like(drafted)
        for lengths, budget in (
            (true, self.reader_tokens),
            (shown, self.reader_tokens),
            (on_canvas, self.trm_tokens),
        ):
            fits = fits & (lengths.cumsum(0) <= budget)
        return fits.view(-1, 2).all(1).repeat_interleave(2)

    def _shown(self, drawn: Tensor, drafted: Tensor) -> Tensor:
        """The sequences as TRM's reader sees them: the last output a draft, or cut off."""
        last = drawn[:, -1].clone()
        draft = last.clone()
        draft[:, reading.PAIR] = self.drafts.row_of(last[:, reading.PAIR])
        draft[:, reading.LENGTH] = self.reader.lengths(draft)
        cut = last.clone()
        cut[:, reading.LENGTH] = self.reader.asked(last)
        there = last[:, reading.LENGTH] > 0
        seen = torch.where(drafted[:, None], draft, cut)
        seen = torch.where(there[:, None], seen, last)
        return torch.cat((drawn[:, :-1], seen[:, None]), dim=1)

    def true_sequences(self, batch: JointBatch) -> ReaderBatch:
        """The sequences with their true outputs, for the reader's own loss."""
        rows = batch.sequences.flatten(0, 1)
        return self.reader.pack(rows, self.num_sequences, self.reader_tokens)

    def shown_sequences(self, batch: JointBatch, with_soft: bool) -> ReaderBatch:
        """The sequences as TRM's reader sees them, `with_soft` room for a soft prefix behind.

        Rows come back as [N x (K + 1)]: the last of each sequence is the soft prefix.
        """
        shown = self._shown(batch.sequences, batch.drafted)
        soft = shown[:, -1:].clone()
        soft[..., reading.SOFT] = 1
        soft[..., reading.INDEX] += 1
        soft[..., reading.LENGTH] = self.num_soft * (soft[..., reading.LENGTH] > 0) * with_soft
        rows = torch.cat((shown, soft), dim=1)
        room = DRAFT_ROOM + self.num_soft
        return self.reader.pack(rows.flatten(0, 1), self.num_sequences, self.reader_tokens, room)

    def states(self, batch: JointBatch, shown: ReaderBatch, hidden: Tensor) -> ReaderStates:
        """What each row of TRM may see of the reader's hidden states [N, H]."""
        num, per = self.num_sequences, shown.rows.shape[0] // self.num_sequences
        lengths = shown.rows[:, reading.LENGTH].view(num, per)
        ends = lengths.flatten().cumsum(0).view(num, per)
        begin = ends[:, :1] - lengths[:, :1]
        # A probe sees up to its separator, the query everything: its draft and the soft prefix.
        asked = self.reader.asked(shown.rows).view(num, per) * (lengths > 0)
        visible = (ends - lengths - begin + asked)[:, : per - 1]
        last = (ends[:, -1] - begin[:, 0])[:, None]
        visible = torch.cat((visible[:, :-1], last), dim=1) * (lengths[:, : per - 1] > 0)
        visible = visible.flatten() * batch.heard
        return ReaderStates(
            hidden,
            *self._cells(batch, shown, per),
            begin.expand(-1, per - 1).flatten(),
            visible,
        )

    def _cells(
        self, batch: JointBatch, shown: ReaderBatch, per: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row of TRM, kind, y and x of each reader token, int64 [N]."""
        sequence = torch.div(shown.row, per, rounding_mode="floor")
        index = shown.row % per
        there = (shown.row < shown.rows.shape[0]) & (index < per - 1)
        row = sequence * (per - 1) + index
        there = there & batch.heard[torch.where(there, row, 0)]
        part = part_of(shown.positions)
        is_cell = there & (shown.tokens < NUM_COLOURS)
        query = (index == per - 2) & batch.drafted[torch.where(there, sequence, 0)]
        kind = torch.full_like(shown.row, NO_CELL)
        kind = torch.where(is_cell & (part == INPUT_PART), INPUT, kind)
        kind = torch.where(is_cell & (part == OUTPUT_PART) & query, OUTPUT, kind)
        y = torch.div(shown.positions, SIDE, rounding_mode="floor") % SIDE
        return row, kind, y, shown.positions % SIDE
