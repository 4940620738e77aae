"""The reader's drafts of training pairs: decoded now and then, kept on the device, shown to TRM.

A draft is what the reader itself wrote, never the target: a teacher-forced state would leak the
answer. It is stored in the task's own colours and orientation, beside the true pairs, so that any
view of it can be shown by the same arithmetic that shows a view of a pair.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE, Grid, Pair
from arctrm.data.views import View
from arctrm.reader.decoding import decode
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.tokens import grid_length
from arctrm.training import reader_stream as reading
from arctrm.training.reader_stream import ReaderStream
from arctrm.training.source import INPUT, IS_TEST, OUTPUT

ROOM = MAX_SIDE * MAX_SIDE
"""Cells kept for each draft."""


class Drafter(Protocol):
    """Who writes drafts."""

    @property
    def grids(self) -> GridReader:
        """What decodes grids."""

    def prompt(self, pairs: Sequence[Pair], query: Grid, condition: tuple[int, int, int]) -> Prompt:
        """The prompt that asks for the output of `query` after complete `pairs`."""


class Question(NamedTuple):
    """What the reader is asked for one draft."""

    view: View
    pairs: list[Pair]
    """What comes before in the sequence, as the view shows it."""
    query: Grid
    """The input as the view shows it."""
    condition: tuple[int, int, int]
    """Task, dihedral, colour flag."""
    answer: Grid
    """In the task's own colours and orientation; the reader does not see it."""


class DraftPool:
    """One draft for each pair of the stream's source, whose tables it extends by the drafts.

    Draft of pair p is row `num_pairs + p` of `source.pairs`: the pair's input, and as its output
    the draft.
    """

    def __init__(self, stream: ReaderStream, only_tests: bool = False):
        """With `only_tests` TRM hears the reader about test pairs alone."""
        source = stream.source
        self.stream, self.source = stream, source
        self.num_pairs = source.pairs.shape[0]
        begin, device = source.cells.shape[0], source.device
        source.cells = torch.cat((source.cells, source.cells.new_zeros(self.num_pairs * ROOM)))
        drafts = source.pairs.clone()
        drafts[:, OUTPUT.start] = begin + torch.arange(self.num_pairs, device=device) * ROOM
        drafts[:, OUTPUT.start + 1 :] = 1
        source.pairs = torch.cat((source.pairs, drafts))
        self.begin = begin
        self.heard = source.drawable & (drafts[:, IS_TEST].bool() | (not only_tests))
        """Pairs that are drawn and about which TRM hears the reader: no others are drafted."""
        self.there = torch.zeros(self.num_pairs, dtype=torch.bool, device=device)
        self.right = torch.zeros_like(self.there)
        """Drafts that are the answer: rare on test inputs, frequent on pairs trained on."""

    def row_of(self, pair: Tensor) -> Tensor:
        """Rows of the drafts of pairs."""
        return pair + self.num_pairs

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        return {
            "drafts.cells": self.source.cells[self.begin :],
            "drafts.sizes": self.source.pairs[self.num_pairs :],
            "drafts.there": self.there,
            "drafts.right": self.right,
        }

    def write(self, pair: int, grid: Grid | None, right: bool = False) -> None:
        """Keep a draft (None: there is none for this pair), and whether it is the answer."""
        self.there[pair], self.right[pair] = grid is not None, right
        if grid is None:
            return
        place = self.begin + pair * ROOM
        cells = torch.from_numpy(np.ascontiguousarray(grid).ravel())
        self.source.cells[place : place + grid.size] = cells.to(self.source.device)
        size = torch.tensor(grid.shape, device=self.source.device)
        self.source.pairs[self.num_pairs + pair, OUTPUT.start + 1 : OUTPUT.stop] = size

    def refresh(
        self, reader: Drafter, count: int, batch_size: int, temperature: float = 0.0
    ) -> tuple[float, float]:
        """Draft at most `count` random pairs anew, each under a random view; greedily at 0.

        Returns the share of drafts that are right and their mean length in tokens.

        Random numbers come from torch's generator of the device, so that a resumed run goes on.
        """
        heard = self.heard.nonzero()[:, 0]
        chosen = heard[torch.randperm(len(heard), device=heard.device)[:count]]
        asked = self.questions(chosen)
        prompts = [reader.prompt(one.pairs, one.query, one.condition) for one in asked]
        # Longer than the answer is wrong whatever it says; some room keeps wrong sizes possible.
        bounds = [grid_length(*_roomy(one.view, one.answer)) + 1 for one in asked]
        found = decode(
            reader.grids,
            prompts,
            mode="sampled" if temperature else "greedy",
            temperature=temperature or 1.0,
            seed=int(torch.randint(2**31, (), device=self.source.device)),
            batch_size=batch_size,
            max_output_tokens=bounds,
        )
        num_right = 0
        for pair, question, one in zip(chosen.tolist(), asked, found, strict=True):
            draft = None if one.grid is None else question.view.inverse(one.grid)
            right = draft is not None and np.array_equal(draft, question.answer)
            self.write(pair, draft, right)
            num_right += right
        lengths = [one.num_tokens for one in found]
        return num_right / max(len(found), 1), sum(lengths) / max(len(found), 1)

    def questions(self, chosen: Tensor) -> list[Question]:
        """A question for each of the pairs: a random view and what comes before, as in training."""
        stream, num = self.stream, len(chosen)
        uniform = torch.rand(num, 2, device=self.source.device, dtype=torch.float64)
        task = self.source.pairs[chosen, 0]
        _, dihedral, colours = self.source.draw_views(task, uniform[:, 0])
        others = stream.others(chosen, task, uniform[:, 1])[:, : stream.num_pairs - 1]
        pairs = torch.cat((others, chosen[:, None]), dim=1)
        drawn = stream.sequences(pairs, task, dihedral, colours).cpu()
        cells = self.source.cells[: self.begin].cpu().numpy()
        table = self.source.pairs[: self.num_pairs].cpu()
        return [_question(rows, table, cells) for rows in drawn]


def _question(rows_KC: Tensor, table: Tensor, cells: np.ndarray) -> Question:
    last = rows_KC[-1]
    view = View(int(last[reading.DIHEDRAL]), tuple(last[reading.COLOURS].tolist()))

    def pair(row: Tensor) -> Pair:
        place = table[row[reading.PAIR]].tolist()
        return Pair(_grid(cells, place[INPUT]), _grid(cells, place[OUTPUT]))

    before = [pair(row) for row in rows_KC[:-1] if row[reading.LENGTH] > 0]
    own = pair(last)
    assert own.output is not None
    task, dihedral, flag = last[[reading.TASK, reading.DIHEDRAL, reading.FLAG]].tolist()
    return Question(
        view,
        [
            Pair(view.apply(p.input), None if p.output is None else view.apply(p.output))
            for p in before
        ],
        view.apply(own.input),
        (task, dihedral, flag),
        own.output,
    )


def _grid(cells: np.ndarray, place: list[int]) -> Grid:
    offset, height, width = place
    return cells[offset : offset + height * width].reshape(height, width)


def _roomy(view: View, answer: Grid) -> tuple[int, int]:
    height, width = view.apply(answer).shape
    return min(MAX_SIDE, height + 2), min(MAX_SIDE, width + 2)
