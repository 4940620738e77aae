"""Packed training sequences: drawn, spelt and laid side by side on the device, without a host sync.

A sequence is one pair, or (hub readers) other pairs of the same task before it, all under one view.
In the TRM voice it is seen whole; in the reader voice its prompt is, and every later token sees the
sequence up to itself. Sequences wait in a queue that keeps its order, so that a long one which does
not fit now comes first next time. Shapes are static: a captured CUDA graph can replay it all.

Legend: T tokens, N sequences, K pairs in a sequence, R = N x K rows (pairs), n any rows.
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.config import PAIR_TOKENS
from arctrm.data.task import NUM_COLOURS
from arctrm.model import layout
from arctrm.model.attention import Kernel, Spans, block_spans, spans
from arctrm.model.layout import DIHEDRAL, INVERSE, KEEPS_COLOURS, SCALE, TASK
from arctrm.train import scaling
from arctrm.train.losses import IGNORE
from arctrm.train.source import INPUT, OUTPUT, PairSource

# Columns of a row: its condition (`layout.Condition`), whose last is the first of the columns of
# `Scales`; which pair, its place in the sequence, its tokens (0: no pair), colours of the view.
SHOWN = slice(SCALE, SCALE + scaling.NUM_COLUMNS)
PAIR, INDEX, LENGTH = range(SHOWN.stop, SHOWN.stop + 3)
COLOURS = slice(LENGTH + 1, LENGTH + 1 + NUM_COLOURS)
NUM_COLUMNS = COLOURS.stop

CONTEXT_WINDOW = 16  # pairs of a task, at least, among which those that come first are drawn
DUMMY = 256  # tokens of the first dummy sequences: attention costs their square


class Batch(NamedTuple):
    """Packed sequences; the end of the axis may hold dummies, which belong to no row."""

    rows: Tensor  # int64 [R, columns]
    tokens: Tensor  # int64 [T]: ids of the trunk
    positions: Tensor  # int64 [T]: packed positions
    labels: Tensor  # int64 [T]: the next token where it belongs to an output, else IGNORE
    row: Tensor  # int64 [T]: row of the token; R or more: no row
    slot: Tensor  # int64 [T]: place of the token in its row
    prompts: Tensor  # int64: tokens of each sequence (or dummy) before the output of its first pair
    seen: Spans
    num_sequences: int

    @property
    def condition(self) -> Tensor:
        """int64 [R, 5]: see `layout.Condition`."""
        return self.rows[:, : layout.NUM_CONDITIONS]

    @property
    def own_row(self) -> Tensor:
        """int64 [T]: `row`, and the last row for tokens of none."""
        return self.row.clamp(max=self.rows.shape[0] - 1)


@dataclass(eq=False)
class Sequences:
    """Packs sequences of `source`'s pairs; `dtype` is the arithmetic of the layers."""

    source: PairSource
    dtype: torch.dtype
    _: KW_ONLY
    whole: bool = False  # sequences are seen whole (TRM voice)
    inverse_share: float = 0.0  # of the sequences ask for the input of an output
    compiled: Kernel | None = None  # of the attention, in compiled code on a GPU
    num_pairs: int = 1  # of a sequence, at most
    longest: int = PAIR_TOKENS  # tokens of a sequence, at most

    def __post_init__(self) -> None:
        source, self.device = self.source, self.source.device
        order = source.pairs[:, TASK].argsort(stable=True)
        self.by_task = order[source.drawable[order]]
        counts = torch.bincount(source.pairs[self.by_task, TASK], minlength=len(source.fixed))
        self.task_count, self.task_begin = counts, counts.cumsum(0) - counts
        self.scales = scaling.Scales(source.data.scaling, source.device)

    def draw(self, count: int) -> Tensor:
        """`count` fresh sequences, int64 [count, K, columns]; the pair drawn by weight is last."""
        uniform = torch.rand(count, 3, device=self.device, dtype=torch.float64)
        last = self.source.draw_pairs(uniform[:, 0])
        task = self.source.pairs[last, TASK]
        share = torch.rand(count, device=self.device)
        inverse = share < self.inverse_share if self.inverse_share else None
        dihedral, colours = self.source.draw_views(task, uniform[:, 1], inverse)
        pairs = self.with_others(last, uniform[:, 2])
        shown = self.draw_scales(pairs, dihedral, colours[:, 0]) if self.scales.enabled else None
        return self.sequences(pairs, dihedral, colours, shown, inverse)

    def with_others(self, last: Tensor, uniform: Tensor) -> Tensor:
        """Pairs [n, K]: before each of `last` others of its task in random order; -1: none."""
        if self.num_pairs == 1:
            return last[:, None]
        task = self.source.pairs[last, TASK]
        count, begin = self.task_count[task][:, None], self.task_begin[task][:, None]
        window = torch.arange(max(CONTEXT_WINDOW, 2 * self.num_pairs), device=self.device)
        place = (window + (uniform[:, None] * count).long()) % count
        pairs = self.by_task[begin + place]
        absent = (window >= count) | (pairs == last[:, None])
        keys = torch.rand(pairs.shape, device=self.device) + 2 * absent
        keys, order = keys.sort(1)
        others = torch.where(keys < 2, pairs.gather(1, order), -1)[:, : self.num_pairs - 1]
        return torch.cat((others, last[:, None]), dim=1)

    def draw_scales(self, pairs: Tensor, dihedral: Tensor, background: Tensor) -> Tensor:
        """Columns of `Scales` [n, 4] of sequences of pairs [n, K], all of which are shown alike."""
        there = pairs >= 0
        rows = self.source.pairs[pairs.clamp(min=0)].flatten(0, 1)
        turns = dihedral.repeat_interleave(pairs.shape[1])
        sizes = (self.source.seen_size(rows[:, grid], turns) for grid in (INPUT, OUTPUT))
        largest = (torch.maximum(*both) for both in zip(*sizes, strict=True))
        height, width = ((side.view_as(pairs) * there).amax(1) for side in largest)
        same = (rows[:, INPUT][:, 1:] == rows[:, OUTPUT][:, 1:]).all(1)
        same = (same.view_as(pairs) | ~there).all(1)
        return self.scales.draw(height, width, same, background)

    def sequences(
        self,
        pairs: Tensor,
        dihedral: Tensor,
        colours: Tensor,
        shown: Tensor | None = None,
        inverse: Tensor | None = None,
    ) -> Tensor:
        """Rows int64 [n, K, columns] of pairs [n, K] (-1: none) under one view per sequence."""
        rows = torch.zeros(*pairs.shape, NUM_COLUMNS, dtype=torch.long, device=self.device)
        rows[..., PAIR] = pairs.clamp(min=0)
        rows[..., TASK] = self.source.pairs[pairs[:, -1], TASK][:, None]
        rows[..., DIHEDRAL] = dihedral[:, None]
        kept = colours == torch.arange(NUM_COLOURS, device=self.device)
        rows[..., KEEPS_COLOURS] = kept.all(1, keepdim=True)
        rows[..., COLOURS] = colours[:, None]
        if inverse is not None:
            rows[..., INVERSE] = inverse[:, None]
        if shown is not None:
            rows[..., SHOWN] = shown[:, None]
        lengths = self.lengths(rows.flatten(0, 1))[0].view_as(pairs) * (pairs >= 0)
        # Pairs that would make the sequence too long are left out, the first ones before others.
        there = (lengths.flip(1).cumsum(1).flip(1) <= self.longest) & (lengths > 0)
        rows[..., INDEX] = there.cumsum(1) - 1
        rows[..., LENGTH] = lengths * there
        return rows

    def lengths(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n] of complete pairs, and those before the output."""
        given, asked = (height * (width + 1) for height, width in self._sizes(rows))
        return given + asked + 3, given + 2

    def next_batch(self, queue_NKC: Tensor, num_tokens: int) -> Batch:
        """Take as many sequences as fit from the queue, in order, and refill it in place."""
        num_sequences = queue_NKC.shape[0]
        fits = queue_NKC[..., LENGTH].sum(1).cumsum(0) <= num_tokens
        rows = torch.where(fits[:, None, None], queue_NKC, 0).flatten(0, 1)
        waiting = torch.cat((queue_NKC, self.draw(num_sequences)))
        index = torch.arange(num_sequences, device=self.device) + fits.sum()
        queue_NKC.copy_(waiting[index])
        return self.pack(rows, num_sequences, num_tokens)

    def pack(self, rows: Tensor, num_sequences: int, num_tokens: int) -> Batch:
        """Lay rows [R, columns] on an axis of `num_tokens`; a short row ends early."""
        longest, lengths = self.longest, rows[:, LENGTH]
        part = longest if self.whole or self.num_pairs > 1 else PAIR_TOKENS // 2 + 1
        unused = dummy_lengths(num_tokens, num_tokens - lengths.sum(), part)
        ends = torch.cat((lengths, unused)).cumsum(0)
        begins = torch.cat((ends.new_zeros(1), ends))
        token = torch.arange(num_tokens, device=ends.device)
        row = torch.searchsorted(ends, token, right=True)
        real, slot = row < rows.shape[0], token - begins[row]
        tokens, positions, outputs = self._tokens(rows[row * real], slot)
        labels = torch.where(real & outputs, tokens.roll(-1), IGNORE)
        firsts = begins[: rows.shape[0]].view(num_sequences, -1)[:, 0]
        offsets = torch.cat((firsts, begins[rows.shape[0] :])).to(torch.int32)
        first = rows.view(num_sequences, -1, rows.shape[1])[:, 0]
        prompts = self.lengths(first)[1].minimum(first[:, LENGTH])
        prompts = torch.cat((prompts, torch.zeros_like(unused)))
        seen_first = None if self.whole else prompts
        if self.compiled:
            kernel = self.compiled
            seen = block_spans(offsets, num_tokens, longest, seen_first, kernel=kernel)
        else:
            seen = spans(offsets, longest, self.dtype, seen_first, part)
        tokens, positions = torch.where(real, tokens, layout.PAD), torch.where(real, positions, 0)
        return Batch(rows, tokens, positions, labels, row, slot, prompts, seen, num_sequences)

    def tokens_of(self, batch: Batch, rows: Tensor) -> Tensor:
        """Tokens [T] of a batch with other `rows` of the same sizes in its rows' places."""
        tokens, _, _ = self._tokens(rows[batch.own_row], batch.slot)
        return torch.where(batch.row < len(rows), tokens, layout.PAD)

    def _grids(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.source.pairs[rows[:, PAIR]]
        given, asked = pair[:, INPUT], pair[:, OUTPUT]
        if not self.inverse_share:
            return given, asked
        inverse = rows[:, INVERSE, None].bool()
        return torch.where(inverse, asked, given), torch.where(inverse, given, asked)

    def _sizes(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        turns, shown = rows[:, DIHEDRAL], rows[:, SHOWN]
        own = (self.source.seen_size(grid, turns) for grid in self._grids(rows))
        return [self.scales.larger(*size, shown) for size in own]

    def _tokens(self, row: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions, and whether the next token belongs to the output, [T], at `slot`."""
        (in_height, in_width), (out_height, out_width) = self._sizes(row)
        separator = 1 + in_height * (in_width + 1)
        body = separator + 1
        end = body + out_height * (out_width + 1)
        after = slot >= separator
        width = torch.where(after, out_width, in_width)
        place = (slot - torch.where(after, body, 1)).clamp(min=0)
        y = torch.div(place, width + 1, rounding_mode="floor")
        x = place % (width + 1)
        opening, between = slot < 1, slot == separator
        inside = ~opening & ~between & (x < width) & (slot < end)
        tokens = torch.where(inside, self._colours(row, after, y, x, inside), layout.ROW_END)
        part = torch.where(after, layout.OUTPUT_PART, layout.INPUT_PART)
        # START and SEPARATOR stand at (0, 0) of parts of their own, END below the last row.
        for at, token, own_part in (
            (opening, layout.START, layout.START_PART),
            (between, layout.SEPARATOR, layout.SEPARATOR_PART),
            (slot == end, layout.END, layout.OUTPUT_PART),
        ):
            tokens, part = torch.where(at, token, tokens), torch.where(at, own_part, part)
        part = part + row[:, INDEX] * layout.PARTS_PER_PAIR
        is_output = (slot >= body - 1) & (slot < end) & (slot + 1 < row[:, LENGTH])
        return tokens, (part * layout.SIDE + y) * layout.SIDE + x, is_output

    def _colours(self, row: Tensor, after: Tensor, y: Tensor, x: Tensor, inside: Tensor) -> Tensor:
        """Colours [T] at (y, x) of what is asked for, where `after`, or given; else meaningless."""
        given, asked = self._grids(row)
        turns, shown = row[:, DIHEDRAL], row[:, SHOWN]
        grid = torch.where(after[:, None], asked, given)
        y, x, filled = self.scales.cells(y, x, *self.source.seen_size(grid, turns), shown)
        inside = inside & ~filled
        colour = self.source.colour_at(grid, turns, row[:, COLOURS], y, x, inside)
        return torch.where(filled, shown[:, scaling.FILL], colour)


def dummy_lengths(num_tokens: int, unused: Tensor, longest: int) -> Tensor:
    """Lengths of dummies for `unused` tokens; short ones hold what rows that do not fit leave."""
    short = min(DUMMY, longest)
    num_short = -(-min(longest, num_tokens) // short)
    num_long = -(-max(num_tokens - num_short * short, 0) // longest)
    number = torch.arange(num_short + num_long, device=unused.device)
    sizes = torch.where(number < num_short, short, longest)
    return (unused - sizes.cumsum(0) + sizes).clamp(min=0).minimum(sizes)
