"""The reader's training rows: drawn, serialised and packed on the device, without a host sync.

A sequence is one pair, or (form "task") other pairs of the same task before it, all under one view.
Sequences wait in a queue that keeps its order, so that a long one which does not fit now comes
first next time. Shapes are static: a captured CUDA graph can replay the whole thing.

A hub reader's sequences are the same but for the marks around the grids. Tokens are codes: those of
the tiny reader, whose ids they are, and from `FIRST_MARK` on the tokens of such marks.

Legend: T tokens, N sequences, K pairs in a sequence, R = N x K rows (pairs).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.config.reader import PAIR_TOKENS, ReaderConfig
from arctrm.data.task import NUM_COLOURS
from arctrm.reader.attention import Packing, block_packing, new_packing
from arctrm.reader.tokens import (
    END,
    INPUT_PART,
    INVERSE,
    OUTPUT_PART,
    PAD,
    PARTS_PER_PAIR,
    PREFIX,
    ROW_END,
    SEPARATOR_PART,
    SIDE,
    START_PART,
    Marks,
)
from arctrm.training import mosaics, scales
from arctrm.training.losses import IGNORE
from arctrm.training.mosaics import Mosaics, Size
from arctrm.training.scales import Scales
from arctrm.training.source import INPUT, OUTPUT, PairSource, same_colours
from arctrm.trm.packing import dummy_lengths

# Columns of a row: which pair, seen how, where in its sequence; length 0: no pair. A row that is
# SOFT is no pair but a soft prefix. FLAG: whether colours are kept, INVERSE more where the input is
# asked for.
# SHOWN are the columns of `Scales`, SCALE the first of them; BESIDE those of `Mosaics`.
PAIR, TASK, DIHEDRAL, FLAG, INDEX, LENGTH, SOFT, SCALE = range(8)
SHOWN = slice(SCALE, SCALE + scales.NUM_COLUMNS)
COLOURS = slice(SHOWN.stop, SHOWN.stop + NUM_COLOURS)
BESIDE = slice(COLOURS.stop, COLOURS.stop + mosaics.NUM_COLUMNS)
SECOND, MOSAIC = (BESIDE.start + column for column in (mosaics.SECOND, mosaics.AXIS))
NUM_COLUMNS = BESIDE.stop

CONTEXT_WINDOW = 16
"""Pairs of a task, at least, among which those that come first are drawn."""


class ReaderBatch(NamedTuple):
    """What one training step of the reader computes on."""

    rows: Tensor
    """int64 [R, columns]."""
    tokens: Tensor
    """int64 [T]: codes."""
    positions: Tensor
    """int64 [T]: packed positions."""
    labels: Tensor
    """int64 [T]: the next token where it belongs to an output, else IGNORE."""
    row: Tensor
    """int64 [T]: row of the token; R or more: no row."""
    packing: Packing
    num_sequences: int


class ReaderStream:
    """Packs sequences of `source`'s pairs; `dtype` is the arithmetic of the layers."""

    def __init__(
        self,
        source: PairSource,
        config: ReaderConfig,
        dtype: torch.dtype,
        marks: Marks = Marks(),
        by_blocks: bool = False,
        alone: bool = False,
    ):
        """`by_blocks`: attention goes by blocks, for a compiled reader on a GPU. `alone`: some
        sequences are shown larger, as `reader.scaling` says, some are two pairs, as
        `reader.mosaic_share` does, and some ask for the input, as `reader.inverse_share` does.
        """
        self.source, self.config, self.dtype, self.marks = source, config, dtype, marks
        self.by_blocks = by_blocks
        self.num_pairs = config.pairs_per_sequence
        self.window = max(CONTEXT_WINDOW, 2 * self.num_pairs)
        self.seen_whole = config.sees_inputs_whole
        self.longest = marks.length(config.longest_sequence, self.num_pairs)
        """Tokens of the longest sequence."""
        order = source.pairs[:, 0].argsort(stable=True)
        self.by_task = order[source.drawable[order]]
        counts = torch.bincount(source.pairs[self.by_task, 0], minlength=source.fixed.shape[0])
        self.task_count, self.task_begin = counts, counts.cumsum(0) - counts
        self.device = source.device
        self.scales = Scales(config.scaling, self.device, enabled=alone)
        self.mosaics = Mosaics(source, config.mosaic_share if alone else 0.0, config.scaling.sides)
        self.inverse_share = config.inverse_share if alone else 0.0
        heads = marks.start + marks.before_input
        self.head_codes = torch.tensor(heads, device=self.device)
        self.output_codes = torch.tensor(marks.before_output, device=self.device)

    def draw(self, count: int) -> Tensor:
        """`count` fresh sequences, int64 [count, K, columns]; the pair drawn by weight is last."""
        uniform = torch.rand(count, 3, device=self.device, dtype=torch.float64)
        last = self.source.draw_pairs(uniform[:, 0])
        task = self.source.pairs[last, 0]
        inverse = None
        if self.inverse_share:
            inverse = torch.rand(count, device=self.device) < self.inverse_share
        _, dihedral, colours = self.source.draw_views(task, uniform[:, 1], inverse)
        others = self.others(last, task, uniform[:, 2])
        pairs = torch.cat((others[:, : self.num_pairs - 1], last[:, None]), dim=1)
        shown = beside = None
        if self.scales.enabled:
            shown = self.draw_scales(pairs, dihedral, colours[:, 0])
        if self.mosaics.enabled:
            beside = self.mosaics.draw(last, others[:, 0], dihedral)
            if shown is not None:  # what is shown larger is one pair
                beside[:, mosaics.AXIS] *= shown[:, scales.SCALE] == 0
        return self.sequences(pairs, task, dihedral, colours, shown, inverse, beside)

    def mean_length(self, count: int) -> float:
        """Tokens of a sequence, the mean of `count` drawn ones."""
        return float(self.draw(count)[..., LENGTH].sum(1).double().mean())

    def draw_scales(self, pairs: Tensor, dihedral: Tensor, background: Tensor) -> Tensor:
        """Columns of `Scales` [n, 4] of sequences of pairs [n, K], all of which are shown alike."""
        there = pairs >= 0
        rows = self.source.pairs[pairs.clamp(min=0)].flatten(0, 1)
        turns = dihedral.repeat_interleave(pairs.shape[1])
        sizes = (self.source.seen_size(rows[:, grid], turns) for grid in (INPUT, OUTPUT))
        largest = (torch.maximum(*both) for both in zip(*sizes, strict=True))
        height, width = ((side.view_as(pairs) * there).amax(1) for side in largest)
        same = (self.source.same_sizes(rows).view_as(pairs) | ~there).all(1)
        return self.scales.draw(height, width, same, background)

    def sequences(
        self,
        pairs: Tensor,
        task: Tensor,
        dihedral: Tensor,
        colours: Tensor,
        shown: Tensor | None = None,
        inverse: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Rows int64 [n, K, columns] of pairs [n, K] (-1: none) under one view per sequence, as the
        columns of `Scales` and of `Mosaics` say; with input and output exchanged where `inverse`,
        bool [n].
        """
        rows = torch.zeros(*pairs.shape, NUM_COLUMNS, dtype=torch.long, device=self.device)
        rows[..., PAIR] = pairs.clamp(min=0)
        rows[..., TASK] = task[:, None]
        rows[..., DIHEDRAL] = dihedral[:, None]
        rows[..., FLAG] = same_colours(colours)[:, None]
        if inverse is not None:
            rows[..., FLAG] += INVERSE * inverse[:, None]
        rows[..., COLOURS] = colours[:, None]
        if shown is not None:
            rows[..., SHOWN] = shown[:, None]
        if beside is not None:
            rows[..., BESIDE] = beside[:, None]
        rows[..., INDEX] = 1
        there = self._fitting(self.lengths(rows.flatten(0, 1)).view_as(pairs) * (pairs >= 0)) > 0
        rows[..., INDEX] = there.cumsum(1) - 1
        rows[..., LENGTH] = self.lengths(rows.flatten(0, 1)).view_as(pairs) * there
        return rows

    def others(self, last: Tensor, task: Tensor, uniform: Tensor) -> Tensor:
        """Distinct other pairs of each task in random order, int64 [n, window]; -1 behind.

        Of a task with many pairs they come from a random window; none has the weight zero.
        """
        count, begin = self.task_count[task][:, None], self.task_begin[task][:, None]
        window = torch.arange(self.window, device=self.device)
        place = (window + (uniform[:, None] * count).long()) % count
        pairs = self.by_task[begin + place]
        absent = (window >= count) | (pairs == last[:, None])
        keys = torch.rand(pairs.shape, device=self.device) + 2 * absent
        keys, order = keys.sort(1)
        return torch.where(keys < 2, pairs.gather(1, order), -1)

    def lengths(self, rows: Tensor) -> Tensor:
        """Tokens [R] of complete pairs."""
        given, (height, width) = self._sizes(rows, self._grids(rows))
        return self._before_output(rows, given) + height * (width + 1) + 1

    def asked(self, rows: Tensor) -> Tensor:
        """Tokens [R] of each row before its output."""
        return self._before_output(rows, self._sizes(rows, self._grids(rows))[0])

    def _before_output(self, rows: Tensor, given: Size) -> Tensor:
        height, width = given
        return self._heads(rows) + height * (width + 1) + len(self.marks.before_output)

    def _grids(self, rows: Tensor, column: int = PAIR) -> tuple[Tensor, Tensor]:
        """The grids (offset, height, width) [n, 3] that are given and asked for in each row, of its
        pair or of its SECOND one.
        """
        pair = self.source.pairs[rows[:, column]]
        given, asked = pair[:, INPUT], pair[:, OUTPUT]
        if not self.inverse_share:
            return given, asked
        inverse = (rows[:, FLAG] >= INVERSE)[:, None]
        return torch.where(inverse, asked, given), torch.where(inverse, given, asked)

    def _sizes(self, rows: Tensor, grids: tuple[Tensor, Tensor]) -> list[Size]:
        """Height and width [n] of what is given and of what is asked for, as rows show them;
        `grids` of their pairs.
        """
        turns = rows[:, DIHEDRAL]
        own = [self.source.seen_size(grid, turns) for grid in grids]
        own = [self.scales.larger(*size, rows[:, SHOWN]) for size in own]
        if not self.mosaics.enabled:
            return own
        other = [self.source.seen_size(grid, turns) for grid in self._grids(rows, SECOND)]
        axis = rows[:, MOSAIC]
        return [self.mosaics.size(*both, axis) for both in zip(own, other, strict=True)]

    def _heads(self, rows: Tensor) -> Tensor:
        """Tokens [R] before each row's input."""
        first = rows[:, INDEX] == 0
        return len(self.marks.before_input) + first * len(self.marks.start)

    def _fitting(self, lengths_NK: Tensor) -> Tensor:
        """Lengths with 0 for the pairs that would make a sequence longer than allowed."""
        from_the_end = lengths_NK.flip(1).cumsum(1).flip(1)
        longest = self.longest - len(self.marks.start)
        return torch.where(from_the_end <= longest, lengths_NK, 0)

    def next_batch(self, queue_NKC: Tensor, num_tokens: int) -> ReaderBatch:
        """Take as many sequences as fit from the queue, in order, and refill it in place."""
        num_sequences = queue_NKC.shape[0]
        fits = queue_NKC[..., LENGTH].sum(1).cumsum(0) <= num_tokens
        rows = torch.where(fits[:, None, None], queue_NKC, 0).flatten(0, 1)
        waiting = torch.cat((queue_NKC, self.draw(num_sequences)))
        index = torch.arange(num_sequences, device=self.device) + fits.sum()
        queue_NKC.copy_(waiting[index])
        return self.pack(rows, num_sequences, num_tokens)

    def pack(self, rows: Tensor, num_sequences: int, num_tokens: int, room: int = 0) -> ReaderBatch:
        """Lay rows [R, columns] of `num_sequences` sequences on an axis of `num_tokens`.

        A row whose length is less than its pair's ends early. Sequences may be longer than usual
        by `room`.
        """
        longest = self.longest + room
        longest_part = longest if not self.seen_whole else PAIR_TOKENS // 2 + 1 + room
        lengths = rows[:, LENGTH]
        unused = dummy_lengths(num_tokens, num_tokens - lengths.sum(), longest_part)
        ends = torch.cat((lengths, unused)).cumsum(0)
        token = torch.arange(num_tokens, device=self.device)
        row = torch.searchsorted(ends, token, right=True)
        begins = torch.cat((ends.new_zeros(1), ends))
        real = row < rows.shape[0]
        tokens, positions, outputs = self._tokens(rows[row * real], token - begins[row])
        following = torch.cat((tokens[1:], tokens[:1]))
        labels = torch.where(real & outputs, following, IGNORE)
        firsts = begins[: rows.shape[0]].view(num_sequences, -1)[:, 0]
        offsets = torch.cat((firsts, begins[rows.shape[0] :])).to(torch.int32)
        prompts = self._prompts(rows, num_sequences, offsets.shape[0] - 1)
        if self.by_blocks:
            packing = block_packing(offsets, num_tokens, longest, prompts)
        else:
            packing = new_packing(offsets, longest, self.dtype, prompts, longest_part)
        return ReaderBatch(
            rows,
            torch.where(real, tokens, PAD),
            torch.where(real, positions, 0),
            labels,
            row,
            packing,
            num_sequences,
        )

    def _prompts(self, rows: Tensor, num_sequences: int, num_slots: int) -> Tensor | None:
        """Tokens of each of `num_slots` sequences that see each other, those that are not there
        included; None where the reader sees inputs causally.
        """
        if not self.seen_whole:
            return None
        firsts = rows.view(num_sequences, -1, rows.shape[1])[:, 0]
        prompts = self.asked(firsts).minimum(firsts[:, LENGTH])
        return torch.cat((prompts, prompts.new_zeros(num_slots - num_sequences)))

    def _tokens(self, row: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions, and "the next token belongs to the output", [T], at `slot` of each
        token's row [T, columns].
        """
        grids = self._grids(row)
        (in_height, in_width), (out_height, out_width) = self._sizes(row, grids)
        head = self._heads(row)
        separator = head + in_height * (in_width + 1)
        body = separator + len(self.marks.before_output)
        end = body + out_height * (out_width + 1)
        after = slot >= separator
        width = torch.where(after, out_width, in_width)
        place = (slot - torch.where(after, body, head)).clamp(min=0)
        y = torch.div(place, width + 1, rounding_mode="floor")
        x = place % (width + 1)
        # Marks stand at (0, 0) of parts of their own, END below the last row.
        opening, between = slot < head, after & (slot < body)
        y, x = (torch.where(opening | between, 0, value) for value in (y, x))
        inside = ~opening & ~between & (x < width) & (slot < end)
        colour = self._colours(row, grids, after, y, x, inside)
        tokens = torch.where(inside, colour, ROW_END)
        part = torch.where(after, OUTPUT_PART, INPUT_PART)
        from_end = len(self.head_codes) - head  # later pairs have no start
        for at, token, mark_part in (
            (opening, _at(self.head_codes, slot + from_end), START_PART),
            (between, _at(self.output_codes, slot - separator), SEPARATOR_PART),
            (slot == end, END, OUTPUT_PART),
        ):
            tokens, part = torch.where(at, token, tokens), torch.where(at, mark_part, part)
        soft = row[:, SOFT].bool()
        tokens, part = torch.where(soft, PREFIX, tokens), torch.where(soft, START_PART, part)
        y, x = torch.where(soft, 0, y), torch.where(soft, slot, x)
        part = part + row[:, INDEX] * PARTS_PER_PAIR
        is_output = (slot >= body - 1) & (slot < end) & (slot + 1 < row[:, LENGTH]) & ~soft
        return tokens, (part * SIDE + y) * SIDE + x, is_output

    def _colours(
        self,
        row: Tensor,
        grids: tuple[Tensor, Tensor],
        after: Tensor,
        y: Tensor,
        x: Tensor,
        inside: Tensor,
    ) -> Tensor:
        """Colours int64 [T] at (y, x) of the second of each token's `grids`, where `after`, or of
        the first; meaningless where not `inside`.
        """
        turns = row[:, DIHEDRAL]
        grid = self._chosen(grids, after)
        size = self.source.seen_size(grid, turns)
        empty = torch.zeros_like(inside)
        if self.mosaics.enabled:
            axis = row[:, MOSAIC]
            later, y, x = self.mosaics.place(y, x, size, axis)
            grid = self._chosen((grid, self._chosen(self._grids(row, SECOND), after)), later)
            size = self.source.seen_size(grid, turns)
            empty = (axis != mosaics.ALONE) & ((y >= size[0]) | (x >= size[1]))
        y, x, filled = self.scales.cells(y, x, *size, row[:, SHOWN])
        there = inside & ~filled & ~empty
        colour = self.source.colour_at(grid, turns, row[:, COLOURS], y, x, there)
        colour = torch.where(filled, row[:, SHOWN][:, scales.FILL], colour)
        return torch.where(empty, row[:, COLOURS.start], colour)

    @staticmethod
    def _chosen(grids: tuple[Tensor, Tensor], second: Tensor) -> Tensor:
        """The second of two grids [T, 3] where `second`, bool [T], else the first."""
        return torch.where(second[:, None], grids[1], grids[0])


def _at(codes: Tensor, place: Tensor) -> Tensor:
    """Codes at `place`, any of them where there is none."""
    return codes[place.clamp(0, codes.shape[0] - 1)]
