"""Views: exact inverses, the dihedral table against numpy, fixed colours, distinctness."""

import numpy as np
import pytest

from arctrm.data.task import Pair, Task
from arctrm.data.views import (
    IDENTITY,
    SAME_COLOURS,
    View,
    distinct_views,
    draw_view,
    fixed_colours,
    transform,
)

NUMPY = [
    lambda grid: grid,
    lambda grid: np.rot90(grid, 1),
    lambda grid: np.rot90(grid, 2),
    lambda grid: np.rot90(grid, 3),
    np.fliplr,
    np.flipud,
    np.transpose,
    lambda grid: np.rot90(grid, 2).T,
]


def random_grid(rng, height=None, width=None):
    height, width = height or rng.integers(1, 31), width or rng.integers(1, 31)
    return rng.integers(0, 10, (height, width)).astype(np.uint8)


@pytest.mark.parametrize("dihedral", range(8))
def test_inverse_undoes_every_dihedral_with_random_permutations(dihedral):
    rng = np.random.default_rng(dihedral)
    for _ in range(50):
        grid = random_grid(rng)
        view = View(dihedral, tuple(rng.permutation(10).tolist()))
        seen = view.apply(grid)
        assert seen.dtype == np.uint8
        assert np.array_equal(view.inverse(seen), grid)


@pytest.mark.parametrize("dihedral", range(8))
def test_transforms_are_the_ones_numpy_names(dihedral):
    grid = np.arange(15, dtype=np.uint8).reshape(3, 5)
    assert np.array_equal(transform(grid, dihedral), NUMPY[dihedral](grid))


def test_colours_replace_each_colour_by_its_entry():
    swap = View(0, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9))
    assert swap.apply(np.array([[0, 1, 2, 3]], np.uint8)).tolist() == [[0, 2, 1, 3]]
    assert not swap.identity_colours
    assert View(5).identity_colours


def test_fixed_are_black_and_the_colours_that_only_an_output_shows():
    one = Pair(np.array([[1, 2]], np.uint8), np.array([[2, 3]], np.uint8))
    two = Pair(np.array([[3, 4]], np.uint8), np.array([[5]], np.uint8))
    fixed = fixed_colours(Task("x", (one, two)))
    assert np.flatnonzero(fixed).tolist() == [0, 3, 5]


def test_the_test_pairs_do_not_decide_what_is_fixed():
    grid = np.array([[1]], np.uint8)
    task = Task("x", (Pair(grid, grid),), (Pair(grid, np.array([[7]], np.uint8)),))
    assert np.array_equal(fixed_colours(task), fixed_colours(task.without_answers()))


def test_drawn_views_keep_fixed_colours_and_permute_the_others():
    rng = np.random.default_rng(0)
    fixed = np.isin(np.arange(10), (0, 3, 8))
    for _ in range(200):
        view = draw_view(rng, fixed, identity_colours=0.0)
        assert [view.colours[colour] for colour in (0, 3, 8)] == [0, 3, 8]
        assert sorted(view.colours) == list(SAME_COLOURS)


def test_identity_colours_is_the_share_of_views_that_keep_their_colours():
    rng = np.random.default_rng(0)
    fixed = np.arange(10) == 0
    kept = [draw_view(rng, fixed, 0.2).identity_colours for _ in range(2000)]
    assert 0.16 < np.mean(kept) < 0.24
    assert all(draw_view(rng, fixed, 1.0).identity_colours for _ in range(20))


@pytest.mark.parametrize("count", [1, 2, 16, 300])
def test_distinct_views_are_distinct_and_start_with_the_identity(count):
    views = distinct_views(np.arange(10) == 0, count, np.random.default_rng(1))
    assert len(set(views)) == len(views) == count
    assert views[0] == IDENTITY


@pytest.mark.parametrize(("num_free", "existing"), [(0, 8), (1, 8), (2, 16), (3, 48)])
def test_all_views_are_given_where_fewer_exist_than_asked_for(num_free, existing):
    fixed = np.arange(10) >= num_free
    views = distinct_views(fixed, 1000, np.random.default_rng(1))
    assert len(set(views)) == len(views) == existing
    assert views[0] == IDENTITY
    assert all(view.colours[num_free:] == SAME_COLOURS[num_free:] for view in views)
