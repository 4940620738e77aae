"""The reader's drafts of training pairs: decoded now and then, kept on the device, shown to TRM.

A draft is what the reader itself wrote, never the target: a teacher-forced state would leak the
answer. It is stored in the task's own colours and orientation, beside the true pairs, so that any
view of it can be shown by the same arithmetic that shows a view of a pair.
"""

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE, Grid
from arctrm.data.views import View
from arctrm.reader.decoding import decode
from arctrm.reader.interface import Prompt
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import grid_length, prompt
from arctrm.training.source import INPUT, OUTPUT, PairSource, same_colours

ROOM = MAX_SIDE * MAX_SIDE
"""Cells kept for each draft."""


class DraftPool:
    """One draft for each pair of `source`, whose tables it extends by the drafts.

    Draft of pair p is row `num_pairs + p` of `source.pairs`: the pair's input, and as its output
    the draft.
    """

    def __init__(self, source: PairSource):
        self.source = source
        self.num_pairs = source.pairs.shape[0]
        begin, device = source.cells.shape[0], source.device
        source.cells = torch.cat((source.cells, source.cells.new_zeros(self.num_pairs * ROOM)))
        drafts = source.pairs.clone()
        drafts[:, OUTPUT.start] = begin + torch.arange(self.num_pairs, device=device) * ROOM
        drafts[:, OUTPUT.start + 1 :] = 1
        source.pairs = torch.cat((source.pairs, drafts))
        self.begin = begin
        self.there = torch.zeros(self.num_pairs, dtype=torch.bool, device=device)

    def row_of(self, pair: Tensor) -> Tensor:
        """Rows of the drafts of pairs."""
        return pair + self.num_pairs

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        return {
            "drafts.cells": self.source.cells[self.begin :],
            "drafts.sizes": self.source.pairs[self.num_pairs :],
            "drafts.there": self.there,
        }

    def write(self, pair: int, grid: Grid | None) -> None:
        """Keep a draft (None: there is none for this pair)."""
        self.there[pair] = grid is not None
        if grid is None:
            return
        place = self.begin + pair * ROOM
        cells = torch.from_numpy(np.ascontiguousarray(grid).ravel())
        self.source.cells[place : place + grid.size] = cells.to(self.source.device)
        size = torch.tensor(grid.shape, device=self.source.device)
        self.source.pairs[self.num_pairs + pair, OUTPUT.start + 1 : OUTPUT.stop] = size

    def refresh(self, reader: TinyReader, count: int, batch_size: int) -> tuple[float, float]:
        """Draft `count` random pairs anew, each under a random view.

        Returns the share of drafts that are right and their mean length in tokens.

        Random numbers come from torch's generator of the device, so that a resumed run goes on.
        """
        chosen = torch.randperm(self.num_pairs, device=self.source.device)[:count]
        views, prompts, answers = self._asked(chosen)
        # Longer than the answer is wrong whatever it says; some room keeps wrong sizes possible.
        bounds = [
            grid_length(*_roomy(view, answer)) + 1
            for view, answer in zip(views, answers, strict=True)
        ]
        found = decode(reader, prompts, batch_size=batch_size, max_output_tokens=bounds)
        right = 0
        for pair, view, answer, one in zip(chosen.tolist(), views, answers, found, strict=True):
            draft = None if one.grid is None else view.inverse(one.grid)
            self.write(pair, draft)
            right += draft is not None and np.array_equal(draft, answer)
        lengths = [one.num_tokens for one in found]
        return right / len(found), sum(lengths) / len(lengths)

    def _asked(self, chosen: Tensor) -> tuple[list[View], list[Prompt], list[Grid]]:
        """A random view, the prompt under it, and the answer (unseen) of each pair."""
        source = self.source
        task = source.pairs[chosen, 0]
        uniform = torch.rand(len(chosen), device=source.device, dtype=torch.float64)
        _, dihedral, colours = source.draw_views(task, uniform)
        flag = same_colours(colours).long()
        conditions = torch.stack((task, dihedral, flag), dim=1).tolist()
        views = [
            View(turn, tuple(own))
            for turn, own in zip(dihedral.tolist(), colours.tolist(), strict=True)
        ]
        cells = source.cells[: self.begin].cpu().numpy()
        table = source.pairs[chosen].tolist()
        prompts = [
            prompt((), view.apply(_grid(cells, row[INPUT])), tuple(condition))
            for view, row, condition in zip(views, table, conditions, strict=True)
        ]
        return views, prompts, [_grid(cells, row[OUTPUT]) for row in table]


def _grid(cells: np.ndarray, place: list[int]) -> Grid:
    offset, height, width = place
    return cells[offset : offset + height * width].reshape(height, width)


def _roomy(view: View, answer: Grid) -> tuple[int, int]:
    height, width = view.apply(answer).shape
    return min(MAX_SIDE, height + 2), min(MAX_SIDE, width + 2)
