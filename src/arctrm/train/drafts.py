"""The reader's drafts of training pairs: decoded now and then, kept on the device, shown to TRM.

A draft is what the reader itself wrote, never the target: a teacher-forced state would leak the
answer. It is stored in the task's own colours and orientation, so any view of it can be shown.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

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

ROOM = MAX_SIDE * MAX_SIDE  # cells kept for each draft
SPARE_SIDE = 2  # by which a draft may be larger than the answer: longer ones are wrong anyway


class Question(NamedTuple):
    """What a reader is asked: the output of the last pair of a sequence, as the view shows it."""

    view: View
    pairs: tuple[Pair, ...]  # that come before in the sequence (hub readers)
    query: Grid
    condition: Condition
    answer: Grid  # which the reader does not see


def questions_of(base: BaseSet, rows_NKC: Tensor) -> list[Question]:
    """The questions of sequences (not shown larger, none inverse)."""
    found = []
    for rows in rows_NKC.cpu():
        last, there = rows[-1], rows[rows[:, layout.LENGTH] > 0][:-1]
        view = View(int(last[layout.DIHEDRAL]), tuple(last[layout.COLOURS].tolist()))
        *before, asked = (base.pair(int(row[layout.PAIR])) for row in (*there, last))
        assert asked.output is not None
        query, answer = view.apply(asked.input), view.apply(asked.output)
        condition = Condition(*last[:NUM_CONDITIONS].tolist())
        pairs = [Pair(view.apply(p.input), view.apply(cast(Grid, p.output))) for p in before]
        found.append(Question(view, tuple(pairs), query, condition, answer))
    return found


class DraftPool:
    """One draft for each pair p of the source: the output of row `num_pairs + p` of its table."""

    gathered: Callable[[], AbstractContextManager[None]] = nullcontext  # while the reader writes

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
        self.right = torch.zeros_like(self.there)  # drafts that are the answer
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
        """Draft at most `count` pairs anew, each under a random view; the share that is right."""
        uniform = torch.rand(count, device=self.source.device, dtype=torch.float64)
        chosen = self.source.draw_pairs(uniform).unique()
        rows, reader = self.rows(chosen), self.reader
        fits = rows[:, -1, layout.LENGTH] > 0
        asked = questions_of(self.source.base, rows[fits])
        temperature, device = self.config.draft_temperature, self.source.device
        sides = ([min(MAX_SIDE, side + SPARE_SIDE) for side in one.answer.shape] for one in asked)
        with self.gathered():
            found = decode(
                reader,
                [reader.prompt(one.query, one.condition, one.pairs) for one in asked],
                mode="sampled" if temperature else "greedy",
                temperature=temperature or 1.0,
                seed=int(torch.randint(2**31, (), device=device)),
                max_output_tokens=[grid_length(*side) + 1 for side in sides],
            )
        num_right = 0
        for pair, question, one in zip(chosen[fits].tolist(), asked, found, strict=True):
            right = one.grid is not None and np.array_equal(one.grid, question.answer)
            self.write(pair, None if one.grid is None else question.view.inverse(one.grid), right)
            num_right += right
        return num_right / max(len(found), 1)

    def rows(self, chosen: Tensor) -> Tensor:
        """Sequences that end with the pairs, as in training; no tokens where one does not fit."""
        uniform = torch.rand(2, len(chosen), device=self.source.device, dtype=torch.float64)
        views = self.source.draw_views(self.source.pairs[chosen, 0], uniform[0])
        pairs = self.sequences.with_others(chosen, uniform[1])
        return self.sequences.sequences(pairs, *views)
