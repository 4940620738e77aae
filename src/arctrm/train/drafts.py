"""The reader's drafts of training pairs: decoded now and then, kept on the device, shown to TRM.

A draft is what the reader itself wrote, never the target: a teacher-forced state would leak the
answer. It is stored in the task's own colours and orientation, beside the true pairs, so that any
view of it can be shown by the same arithmetic that shows a view of a pair.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arctrm.config import TRMConfig
from arctrm.data.base_set import BaseSet
from arctrm.data.task import MAX_SIDE, Grid, Pair
from arctrm.data.views import View
from arctrm.model.layout import NUM_CONDITIONS, Condition, grid_length
from arctrm.reader.decoding import decode
from arctrm.reader.protocol import Reader
from arctrm.train import sequences as layout
from arctrm.train.sequences import Sequences
from arctrm.train.source import OUTPUT

ROOM = MAX_SIDE * MAX_SIDE
"""Cells kept for each draft."""
SPARE_SIDE = 2
"""Rows and columns by which a draft may be larger than the answer: what is longer is wrong whatever
it says; some room keeps wrong sizes possible."""


class Question(NamedTuple):
    """What a reader is asked: the output of the last pair of a sequence."""

    view: View
    pairs: tuple[Pair, ...]
    """Pairs that come before in the sequence, as the view shows them (hub readers)."""
    query: Grid
    """The input as the view shows it."""
    condition: Condition
    answer: Grid
    """As the view shows it; the reader does not see it."""


def questions_of(base: BaseSet, rows_NKC: Tensor) -> list[Question]:
    """The questions of sequences (not shown larger, none inverse)."""
    found = []
    for rows in rows_NKC.cpu():
        last = rows[-1]
        view = View(int(last[layout.DIHEDRAL]), tuple(last[layout.COLOURS].tolist()))
        pairs = [base.pair(int(row[layout.PAIR])) for row in rows if row[layout.LENGTH] > 0]
        *before, asked = (
            Pair(*(view.apply(g) for g in (pair.input, pair.output) if g is not None))
            for pair in pairs
        )
        assert asked.output is not None
        condition = Condition(*last[:NUM_CONDITIONS].tolist())
        found.append(Question(view, tuple(before), asked.input, condition, asked.output))
    return found


class DraftPool:
    """One draft for each pair of the sequences' source, whose tables it extends by the drafts.

    Draft of pair p is row `num_pairs + p` of `source.pairs`: the pair's input, and as its output
    the draft.
    """

    def __init__(self, sequences: Sequences, config: TRMConfig, reader: Reader):
        """`reader` writes with the weights as they are when it is asked."""
        source = sequences.source
        self.sequences, self.source, self.config, self.reader = sequences, source, config, reader
        self.num_pairs, self.begin = len(source.pairs), len(source.cells)
        source.cells = torch.cat((source.cells, source.cells.new_zeros(self.num_pairs * ROOM)))
        drafts, number = source.pairs.clone(), torch.arange(self.num_pairs, device=source.device)
        drafts[:, OUTPUT.start] = self.begin + number * ROOM
        drafts[:, OUTPUT.start + 1 :] = 1
        source.pairs = torch.cat((source.pairs, drafts))
        self.there = torch.zeros(self.num_pairs, dtype=torch.bool, device=source.device)
        self.right = torch.zeros_like(self.there)
        """Drafts that are the answer: rare on test inputs, frequent on pairs trained on."""
        self.steps = torch.zeros((), dtype=torch.long)

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        return {
            "drafts.cells": self.source.cells[self.begin :],
            "drafts.sizes": self.source.pairs[self.num_pairs :],
            "drafts.there": self.there,
            "drafts.right": self.right,
            "drafts.steps": self.steps,
        }

    def prepare(self) -> None:
        """What comes before every training step: a round of drafting in every `draft_every`."""
        if int(self.steps) % self.config.draft_every == 0:
            self.refresh(self.config.drafted_pairs)
        self.steps += 1

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

    @torch.no_grad()
    def refresh(self, count: int) -> float:
        """Draft at most `count` pairs anew, drawn by their weights, each under a random view; the
        share of drafts that are right.

        Random numbers come from torch's generator of the device, so that a resumed run goes on.
        """
        uniform = torch.rand(count, device=self.source.device, dtype=torch.float64)
        chosen = self.source.draw_pairs(uniform).unique()
        asked, reader = self.questions(chosen), self.reader
        prompts = [reader.prompt(one.query, one.condition, one.pairs) for one in asked]
        temperature = self.config.draft_temperature
        found = decode(
            reader,
            prompts,
            mode="sampled" if temperature else "greedy",
            temperature=temperature or 1.0,
            seed=int(torch.randint(2**31, (), device=self.source.device)),
            max_output_tokens=[_bound(one) for one in asked],
        )
        num_right = 0
        for pair, question, one in zip(chosen.tolist(), asked, found, strict=True):
            right = one.grid is not None and np.array_equal(one.grid, question.answer)
            self.write(pair, None if one.grid is None else question.view.inverse(one.grid), right)
            num_right += right
        return num_right / max(len(found), 1)

    def questions(self, chosen: Tensor) -> list[Question]:
        """A question for each of the pairs: a random view and what comes before, as in training."""
        uniform = torch.rand(2, len(chosen), device=self.source.device, dtype=torch.float64)
        views = self.source.draw_views(self.source.pairs[chosen, 0], uniform[0])
        pairs = chosen[:, None]
        if self.sequences.num_pairs > 1:
            others = self.sequences.others(chosen, uniform[1])[:, : self.sequences.num_pairs - 1]
            pairs = torch.cat((others, pairs), dim=1)
        return questions_of(self.source.base, self.sequences.sequences(pairs, *views))


def _bound(question: Question) -> int:
    """Tokens that a draft may have."""
    height, width = (min(MAX_SIDE, side + SPARE_SIDE) for side in question.answer.shape)
    return grid_length(height, width) + 1
