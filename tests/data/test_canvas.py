"""The canvas codec: exact round trips at every size and offset, malformed codes give no grid."""

import numpy as np
import pytest

from arctrm.data.canvas import COLOUR, EOS, PAD, VOCABULARY, decode, encode, pair_canvas
from arctrm.data.task import MAX_SIDE, Pair


def random_grid(rng, height, width):
    return rng.integers(0, 10, (height, width)).astype(np.uint8)


def test_every_size_round_trips_at_the_corners_and_random_offsets_of_the_full_canvas():
    rng = np.random.default_rng(0)
    for height in range(1, MAX_SIDE + 1):
        for width in range(1, MAX_SIDE + 1):
            grid = random_grid(rng, height, width)
            last = (MAX_SIDE - height, MAX_SIDE - width)
            middle = (int(rng.integers(last[0] + 1)), int(rng.integers(last[1] + 1)))
            for offset in {(0, 0), last, middle}:
                codes = encode(grid, MAX_SIDE, MAX_SIDE, offset)
                assert np.array_equal(decode(codes, offset), grid)


def test_every_offset_of_a_small_grid_round_trips():
    grid = random_grid(np.random.default_rng(1), 3, 5)
    for top in range(MAX_SIDE - 2):
        for left in range(MAX_SIDE - 4):
            codes = encode(grid, MAX_SIDE, MAX_SIDE, (top, left))
            assert np.array_equal(decode(codes, (top, left)), grid)


def test_every_size_round_trips_on_the_canvas_its_pair_needs():
    rng = np.random.default_rng(2)
    for height in range(1, MAX_SIDE + 1):
        pair = Pair(random_grid(rng, height, 31 - height), random_grid(rng, 31 - height, height))
        for grid in (pair.input, pair.output):
            assert np.array_equal(decode(encode(grid, *pair_canvas(pair))), grid)


def test_the_codes_are_grid_then_a_border_of_eos_without_its_corner():
    codes = encode(np.array([[0, 9]], np.uint8), 3, 4)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [
        [COLOUR, COLOUR + 9, EOS, PAD],
        [EOS, EOS, PAD, PAD],
        [PAD, PAD, PAD, PAD],
    ]
    assert encode(np.full((30, 30), 9, np.uint8), 30, 30).max() == VOCABULARY - 1


def test_a_grid_on_the_last_row_or_column_has_no_border_there():
    grid = np.ones((2, 2), np.uint8)
    assert EOS not in encode(grid, 2, 2)
    assert encode(grid, 3, 2).tolist() == [[3, 3], [3, 3], [EOS, EOS]]


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        encode(np.ones((3, 3), np.uint8), 5, 5, (3, 0))


@pytest.mark.parametrize(
    "codes",
    [
        [[PAD, PAD], [PAD, PAD]],
        [[EOS, 2], [2, 2]],
        [[2, 2, EOS], [2, EOS, EOS], [EOS, EOS, PAD]],
        [[2, 2, 2], [2, PAD, 2], [2, 2, 2]],
    ],
)
def test_malformed_codes_give_no_grid(codes):
    assert decode(np.array(codes, np.uint8)) is None


def test_codes_beyond_the_grid_do_not_matter():
    codes = encode(np.ones((2, 2), np.uint8), 5, 5)
    codes[4, 4] = 7
    assert decode(codes).tolist() == [[1, 1], [1, 1]]


def test_pair_canvas_is_the_larger_grid_plus_a_border_where_there_is_room():
    def grid(height, width):
        return np.zeros((height, width), np.uint8)

    assert pair_canvas(Pair(grid(3, 9), grid(5, 2))) == (6, 10)
    assert pair_canvas(Pair(grid(3, 9))) == (4, 10)
    assert pair_canvas(Pair(grid(29, 30), grid(1, 1))) == (30, 30)
