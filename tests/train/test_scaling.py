"""What is drawn to be shown larger: how often, within which bounds, and by which patterns."""

import numpy as np
import pytest
import torch
from larger import larger

from arctrm.config import ScalingConfig
from arctrm.train.scaling import ACROSS, DOWN, FILL, SCALE, Scales
from helpers import random_grid

CPU = torch.device("cpu")
SHAPES = ("pad", "lines", "tile", "stretch")
COUNT = 4000


def drawn(side=6, same=True, background=7, **scaling):
    scales = Scales(ScalingConfig(**scaling), CPU)
    sides, alike = torch.full((COUNT,), side), torch.full((COUNT,), same)
    torch.manual_seed(0)
    return scales, scales.draw(sides, sides, alike, torch.full((COUNT,), background))


def patterns_of(name):
    """Scales with one shape, and the patterns int64 [n, 2] of the rows that have it."""
    scales, shown = drawn(share=0.9, shapes=(name,))
    return scales, shown[shown[:, SCALE] == scales.number[name]]


def test_all_ways_are_equally_likely():
    scales, shown = drawn(share=0.7, shapes=SHAPES)
    shares = torch.bincount(shown[:, SCALE], minlength=8) / COUNT
    expected = torch.tensor([0.3] + [0.1] * 7)
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    assert scales.config.num_ways == 7


def test_shapes_that_need_one_size_are_not_drawn_where_sizes_differ():
    scales, shown = drawn(share=0.9, shapes=SHAPES, same=False)
    there = set(shown[:, SCALE].tolist())
    assert there == {0, 1, 2, 3, scales.number["lines"], scales.number["tile"]}


@pytest.mark.parametrize("name", SHAPES)
def test_no_side_exceeds_the_bound_and_what_would_is_shown_as_it_is(name):
    scales, shown = drawn(side=11, share=0.9, shapes=(name,), factors=((3, 3),), sides=13)
    side = torch.full((COUNT,), 11)
    largest = torch.maximum(*scales.larger(side, side, shown))
    assert largest.max() <= 13
    assert (largest[shown[:, SCALE] == 0] == 11).all()
    assert (shown[shown[:, SCALE] == 0] == 0).all()
    assert (shown[:, SCALE] > 0).any() == (name in ("pad", "stretch"))


def test_a_tile_is_twice_along_one_axis_and_mirrored_half_of_the_time():
    _, shown = patterns_of("tile")
    down, across = shown[:, DOWN], shown[:, ACROSS]
    assert (down % 2 + across % 2 == 1).all()
    for share in (down % 2, down // 2 % 2, across // 2 % 2):
        assert 0.45 < share.double().mean() < 0.55


@pytest.mark.parametrize("name", [None, *SHAPES])
def test_cells_and_sizes_are_those_of_a_plain_oracle(name):
    """Every place of a grid as it is shown comes from the cell that numpy puts there."""
    scaling = {"factors": ((1, 3), (2, 2)), "shapes": () if name is None else (name,)}
    scales, shown = drawn(share=0.9, sides=30, **scaling)
    rng = np.random.default_rng(0)
    for own in shown[shown[:, SCALE] > 0][:60]:
        grid = random_grid(rng, 5, 6)
        expected = larger(grid, own, scaling)
        size = (torch.tensor([side]) for side in grid.shape)
        height, width = (int(side) for side in scales.larger(*size, own[None]))
        assert (height, width) == expected.shape
        y, x = (torch.from_numpy(axis.ravel()) for axis in np.mgrid[:height, :width])
        sides = (torch.full_like(y, side) for side in grid.shape)
        a, b, filled = scales.cells(y, x, *sides, own.expand(len(y), -1))
        found = np.where(filled, own[FILL], grid[a.clamp(0, 4), b.clamp(0, 5)])
        np.testing.assert_array_equal(found.reshape(height, width), expected)
