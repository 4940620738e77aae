"""TRM's supervision steps over many rows: those that are done leave, waiting ones take their room.

A row leaves after its last step, with what that step says. With halting its last step is the first
whose halting logit is positive, as in training; else all rows take the same number of steps. What a
row takes from step to step (input embedding, latents) lies on one axis of tokens, which is laid out
anew where rows leave.

On a GPU the axis has a static length, so that one compiled function, and one captured graph where
there is enough to do, serves every step. On a CPU it is as long as its rows.

Legend: T tokens of the axis, R rows, D width, V cell codes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.training.step import GraphedStep
from arctrm.trm.layers import Sequences
from arctrm.trm.model import TRM, Latents
from arctrm.trm.packing import longest_row, sequences, token_map

LEAST_ROOM = 1 / 8
"""Share of a static axis that must have become free before it is laid out anew, which costs about
as much as so much of a step."""
BATCHES_TO_CAPTURE = 4
"""Batches from which a graph pays: it is warmed up by two empty steps."""


class Size(NamedTuple):
    """Of a row."""

    length: int
    """Tokens: prefix slots and cells."""
    width: int
    """Columns of its canvas."""


class Begun(NamedTuple):
    """Rows before their first step, one after the other; all [t, D] in the compute dtype."""

    x: Tensor
    """Input embedding, the same at every step."""
    z_H: Tensor
    z_L: Tensor


class Refined(NamedTuple):
    """What the last step of a row says."""

    codes: np.ndarray
    """uint8 [cells]."""
    q_halt: float
    steps: int
    """Supervision steps that it took."""


@dataclass(eq=False)
class _Row:
    """A row on the axis."""

    number: int
    size: Size
    begin: int = 0
    """Its first token."""
    steps: int = 0
    done: bool = False


class _Axis(NamedTuple):
    """All that a step reads, and the latents, which it moves on."""

    x: Tensor
    """[T, D]"""
    z_H: Tensor
    z_L: Tensor
    offsets: Tensor
    """int32 [N + 1]: see `Sequences`."""
    cos: Tensor
    sin: Tensor
    first: Tensor
    """int64 [R]: first token of each row, T where the row is not there."""


def fitting(lengths: Iterable[int], num_tokens: int, num_rows: int) -> int:
    """How many of the rows, from the first on, fit into `num_tokens` and `num_rows` together."""
    count = used = 0
    for length in lengths:
        used += length
        if used > num_tokens or count == num_rows:
            break
        count += 1
    return count


class Refiner:
    """Steps of one TRM; `num_tokens` and `num_rows` bound what it works on at a time."""

    def __init__(
        self, trm: TRM, num_steps: int, halt: bool, num_tokens: int, num_rows: int, static: bool
    ):
        self.trm, self.num_steps, self.halt, self.static = trm, num_steps, halt, static
        self.num_tokens = max(num_tokens, longest_row(trm.config))
        self.num_rows = num_rows
        empty = torch.empty(0, trm.config.hidden_size, dtype=trm.dtype, device=trm.H_init.device)
        self.nothing = Begun(empty, empty, empty)
        self.axis, self.seq = self._laid_out([], self.nothing)
        self.codes = self.q_halt = empty
        self.step: Callable[[], None] = self._step

    @torch.no_grad()
    def run(
        self, sizes: Sequence[Size], begin: Callable[[list[int]], Begun]
    ) -> Iterator[tuple[int, Refined]]:
        """What is said of each row, with its number, in the order in which they leave.

        `begin` gives the rows of some numbers, in ascending order of place, when there is room.
        """
        self._capture(sum(size.length for size in sizes))
        waiting = deque(_Row(number, size) for number, size in enumerate(sizes))
        rows: list[_Row] = []
        while waiting or rows:
            rows = self._refill(rows, waiting, begin)
            while not self._worth_a_refill(rows, waiting):
                self.step()
                for row in rows:
                    row.steps += 1
                yield from self._leaving(rows)

    def _capture(self, num_tokens: int) -> None:
        """Capture the step on the empty axis, where it has no effect."""
        capturable = self.axis.x.is_cuda and self.static and self.seq.lengths is None
        if capturable and num_tokens > BATCHES_TO_CAPTURE * self.num_tokens:
            self.step = GraphedStep(self._step, warmup=2)

    def _refill(
        self, rows: list[_Row], waiting: deque[_Row], begin: Callable[[list[int]], Begun]
    ) -> list[_Row]:
        """Lay out the rows that go on, then as many waiting ones as fit; at least one row."""
        kept = [row for row in rows if not row.done]
        room = self.num_tokens - _tokens(kept)
        count = fitting((w.size.length for w in waiting), room, self.num_rows - len(kept))
        new = [waiting.popleft() for _ in range(count)]
        begun = begin([row.number for row in new]) if new else self.nothing
        place = [np.arange(row.begin, row.begin + row.size.length) for row in kept]
        old = torch.from_numpy(np.concatenate([*place, np.zeros(0, np.int64)]))
        old = old.to(self.axis.x.device)
        present = Begun(
            *(
                torch.cat((own.index_select(0, old), fresh.to(own.dtype)))
                for own, fresh in zip(self.axis[:3], begun, strict=True)
            )
        )
        axis, seq = self._laid_out(kept + new, present)
        if self.static:
            for target, value in zip(self.axis, axis, strict=True):
                target.copy_(value)
            seq = seq._replace(offsets=self.axis.offsets, cos=self.axis.cos, sin=self.axis.sin)
        else:
            self.axis = axis
        self.seq = seq
        return kept + new

    def _laid_out(self, rows: list[_Row], present: Begun) -> tuple[_Axis, Sequences]:
        """The axis of these rows, whose values are `present`; `begin` of each is set."""
        num_rows = self.num_rows if self.static else len(rows)
        num_tokens = self.num_tokens if self.static else _tokens(rows)
        ends = np.cumsum([row.size.length for row in rows])
        for row, end in zip(rows, ends.tolist(), strict=True):
            row.begin = end - row.size.length
        sizes = torch.zeros(num_rows, 2, dtype=torch.long)
        sizes[: len(rows)] = torch.tensor([row.size for row in rows]).reshape(-1, 2)
        lengths_R, widths_R = sizes.to(self.trm.H_init.device).unbind(1)
        config = self.trm.config
        longest = longest_row(config)
        tokens = token_map(lengths_R, widths_R, num_tokens, longest, config.num_slots)
        seq = sequences(tokens, config, self.trm.dtype)
        missing = num_tokens - present.x.shape[0]
        x, z_H, z_L = (F.pad(value, (0, 0, 0, missing)) for value in present)
        return _Axis(x, z_H, z_L, seq.offsets, seq.cos, seq.sin, tokens.first), seq

    def _step(self) -> None:
        """One supervision step of all rows."""
        axis = self.axis
        latents, prediction = self.trm.supervision_step(
            Latents(axis.z_H, axis.z_L), axis.x, self.seq, axis.first
        )
        axis.z_H.copy_(latents.z_H)
        axis.z_L.copy_(latents.z_L)
        self.codes = prediction.logits.argmax(-1).to(torch.uint8)
        self.q_halt = prediction.q_halt

    def _leaving(self, rows: list[_Row]) -> Iterator[tuple[int, Refined]]:
        """The rows whose last step this was; looks at the device only where there may be some."""
        if not self.halt and all(row.done or row.steps < self.num_steps for row in rows):
            return
        said = self.q_halt[: len(rows)].tolist()
        last = [
            (row, q)
            for row, q in zip(rows, said, strict=True)
            if not row.done and (row.steps == self.num_steps or (self.halt and q > 0))
        ]
        codes = self.codes.cpu().numpy() if last else np.zeros(0, np.uint8)
        for row, q in last:
            row.done = True
            end = row.begin + row.size.length
            own = codes[row.begin + self.trm.config.num_slots : end]
            yield row.number, Refined(own, q, row.steps)

    def _worth_a_refill(self, rows: list[_Row], waiting: deque[_Row]) -> bool:
        left = [row for row in rows if not row.done]
        if not left or not self.static:
            return len(left) < len(rows) or not rows
        room = self.num_tokens - _tokens(left)
        if not waiting or room < waiting[0].size.length:
            return False
        enough_rows = len(rows) - len(left) >= LEAST_ROOM * len(rows)
        return enough_rows or _tokens(rows) - _tokens(left) >= LEAST_ROOM * self.num_tokens


def _tokens(rows: Iterable[_Row]) -> int:
    return sum(row.size.length for row in rows)
