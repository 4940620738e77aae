"""Loss and counts of packed batches against hand-computed numbers."""

import math

import pytest
import torch

from arctrm.model.layout import END, ROW_END, START, VOCABULARY
from arctrm.train.losses import HALT_WEIGHT, IGNORE, halting_loss, halting_mean, row_counts

LABELLED = [  # row, label, predicted: the places of two input tokens are ignored
    (0, IGNORE, 9),
    (0, 4, 4),
    (0, 3, 3),
    (0, ROW_END, ROW_END),
    (0, END, END),
    (1, IGNORE, START),
    (1, 4, 5),  # another colour: the shape is right
    (1, ROW_END, ROW_END),
    (1, END, END),
    (2, 4, ROW_END),  # the row ends too early: the shape is wrong
    (2, ROW_END, ROW_END),
    (2, END, 7),
    (3, IGNORE, 1),  # a row without output
    (5, IGNORE, 1),  # no row
]


def logits_for(predicted, margin=3.0):
    """Logits whose largest entry is `predicted`, by `margin` over the others."""
    logits = torch.zeros(len(predicted), VOCABULARY)
    logits[torch.arange(len(predicted)), torch.tensor(predicted)] = margin
    return logits


def cross_entropy(right, margin=3.0):
    total = math.exp(margin) + VOCABULARY - 1
    return -math.log((math.exp(margin) if right else 1.0) / total)


def by_hand():
    row, labels, predicted = (list(column) for column in zip(*LABELLED, strict=True))
    return row_counts(logits_for(predicted), torch.tensor(labels), torch.tensor(row), 4)


def test_a_grid_is_exact_where_every_label_is_predicted():
    counts = by_hand()
    assert counts.exact.tolist() == [True, False, False, False]
    assert counts.real.tolist() == [True, True, True, False]
    assert counts.num_labels == 10


def test_the_shape_is_right_where_cells_and_ends_stand_in_their_places():
    assert by_hand().shape.tolist() == [True, True, False, False]


def test_cell_accuracy_is_the_share_of_labels_that_are_predicted():
    assert by_hand().cell_accuracy.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_the_loss_is_the_mean_over_labels_and_is_counted_as_the_mean_of_each_row():
    counts, right, wrong = by_hand(), cross_entropy(True), cross_entropy(False)
    assert counts.total.item() == pytest.approx(7 * right + 3 * wrong, rel=1e-5)
    assert counts.mean.item() == pytest.approx((7 * right + 3 * wrong) / 10, rel=1e-5)
    expected = [right, (2 * right + wrong) / 3, (right + 2 * wrong) / 3, 0]
    assert counts.loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_only_labels_of_rows_get_gradient():
    logits = torch.randn(6, 10, requires_grad=True)
    q_halt = torch.zeros(3, requires_grad=True)
    labels = torch.tensor([2, IGNORE, 3, IGNORE, IGNORE, IGNORE])
    row = torch.tensor([0, 0, 0, 1, 3, 4])  # row 1 has no labels, row 2 no tokens; 3, 4: none
    counts = row_counts(logits, labels, row, 3)
    (counts.mean + halting_mean(q_halt, counts)).backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [True, False, True, False, False, False]
    assert (q_halt.grad.abs() > 0).tolist() == [True, False, False]


def test_halting_is_scored_against_the_whole_grid_being_right():
    labels, row = torch.tensor([2, 3, 2, 3]), torch.tensor([0, 0, 1, 1])
    counts = row_counts(logits_for([2, 3, 2, 4]), labels, row, 3)
    q_halt = torch.tensor([1.5, 1.5, 1.5])
    expected = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5)), 0]
    assert halting_loss(q_halt, counts).tolist() == pytest.approx(expected, rel=1e-5)
    mean = HALT_WEIGHT * sum(expected) / 2
    assert halting_mean(q_halt, counts).item() == pytest.approx(mean, rel=1e-5)
