"""Two pairs of a task shown as one: both inputs beside each other, both outputs likewise.

The rule of a task holds for each of the two apart, so it says what the output of both is; and two
of three demonstrations make six pairs more, in an order and along an axis. The smaller grid is
filled up with the colour that the view shows for 0. (Mosaics of images: arXiv 2004.10934.) Without
a host sync, so that a captured CUDA graph can replay it.

Legend: n drawn rows, or tokens of them.
"""

import torch
from torch import Tensor

from arctrm.training.source import INPUT, OUTPUT, PairSource

# Columns of what is drawn for a row: the pair that comes second, and along which axis the two
# stand; where that is ALONE there is no second pair.
SECOND, AXIS = range(2)
NUM_COLUMNS = 2
ALONE, DOWN, ACROSS = range(3)

Size = tuple[Tensor, Tensor]
"""Height and width, [n] each."""


class Mosaics:
    """The pairs of `source` shown in twos, a `share` of those with room within `sides`."""

    def __init__(self, source: PairSource, share: float, sides: int):
        self.source, self.share, self.sides = source, share, sides

    @property
    def enabled(self) -> bool:
        """Whether there are any."""
        return self.share > 0

    def draw(self, first: Tensor, second: Tensor, dihedral: Tensor) -> Tensor:
        """int64 [n, NUM_COLUMNS], of pairs [n] and others of their tasks (-1: there is none)."""
        count, device = len(first), first.device
        axis = torch.randint(DOWN, ACROSS + 1, (count,), device=device)
        drawn = torch.rand(count, device=device) < self.share
        there = second >= 0
        second = second * there
        largest = torch.zeros_like(first)
        for grid in (INPUT, OUTPUT):
            own, other = (
                self.source.seen_size(self.source.pairs[pair][:, grid], dihedral)
                for pair in (first, second)
            )
            largest = largest.maximum(torch.maximum(*self.size(own, other, axis)))
        shown = drawn & there & (largest <= self.sides)
        return torch.stack((second, axis * shown), dim=1)

    @staticmethod
    def size(first: Size, second: Size, axis: Tensor) -> Size:
        """The size of two grids of such sizes along `axis` [n]."""
        sides = []
        for own, other, along in zip(first, second, (DOWN, ACROSS), strict=True):
            both = torch.where(axis == along, own + other, own.maximum(other))
            sides.append(torch.where(axis == ALONE, own, both))
        return sides[0], sides[1]

    @staticmethod
    def place(y: Tensor, x: Tensor, first: Size, axis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether (y, x) [n] is in the second grid (bool), if the first has such a size, and its
        place in its own grid.
        """
        below = (axis == DOWN) & (y >= first[0])
        right = (axis == ACROSS) & (x >= first[1])
        return below | right, y - first[0] * below, x - first[1] * right
