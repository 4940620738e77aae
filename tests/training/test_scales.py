"""What is drawn to be shown larger: how often, within which bounds, and by which patterns."""

import pytest
import torch

from arctrm.config.scaling import ScalingConfig
from arctrm.training.scales import ACROSS, DOWN, FILL, SCALE, Scales

CPU = torch.device("cpu")
SHAPES = ("pad", "lines", "tile", "stretch")
COUNT = 4000


def drawn(side=6, same=True, background=7, **scaling):
    scales = Scales(ScalingConfig(**scaling), CPU, enabled=True)
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


def test_padding_is_up_to_two_rows_and_columns_on_each_side():
    scales, shown = patterns_of("pad")
    side = torch.full((len(shown),), 6)
    height, width = scales.larger(side, side, shown)
    assert set(height.tolist()) == set(width.tolist()) == {6, 7, 8, 9, 10}


def test_a_tile_is_twice_along_one_axis_and_mirrored_half_of_the_time():
    _, shown = patterns_of("tile")
    down, across = shown[:, DOWN], shown[:, ACROSS]
    assert (down % 2 + across % 2 == 1).all()
    for share in (down % 2, down // 2 % 2, across // 2 % 2):
        assert 0.45 < share.double().mean() < 0.55


def test_a_quarter_of_rows_and_columns_is_stretched():
    _, shown = patterns_of("stretch")
    for pattern in (shown[:, DOWN], shown[:, ACROSS]):
        share = (pattern[:, None] >> torch.arange(30) & 1).double().mean(0)
        torch.testing.assert_close(share, torch.full_like(share, 0.25), atol=0.07, rtol=0)


def test_half_of_the_fillings_are_the_background():
    _, shown = patterns_of("lines")
    shares = torch.bincount(shown[:, FILL], minlength=10) / len(shown)
    expected = torch.full((10,), 0.05)
    expected[7] += 0.5
    torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)
