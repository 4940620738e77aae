"""Losses and counts against hand-computed numbers."""

import math

import pytest
import torch

from arctrm.training.losses import IGNORE, cell_cross_entropy, log_stablemax, row_losses

V = 12


def logits_for(predicted, margin=3.0):
    """Logits whose largest entry is `predicted`, by `margin` over the others."""
    logits = torch.zeros(len(predicted), V)
    logits[torch.arange(len(predicted)), torch.tensor(predicted)] = margin
    return logits


def softmax_loss(right, margin=3.0):
    total = math.exp(margin) + V - 1
    return -math.log((math.exp(margin) if right else 1.0) / total)


def test_cross_entropy_is_averaged_over_the_cells_of_each_row():
    labels = torch.tensor([2, 3, 4, 5, 6])
    predicted = [2, 3, 9, 5, 7]
    rows = torch.tensor([0, 0, 0, 1, 1])
    losses = row_losses(logits_for(predicted), torch.zeros(2), labels, rows)
    right, wrong = softmax_loss(True), softmax_loss(False)
    expected = [(2 * right + wrong) / 3, (right + wrong) / 2]
    assert losses.cells.tolist() == pytest.approx(expected, rel=1e-5)
    assert losses.cell_accuracy.tolist() == pytest.approx([2 / 3, 1 / 2])


def test_ignored_cells_count_for_nothing():
    labels = torch.tensor([2, IGNORE, 4, IGNORE])
    rows = torch.zeros(4, dtype=torch.long)
    clean = row_losses(logits_for([2, 9, 4, 9]), torch.zeros(1), labels, rows)
    assert clean.cells.item() == pytest.approx(softmax_loss(True), rel=1e-5)
    assert clean.exact.tolist() == clean.shape.tolist() == [True]
    assert clean.cell_accuracy.item() == 1.0


@pytest.mark.parametrize("stablemax", [False, True])
def test_ignored_cells_and_dummy_rows_get_no_gradient(stablemax):
    logits = torch.randn(6, V, requires_grad=True)
    q_halt = torch.zeros(3, requires_grad=True)
    labels = torch.tensor([2, IGNORE, 3, IGNORE, IGNORE, IGNORE])
    rows = torch.tensor([0, 0, 0, 1, 3, 4])  # row 1 has no labels, row 2 no tokens, 3 and 4: none
    losses = row_losses(logits, q_halt, labels, rows, stablemax)
    (losses.cells.sum() + losses.halt.sum()).backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [True, False, True, False, False, False]
    assert (q_halt.grad.abs() > 0).tolist() == [True, False, False]


def test_rows_without_labels_add_nothing():
    labels = torch.tensor([2, IGNORE])
    losses = row_losses(logits_for([2, 2]), torch.zeros(3), labels, torch.tensor([0, 7]))
    assert losses.real.tolist() == [True, False, False]
    for values in losses:
        assert not values[1:].any()
    assert losses.halt[0] > 0


def test_halting_is_scored_against_the_whole_grid_being_right():
    labels = torch.tensor([2, 3, 2, 3])
    rows = torch.tensor([0, 0, 1, 1])
    losses = row_losses(logits_for([2, 3, 2, 4]), torch.tensor([1.5, 1.5]), labels, rows)
    assert losses.exact.tolist() == [True, False]
    expected = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))]
    assert losses.halt.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_shape_is_right_where_border_and_grid_cells_are_told_apart():
    labels = torch.tensor([2, 3, 1] * 3)  # two cells of the grid, one of the border
    rows = torch.arange(3).repeat_interleave(3)
    wrong_colour, grid_too_large, grid_too_small = [5, 3, 1], [2, 3, 4], [2, 1, 1]
    predicted = wrong_colour + grid_too_large + grid_too_small
    losses = row_losses(logits_for(predicted), torch.zeros(3), labels, rows)
    assert losses.shape.tolist() == [True, False, False]
    assert not losses.exact.any()


def test_stablemax_is_its_formula():
    logits = torch.tensor([[0.0, 2.0, -1.0, -3.0]])
    weights = [1.0, 3.0, 1 / 2, 1 / 4]  # x + 1 above zero, 1 / (1 - x) below
    expected = [math.log(w / sum(weights)) for w in weights]
    assert log_stablemax(logits)[0].tolist() == pytest.approx(expected)
    loss = cell_cross_entropy(logits, torch.tensor([3]), stablemax=True)
    assert loss.item() == pytest.approx(-expected[3])


def test_stablemax_is_used_where_it_is_asked_for():
    logits, labels = torch.randn(4, V), torch.tensor([2, IGNORE, 5, 1])
    rows = torch.zeros(4, dtype=torch.long)
    losses = row_losses(logits, torch.zeros(1), labels, rows, stablemax=True)
    valid = labels != IGNORE
    chosen = log_stablemax(logits)[valid].gather(1, labels[valid][:, None])
    assert losses.cells.item() == pytest.approx(-chosen.mean().item(), rel=1e-6)
