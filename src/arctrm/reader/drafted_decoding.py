"""Greedy decoding by the tiny reader on a CPU, which follows drafts as far as they are its own.

A draft is a grid that may well come out: the answer under another view, or the input of a task that
changes little. Its tokens are read at once, as those of a prompt, which costs a fraction of writing
them one by one; those that the reader would have chosen itself are kept, and behind the first that
it would not it goes on with its own choice. What comes out is what comes out without a draft, but
for rounding (greedy speculative decoding, Leviathan et al. 2023, with drafts instead of a smaller
model).

Every row has keys and values of its own (`reader.own_rows`): what was read of a draft in vain is
overwritten.

Legend: T tokens fed now, 12 choices.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import Grid
from arctrm.reader import grammar
from arctrm.reader.grammar import END, ROW_END, UNWRITTEN, GridState
from arctrm.reader.interface import Prompt
from arctrm.reader.own_rows import HeldRow, OwnRows
from arctrm.reader.rows import split
from arctrm.reader.tiny import TinyReader

FIRST_WINDOW, LEAST_WINDOW, MOST_WINDOW = 32, 8, 256
"""Tokens of a draft that are read at once: at first; after a wrong one; after right ones."""
MOST_FAILURES = 6
"""Readings of a draft in a row of which less than two tokens were kept: it is dropped."""


@dataclass(eq=False, kw_only=True)
class _Row(HeldRow):
    """A prompt that is being continued."""

    bound: int
    choices: list[int] = field(default_factory=list)
    log_p: float = 0.0
    y: int = 0
    x: int = 0
    width: int = 0
    at: tuple[int, int] = (0, 0)
    """Row and column of the last choice."""
    path: np.ndarray | None = None
    """Choices that the draft spells; where the row has chosen already, its own."""
    states: np.ndarray | None = None
    """int64 [3, n]: row, column and width before each of them."""
    window: int = FIRST_WINDOW
    failures: int = 0

    def follow(self, draft: Grid) -> None:
        """Begin with a draft."""
        self.path, state = grammar.encode_choices(draft)
        self.states = np.stack([part.numpy() for part in (state.y, state.x, state.width)])

    def take(self, choice: int, log_p: float) -> None:
        """Choose the next token."""
        index = len(self.choices)
        self.choices.append(choice)
        self.log_p += log_p
        self.at = self.y, self.x
        if choice < ROW_END:
            self.x += 1
        elif choice == ROW_END:
            self.y, self.x, self.width = self.y + 1, 0, self.x
        if self.path is not None and self.path[index] != choice:
            if max(choice, self.path[index]) < ROW_END:
                self.path[index] = choice  # the size is still that of the draft
            else:
                self.path = None

    @property
    def finished(self) -> bool:
        return self.choices[-1] == END or len(self.choices) == self.bound

    def ahead(self) -> int:
        """Tokens of the draft to read now, behind the last choice: none of them is its end."""
        if self.path is None:
            return 0
        count = len(self.choices)
        return max(0, min(self.window, len(self.path) - 1 - count, self.bound - 1 - count))

    def keep(self, read: int, best: np.ndarray, log_p: np.ndarray) -> int:
        """Keep those of `read` tokens of the draft that are the `best`; how many."""
        if not read:
            return 0
        assert self.path is not None
        assert self.states is not None
        count = len(self.choices)
        wrong = (best[:read] != self.path[count : count + read]).nonzero()[0]
        kept = int(wrong[0]) if len(wrong) else read
        self.choices += self.path[count : count + kept].tolist()
        self.log_p += float(log_p[:kept].sum())
        self.y, self.x, self.width = self.states[:, count + kept].tolist()
        if kept == read:
            self.window, self.failures = min(2 * self.window, MOST_WINDOW), 0
        else:
            self.window = max(LEAST_WINDOW, min(2 * kept, MOST_WINDOW))
            self.failures = self.failures + 1 if kept < 2 else 0
            if self.failures == MOST_FAILURES:
                self.path = None
        return kept


class DraftedDecoder:
    """Decodes batches of prompts, each with a draft or none, greedily, until `deadline` (of
    `time.monotonic`); rows that have not ended by then are given up.
    """

    def __init__(self, reader: TinyReader, max_side: int, deadline: float = math.inf):
        self.reader, self.max_side, self.deadline = reader, max_side, deadline
        self.own = OwnRows(reader)
        self.lean = self.own.lean

    def batches(self, order: Sequence[int], batch_size: int) -> list[list[int]]:
        """The prompts, in this order, at most `batch_size` together."""
        return split(order, batch_size)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Prompt],
        bounds: Sequence[int],
        noise_TB12: Tensor | None,
        drafts: Sequence[Grid | None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choices int64 [B, T], UNWRITTEN behind the last, and each row's log-probability [B]."""
        assert noise_TB12 is None
        rows = [self._row(*given) for given in zip(prompts, bounds, drafts, strict=True)]
        condition = self.lean.condition(torch.tensor([p.condition for p in prompts]))
        best, log_p = self._choose(self.own.read(rows, prompts), grammar.start(len(rows)))
        active = list(range(len(rows)))
        while active:
            for index, choice, own in zip(active, best.tolist(), log_p.tolist(), strict=True):
                rows[index].take(choice, own)
            active = [index for index in active if not rows[index].finished]
            if time.monotonic() >= self.deadline:
                break
            if active:
                best, log_p = self._go_on([rows[index] for index in active], condition[active])
        choices = np.full((len(rows), max(bounds)), UNWRITTEN, dtype=np.int64)
        for row, own in zip(choices, rows, strict=True):
            row[: len(own.choices)] = own.choices
        return choices, np.array([row.log_p for row in rows])

    def _row(self, prompt: Prompt, bound: int, draft: Grid | None) -> _Row:
        held = self.own.room(len(prompt.tokens) + bound)
        row = _Row(start=prompt.output_start, held=held, bound=bound)
        if draft is not None and max(draft.shape) <= self.max_side:
            row.follow(draft)
        return row

    def _go_on(self, rows: Sequence[_Row], condition: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Feed the last choice of each row and what comes next of its draft, of which the right
        part is kept; the best next choice of each row, and its log-probability.
        """
        tokens, at, states, lengths = [], [], [], []
        for row in rows:
            count, read = len(row.choices), row.ahead()
            tokens.append(np.array(row.choices[-1:]))
            at.append(np.array(row.at)[:, None])
            states.append(np.array([[row.y], [row.x], [row.width]]))
            if read:
                assert row.path is not None
                assert row.states is not None
                tokens.append(row.path[count : count + read])
                at.append(row.states[:2, count : count + read])
                states.append(row.states[:, count + 1 : count + read + 1])
            lengths.append(1 + read)
        y, x = torch.from_numpy(np.concatenate(at, axis=1))
        spans = torch.tensor(lengths)
        start = torch.tensor([row.start for row in rows]).repeat_interleave(spans)
        hidden = self.own.append(
            rows,
            self.lean.grid_ids[torch.from_numpy(np.concatenate(tokens))],
            self.reader.output_positions(start, 0, y, x),
            condition.repeat_interleave(spans, dim=0),
            lengths,
        )
        y, x, width = torch.from_numpy(np.concatenate(states, axis=1))
        state = GridState(y, x, width, torch.zeros(len(y), dtype=torch.bool))
        best, log_p = self._choose(hidden, state)
        chosen, begin = [], 0
        for row, length in zip(rows, lengths, strict=True):
            own = slice(begin, begin + length)
            kept = row.keep(length - 1, best[own], log_p[own])
            row.length -= length - 1 - kept
            chosen.append(begin + kept)
            begin += length
        return best[chosen], log_p[chosen]

    def _choose(self, hidden: Tensor, state: GridState) -> tuple[np.ndarray, np.ndarray]:
        log_p = grammar.log_probabilities(self.lean.logits(hidden), state, self.max_side)
        best = log_p.max(dim=-1)
        return best.indices.numpy(), best.values.double().numpy()
