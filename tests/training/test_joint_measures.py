"""What is said of contexts, by hand: contrast, variance, and what swapping means."""

import math

import pytest
import torch

from arctrm.hybrid import ReaderStates
from arctrm.training.joint_step import TEMPERATURE, context_variance, contrast, swapped


def test_contrast_by_hand():
    contexts = torch.tensor([[2.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [-2.0, 0.0], [9.0, 9.0]])
    there = torch.tensor([True, True, True, True, False])
    contexts[4] = 0.0  # so that the mean is zero
    tasks = torch.tensor([0, 0, 1, 1, 2])
    near, far = math.exp(1 / TEMPERATURE), math.exp(-1 / TEMPERATURE)
    expected = -math.log(near / (near + 2 * far))
    contexts = torch.cat((contexts, torch.zeros(1, 2)))
    tasks, there = torch.cat((tasks, tasks[:1] + 2)), torch.cat((there, ~there[:1]))
    assert contrast(contexts, tasks, there).item() == pytest.approx(expected, abs=1e-6)


def test_a_second_two_of_the_same_task_is_no_negative():
    contexts = torch.tensor([[1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0], [-2.0, 0], [-2.0, 0]])
    tasks, there = torch.tensor([0, 0, 0, 0, 1, 1]), torch.ones(6, dtype=torch.bool)
    near, far = math.exp(1 / TEMPERATURE), math.exp(-1 / TEMPERATURE)
    first = -math.log(near / (near + 2 * far))
    second = -math.log(near / (near + 4 * far))
    expected = (4 * first + 2 * second) / 6
    assert contrast(contexts, tasks, there).item() == pytest.approx(expected, abs=1e-6)


def test_context_variance_is_0_for_one_context_and_1_for_opposite_ones():
    there = torch.tensor([True, True, False])
    same = torch.tensor([[1.0, 2.0], [1.0, 2.0], [50.0, 0.0]])
    assert context_variance(same, there).item() == 0
    opposite = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [50.0, 0.0]])
    assert context_variance(opposite, there).item() == pytest.approx(1)
    by_hand = torch.tensor([[1.0, 0.0], [3.0, 0.0], [50.0, 0.0]])  # variance 1, mean square 5
    assert context_variance(by_hand, there).item() == pytest.approx(1 / 5)


def test_a_swapped_row_sees_what_another_row_saw():
    hidden = torch.arange(5.0)[:, None]
    row, other = torch.tensor([0, 0, 1, 2, 9]), torch.zeros(5, dtype=torch.long)
    states = ReaderStates(
        hidden, row, other, other, other, torch.tensor([0, 2, 3, 7]), torch.tensor([2, 1, 1, 0])
    )
    turned = swapped(states, 3, 1)
    assert turned.row.tolist() == [1, 1, 2, 0, 9]
    assert turned.begin.tolist() == [3, 0, 2, 7]  # the row that is not there stays as it is
    assert turned.visible.tolist() == [1, 2, 1, 0]
    assert turned.hidden is hidden
