"""Training rows are drawn by weight and seen exactly as the numpy views show them."""

import numpy as np
import pytest
import torch

from arctrm.config import DataConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.task import Pair, Task
from arctrm.data.views import NUM_DIHEDRALS, View
from arctrm.errors import DataError
from arctrm.train.source import INPUT, IS_TEST, OUTPUT, PairSource, view_of

CPU = torch.device("cpu")


def of_areas(*areas):
    """A base set of one pair per task, in one subset; inputs of one row."""
    tasks = [
        Task(f"{i:03}", (Pair(np.zeros((1, area), np.uint8), np.ones((1, 1), np.uint8)),))
        for i, area in enumerate(areas)
    ]
    return base_set_from_tasks({"a": tasks}, None, 0)


def shares(source, count=20000):
    pairs = source.draw_pairs(torch.rand(count, dtype=torch.float64))
    return torch.bincount(pairs, minlength=len(source.pairs)) / count


@pytest.mark.parametrize("part", [INPUT, OUTPUT], ids=["input", "output"])
@pytest.mark.parametrize("dihedral", range(NUM_DIHEDRALS))
def test_cells_are_those_of_the_numpy_view(base, part, dihedral):
    source = PairSource(base, DataConfig(num_aug=50), 0, CPU)
    view = View(dihedral, (0, 3, 1, 2, 9, 8, 7, 6, 5, 4))
    for index in (0, 7, 30):
        pair = base.pair(index)
        expected = view.apply(pair.input if part == INPUT else pair.output)
        grid = source.pairs[index : index + 1, part]
        sizes = tuple(int(side) for side in source.seen_size(grid, torch.tensor([dihedral])))
        assert sizes == expected.shape
        y, x = (torch.from_numpy(axis.ravel()) for axis in np.mgrid[: sizes[0], : sizes[1]])
        shape = len(y)
        seen = source.colour_at(
            grid.expand(shape, -1),
            torch.full((shape,), dihedral),
            torch.tensor(view.colours).expand(shape, -1),
            y,
            x,
            torch.ones(shape, dtype=torch.bool),
        )
        np.testing.assert_array_equal(seen.view(expected.shape).numpy(), expected)


def test_a_view_is_a_function_of_seed_task_and_number():
    task, number = torch.arange(40).repeat(2), torch.arange(1, 81)
    fixed = torch.zeros(80, 10, dtype=torch.bool)
    first = torch.cat([x.reshape(80, -1) for x in view_of(0, task, number, fixed, 0.2)], 1)
    order = torch.randperm(80)
    again = view_of(0, task[order], number[order], fixed, 0.2)
    assert torch.equal(first[order], torch.cat([x.reshape(80, -1) for x in again], 1))
    for other in (view_of(1, task, number, fixed, 0.2), view_of(0, task + 1, number, fixed, 0.2)):
        changed = torch.cat([x.reshape(80, -1) for x in other], 1) != first
        assert changed.any(1).float().mean() > 0.9


def test_views_move_only_free_colours_and_every_free_colour_goes_everywhere():
    count = 4000
    fixed = torch.zeros(count, 10, dtype=torch.bool)
    fixed[:, [0, 4, 9]] = True
    _, colours = view_of(0, torch.zeros(count, dtype=int), torch.arange(count), fixed, 0.0)
    assert (colours.sort(1).values == torch.arange(10)).all()
    assert (colours[:, [0, 4, 9]] == torch.tensor([0, 4, 9])).all()
    free = [1, 2, 3, 5, 6, 7, 8]
    for colour in free:
        share = torch.bincount(colours[1:, colour], minlength=10)[free] / (count - 1)
        assert (share - 1 / 7).abs().max() < 0.03


@pytest.mark.parametrize(
    ("probability", "low", "high"), [(0, 0, 0.01), (0.2, 0.17, 0.23), (1, 1, 1)]
)
def test_colours_are_kept_as_often_as_asked(probability, low, high):
    fixed = torch.zeros(4000, 10, dtype=torch.bool)
    number = torch.arange(1, 4001)
    dihedral, colours = view_of(0, torch.zeros(4000, dtype=int), number, fixed, probability)
    assert low <= (colours == torch.arange(10)).all(1).float().mean() <= high
    assert (torch.bincount(dihedral, minlength=8) / 4000 - 1 / 8).abs().max() < 0.03


def test_no_more_views_are_drawn_than_the_bound_says_and_fixed_colours_stay(base):
    source = PairSource(base, DataConfig(num_aug=50), 0, CPU)
    task = torch.zeros(2000, dtype=torch.long)
    dihedral, colours = source.draw_views(task, torch.rand(2000, dtype=torch.float64))
    views = torch.cat((dihedral[:, None], colours), 1).unique(dim=0)
    assert 40 < len(views) <= 50
    assert (colours[:, source.fixed[0]] == torch.arange(10)[source.fixed[0]]).all()


def test_a_pair_is_drawn_in_proportion_to_the_weight_of_its_subset(base):
    data = DataConfig(num_aug=50, weights={"evaluation": 3.0})
    source = PairSource(base, data, 0, CPU)
    evaluated = source.pairs[:, 1] == base.meta.subsets.index("evaluation")
    got = shares(source)
    per_pair = got[evaluated].mean() / got[~evaluated].mean()
    assert per_pair == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_area_power_says_how_much_more_often_small_pairs_come(power):
    source = PairSource(of_areas(1, 4, 16), DataConfig(area_power=power), 0, CPU)
    got = shares(source)
    assert got[0] / got[1] == pytest.approx(4**power, rel=0.1)
    assert got[1] / got[2] == pytest.approx(4**power, rel=0.15)


def test_test_pairs_come_as_often_as_their_weight_says(base):
    is_test = torch.from_numpy(np.array(base.pairs)[:, IS_TEST] == 1)
    assert is_test.any()
    source = PairSource(base, DataConfig(num_aug=50, test_pair_weight=0), 0, CPU)
    assert shares(source)[is_test].sum() == 0
    assert not source.drawable[is_test].any()
    source = PairSource(base, DataConfig(num_aug=50, test_pair_weight=3), 0, CPU)
    weight = torch.where(is_test, 3.0, 1.0)
    expected = weight[is_test].sum() / weight.sum()
    assert shares(source)[is_test].sum() == pytest.approx(float(expected), abs=0.02)


def test_weights_that_leave_nothing_or_name_nothing_are_refused(base):
    with pytest.raises(DataError, match=r"re_arc.*training, evaluation"):
        PairSource(base, DataConfig(num_aug=50, weights={"re_arc": 0.5}), 0, CPU)
    nothing = {"training": 0.0, "evaluation": 0.0}
    with pytest.raises(DataError, match=r"data\.weights and data\.test_pair_weight leave no pair"):
        PairSource(base, DataConfig(num_aug=50, weights=nothing), 0, CPU)
