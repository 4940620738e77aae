"""The scores by name, on predictions small enough to count by hand."""

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from arctrm.data.task import Pair, Task
from arctrm.errors import DataError
from arctrm.solve.scoring import (
    answers,
    is_right,
    score,
    scores_dict,
    scores_table,
    task_table,
)
from helpers import grid

RIGHT, NEAR, WRONG, WIDE = grid([1, 2]), grid([1, 3]), grid([4, 4]), grid([1, 2, 2])
EMPTY = np.zeros((0, 0), dtype=np.uint8)


def test_task_fraction_counts_half_a_task_with_one_of_two_test_pairs():
    known = {"a": [RIGHT, RIGHT], "b": [RIGHT]}
    scores = score({"a": [[RIGHT], [WRONG]], "b": [[WRONG]]}, known)
    assert scores.task_fraction[2] == 0.25
    assert scores.pair_fraction[2] == pytest.approx(1 / 3)
    assert scores.whole_task[2] == 0


def test_a_task_is_whole_only_when_every_test_pair_is_solved():
    known = {"a": [RIGHT, RIGHT], "b": [RIGHT]}
    scores = score({"a": [[WRONG, RIGHT], [RIGHT]], "b": [[WRONG]]}, known)
    assert scores.whole_task == {1: 0, 2: 0.5, 10: 0.5}
    assert scores.task_fraction == {1: 0.25, 2: 0.5, 10: 0.5}


@pytest.mark.parametrize(
    ("place", "expected"),
    [(0, (1, 1, 1)), (1, (0, 1, 1)), (2, (0, 0, 1)), (9, (0, 0, 1)), (10, (0, 0, 0))],
)
def test_the_rank_of_the_answer_decides_the_pass(place, expected):
    ranked = [grid([5, i % 10, 0, i // 10]) for i in range(12)]
    ranked[place] = RIGHT
    scores = score({"a": [ranked]}, {"a": [RIGHT]})
    assert tuple(scores.pair_fraction[k] for k in (1, 2, 10)) == expected


def test_an_empty_prediction_never_scores():
    scores = score({"a": [[EMPTY, EMPTY]], "b": [[]]}, {"a": [RIGHT], "b": [RIGHT]})
    assert scores.pair_fraction == {1: 0, 2: 0, 10: 0}
    assert (scores.shape_accuracy, scores.cell_accuracy) == (0, 0)
    assert is_right(EMPTY, EMPTY) is False
    assert score({"a": [[EMPTY]]}, {"a": [EMPTY]}).pair_fraction[10] == 0


def test_shape_and_cells_judge_attempt_1_and_a_wrong_size_has_no_right_cell():
    known = {"a": [RIGHT], "b": [RIGHT], "c": [RIGHT, RIGHT]}
    scores = score({"a": [[NEAR, RIGHT]], "b": [[WIDE]], "c": [[RIGHT], [WRONG]]}, known)
    assert scores.shape_accuracy == 0.75
    assert scores.cell_accuracy == (0.5 + 0 + 1 + 0) / 4
    rows = {i: (r.solved, r.total, r.shape, r.cells) for i, r in scores.tasks.items()}
    assert rows == {"a": (1, 1, 1, 0.5), "b": (0, 1, 0, 0), "c": (1, 2, 1, 0.5)}


def test_a_test_pair_without_a_known_answer_is_counted_as_unscored_and_changes_no_score():
    scores = score({"a": [[WRONG], [RIGHT]], "b": [[RIGHT]]}, {"a": [None, RIGHT], "b": [None]})
    assert scores.task_fraction[2] == scores.pair_fraction[2] == 1
    assert (scores.num_tasks, scores.num_pairs, scores.num_unscored) == (1, 1, 2)


def test_with_no_answer_at_all_scoring_says_so():
    with pytest.raises(DataError, match="no answer is known"):
        score({"a": [[RIGHT], [RIGHT]]}, {"a": [None, None]})
    with pytest.raises(DataError, match="nothing to score"):
        score({}, {})


def test_answers_follow_the_test_inputs():
    task = Task("a", (), (Pair(WRONG, RIGHT), Pair(WIDE)))
    (known,) = answers([task]).values()
    assert known[0] is RIGHT
    assert known[1] is None
    assert answers([task.without_answers()]) == {"a": [None, None]}


def test_scores_json_and_the_tables_name_every_score():
    scores = score({"a": [[WRONG, RIGHT]], "b": [[RIGHT]]}, {"a": [RIGHT], "b": [RIGHT]})
    written = json.loads(json.dumps(scores_dict(scores)))
    assert written["task_fraction"] == {"pass@1": 0.5, "pass@2": 1.0, "pass@10": 1.0}
    assert written["tasks"]["a"] == {"solved": 1, "total": 1, "shape": 1.0, "cells": 0.0}
    console = Console(width=100, record=True, file=StringIO())
    console.print(scores_table(scores), task_table(scores))
    text = console.export_text()
    for name in ("task_fraction", "pair_fraction", "whole_task", "shape_accuracy", "cell_accuracy"):
        assert name in written
        assert name in text
    assert "pass@10" in text
    assert "1 of 1" in text
