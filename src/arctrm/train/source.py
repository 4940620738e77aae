"""Where training rows come from: the pairs of a base set on the device, drawn and seen in a view.

Everything is tensor arithmetic without a host sync, so that a captured CUDA graph can replay it.

Legend: T tokens or cells, n drawn rows.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from arctrm.config import DataConfig
from arctrm.data.base_set import PAIR_COLUMNS, BaseSet
from arctrm.data.task import NUM_COLOURS
from arctrm.data.views import DIHEDRALS
from arctrm.errors import DataError

INPUT, OUTPUT = slice(3, 6), slice(6, 9)  # columns (offset, height, width) of a pair's two grids
IS_TEST = PAIR_COLUMNS.index("is_test")

_ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class PairSource:
    """The pairs of a base set on `device`, drawn by the weights of `data`."""

    def __init__(self, base: BaseSet, data: DataConfig, seed: int, device: torch.device):
        self.base, self.data, self.seed, self.device = base, data, seed, device
        self.num_views = base.meta.num_aug or 2**31 - 1
        self.cells = torch.from_numpy(np.array(base.cells)).to(device)
        self.pairs = torch.from_numpy(np.array(base.pairs)).long().to(device)
        bits = torch.tensor(base.meta.fixed_colours, device=device)[:, None]
        self.fixed = (bits >> torch.arange(NUM_COLOURS, device=device) & 1).bool()
        self.dihedrals = torch.from_numpy(DIHEDRALS).long().to(device)
        weights = pair_weights(base, data)
        self.drawable = torch.from_numpy(weights > 0).to(device)
        self.cumulative = torch.from_numpy(weights.cumsum() / weights.sum()).to(device)

    @cached_property
    def inverse_fixed(self) -> Tensor:
        """bool [tasks, 10]: colours that no view of the inverse task may move."""
        return torch.from_numpy(inverse_fixed_colours(self.base)).to(self.device)

    def draw_pairs(self, uniform: Tensor) -> Tensor:
        """Rows int64 [n] of `pairs` by weight, from float64 [n] in [0, 1)."""
        pair = torch.searchsorted(self.cumulative, uniform.contiguous(), right=True)
        return pair.clamp(max=self.cumulative.shape[0] - 1)

    def draw_views(
        self, task: Tensor, uniform: Tensor, inverse: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Dihedral [n] and colours [n, 10] of a view of each task or, `inverse`, its inverse."""
        fixed, view = self.fixed[task], (uniform * self.num_views).long()
        if inverse is not None:
            fixed = torch.where(inverse[:, None], self.inverse_fixed[task], fixed)
        return view_of(self.seed, task, view, fixed, self.data.identity_colours)

    def seen_size(self, grid: Tensor, dihedral: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width [n] of grids (offset, height, width) [n, 3] under their dihedral."""
        turned = self.dihedrals[dihedral, 0].bool()
        height, width = grid[:, 1], grid[:, 2]
        return torch.where(turned, width, height), torch.where(turned, height, width)

    def colour_at(
        self, grid: Tensor, dihedral: Tensor, colours: Tensor, y: Tensor, x: Tensor, inside: Tensor
    ) -> Tensor:
        """Colours [T] at (y, x) of grids [T, 3] under a view; meaningless where not `inside`."""
        offset, height, width = grid.unbind(1)
        transpose, flip_rows, flip_columns = self.dihedrals[dihedral].bool().unbind(1)
        a, b = torch.where(transpose, x, y), torch.where(transpose, y, x)
        a = torch.where(flip_rows, height - 1 - a, a)
        b = torch.where(flip_columns, width - 1 - b, b)
        colour = self.cells[torch.where(inside, offset + a * width + b, 0)].long()
        return colours.gather(1, colour[:, None])[:, 0]


def view_of(
    seed: int, task: Tensor, view: Tensor, fixed: Tensor, identity_colours: float
) -> tuple[Tensor, Tensor]:
    """Dihedral [n] and colours [n, 10] of view number `view` of each task; 0 is the identity."""
    uniform = hashed_uniform(seed, task, view, NUM_COLOURS + 2)
    dihedral = (uniform[:, 0] * len(DIHEDRALS)).long()
    keep = (uniform[:, 1] < identity_colours) | (view == 0)
    fixed = fixed | keep[:, None]
    order = torch.arange(NUM_COLOURS, device=task.device)
    # The i-th free colour becomes the free colour that comes i-th in a random order.
    here = torch.where(fixed, order + NUM_COLOURS, order).argsort(1)
    there = torch.where(fixed, order + NUM_COLOURS, uniform[:, 2:]).argsort(1)
    colours = torch.empty_like(here).scatter_(1, here, there)
    return torch.where(view == 0, 0, dihedral), colours


def hashed_uniform(seed: int, task: Tensor, view: Tensor, count: int) -> Tensor:
    """float32 [n, count] in [0, 1): a fixed function of (seed, task, view number)."""
    column = torch.arange(count, device=task.device)
    x = (task * _ODD[0] + view * _ODD[1] + seed * 0x632BE5AB)[:, None] + column * _ODD[2]
    for factor in _ODD:  # xor-shift-multiply rounds; int64 products wrap around
        x = (x ^ (x >> 29 & 0x7FFFFFFFF)) * factor
    return (x >> 40 & 0xFFFFFF).float() / 2**24


def inverse_fixed_colours(base: BaseSet) -> np.ndarray:
    """bool [tasks, 10]: what no view of the inverse may move: 0, and colours of inputs alone."""
    pairs = np.asarray(base.pairs).astype(np.int64)
    given, asked = (_colours_in(base.cells, pairs[:, grid]) for grid in (OUTPUT, INPUT))
    unexplained = np.where(pairs[:, IS_TEST] > 0, 0, asked & ~given)
    bits = np.ones(base.num_tasks, dtype=np.int64)
    np.bitwise_or.at(bits, pairs[:, 0], unexplained)
    return (bits[:, None] >> np.arange(NUM_COLOURS) & 1).astype(bool)


def _colours_in(cells: np.ndarray, grids: np.ndarray) -> np.ndarray:
    offset, height, width = grids.T
    bits = 1 << np.append(np.asarray(cells), 0).astype(np.int64)
    spans = np.stack([offset, offset + height * width], axis=1).ravel()
    return np.bitwise_or.reduceat(bits, spans)[::2]


def pair_weights(base: BaseSet, data: DataConfig) -> np.ndarray:
    """float64 [num_pairs]: weight of a pair's subset x of its area x of test pairs."""
    if unknown := sorted(set(data.weights) - set(base.meta.subsets)):
        known = ", ".join(base.meta.subsets)
        raise DataError(f"data.weights: {unknown[0]!r} is no subset of the data set ({known})")
    pairs = np.asarray(base.pairs)
    by_subset = np.array([data.weights.get(label, 1.0) for label in base.meta.subsets])
    areas = pairs[:, 4::3].max(1).astype(float) * pairs[:, 5::3].max(1)
    weights = by_subset[pairs[:, 1]] * areas**-data.area_power
    weights *= np.where(pairs[:, IS_TEST], data.test_pair_weight, 1.0)
    if not weights.sum() > 0:
        raise DataError("data.weights and data.test_pair_weight leave no pair to draw")
    return weights
