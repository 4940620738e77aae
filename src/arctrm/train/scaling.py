"""How the grids of a training row are shown larger: scale augmentation, on the device.

A row shows its pair as it is (scale 0), each cell as a block (scale k > 0: the k-th of the factors)
or, numbered behind those, in a shape, which treats rows and columns alike and apart, by a pattern
of bits for each. Without a host sync, so that a captured CUDA graph can replay it.

Legend: n drawn rows, or tokens of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.config.data import ScalingConfig, ShapeName
from arctrm.data.task import MAX_SIDE, NUM_COLOURS

NUM_COLUMNS = 4  # of what is drawn for a row: scale, patterns of rows and columns, filling colour
SCALE, DOWN, ACROSS, FILL = range(NUM_COLUMNS)
MOST_PADDING = 2  # rows or columns that "pad" adds on a side, at most


class Shape(NamedTuple):
    """A way of showing grids larger, along one axis; patterns are int64 [n]."""

    side: Callable[[Tensor, Tensor], Tensor]  # (side [n], pattern) -> the side as it is shown
    cell: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(place [n] shown, side of the grid, pattern) -> place in the grid, whether there is none."""
    aligned: bool  # input and output must be of one size: their cells correspond


def _padding(pattern: Tensor) -> tuple[Tensor, Tensor]:  # before and after
    count = MOST_PADDING + 1
    return pattern % count, torch.div(pattern, count, rounding_mode="floor") % count


def _padded_cell(place: Tensor, side: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    own = place - _padding(pattern)[0]
    return own, (own < 0) | (own >= side)


def _tiled_cell(place: Tensor, side: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Bit 0 of the pattern: twice along this axis; bit 1: the second is a mirror image."""
    own = place % side.clamp(min=1)
    mirrored = (pattern // 2 % 2 == 1) & (place >= side)
    return torch.where(mirrored, side - 1 - own, own), torch.zeros_like(mirrored)


def _stretched_side(side: Tensor, pattern: Tensor) -> Tensor:  # bit i: row i is there twice
    twice = _bits(pattern) * (torch.arange(MAX_SIDE, device=side.device) < side[:, None])
    return side + twice.sum(1)


def _stretched_cell(place: Tensor, side: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    ends = (1 + _bits(pattern)).cumsum(1)
    return (ends <= place[:, None]).sum(1), torch.zeros_like(place, dtype=torch.bool)


def _bits(pattern: Tensor) -> Tensor:
    return pattern[:, None] >> torch.arange(MAX_SIDE, device=pattern.device) & 1


SHAPES: dict[ShapeName, Shape] = {
    "pad": Shape(lambda side, bits: side + sum(_padding(bits)), _padded_cell, aligned=True),
    "lines": Shape(
        lambda side, _: 2 * side - 1, lambda place, _, __: (place // 2, place % 2 == 1), False
    ),
    "tile": Shape(lambda side, bits: side * (1 + bits % 2), _tiled_cell, aligned=False),
    "stretch": Shape(_stretched_side, _stretched_cell, aligned=True),
}


class Scales:
    """The factors and shapes of `config` on `device`, and how rows come by one."""

    def __init__(self, config: ScalingConfig, device: torch.device):
        self.config, self.device = config, device
        self.enabled = config.share > 0
        factors = [(1, 1), *config.factors, *[(1, 1) for _ in config.shapes]]
        self.factors = torch.tensor(factors, device=device)
        self.number = {name: 1 + len(config.factors) + i for i, name in enumerate(config.shapes)}
        aligned = [SHAPES[name].aligned for name in config.shapes]
        self.aligned = torch.tensor([False] * (1 + len(config.factors)) + aligned, device=device)

    def draw(self, height: Tensor, width: Tensor, same: Tensor, background: Tensor) -> Tensor:
        """int64 [n, NUM_COLUMNS] for rows with largest sides [n]; `same`: of one size, bool."""
        count = height.shape[0]
        scale = torch.rand(count, len(self.factors) - 1, device=self.device).argmax(1) + 1
        is_larger = torch.rand(count, device=self.device) < self.config.share
        shown = torch.zeros(count, NUM_COLUMNS, dtype=torch.long, device=self.device)
        shown[:, SCALE] = scale
        if self.number:
            self._draw_patterns(shown, background)
        sides = torch.maximum(*self.larger(height, width, shown))
        suits = is_larger & (sides <= self.config.sides) & (same | ~self.aligned[scale])
        return torch.where(suits[:, None], shown, 0)

    def _draw_patterns(self, shown: Tensor, background: Tensor) -> None:
        count, scale = shown.shape[0], shown[:, SCALE]
        bits = torch.randint(2**MAX_SIDE, (4, count), device=self.device)
        patterns = bits[:2]
        if "stretch" in self.number:  # every fourth row or column is there twice
            patterns = torch.where(scale == self.number["stretch"], patterns & bits[2:], patterns)
        down, across = patterns
        if "tile" in self.number:  # along one axis
            other = across - across % 2 + 1 - down % 2
            across = torch.where(scale == self.number["tile"], other, across)
        colour = torch.randint(2 * NUM_COLOURS, (count,), device=self.device)
        shown[:, DOWN], shown[:, ACROSS] = down, across
        shown[:, FILL] = torch.where(colour < NUM_COLOURS, colour, background)

    def larger(self, height: Tensor, width: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width [n] as they are shown."""
        if not self.enabled:
            return height, width
        scale, seen = shown[:, SCALE], [height, width]
        for axis, side in enumerate((height, width)):
            seen[axis] = side * self.factors[scale, axis]
            for name, number in self.number.items():
                larger = SHAPES[name].side(side, shown[:, DOWN + axis])
                seen[axis] = torch.where(scale == number, larger, seen[axis])
        return seen[0], seen[1]

    def cells(
        self, y: Tensor, x: Tensor, height: Tensor, width: Tensor, shown: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The cells shown at (y, x) [n], and whether there is none but a filling (bool)."""
        nowhere = torch.zeros_like(y, dtype=torch.bool)
        if not self.enabled:
            return y, x, nowhere
        scale, own = shown[:, SCALE], [y, x]
        for axis, (place, side) in enumerate(((y, height), (x, width))):
            own[axis] = place // self.factors[scale, axis]
            for name, number in self.number.items():
                here = scale == number
                cell, none = SHAPES[name].cell(place, side, shown[:, DOWN + axis])
                own[axis] = torch.where(here, cell, own[axis])
                nowhere = nowhere | (here & none)
        return own[0], own[1], nowhere
