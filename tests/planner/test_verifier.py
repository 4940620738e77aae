"""The verifier judges by held-out demonstrations; the answer, if known, feeds metrics alone."""

import dataclasses

import numpy as np
import pytest
import torch

from arctrm.data.task import Pair
from arctrm.planner import GridVerifier
from arctrm.planner.verifier import MAX_CELLS, feedback_text, probe

INPUT = np.zeros((2, 2), dtype=np.uint8)
OUTPUTS = [
    np.array([[1, 2], [3, 4]], dtype=np.uint8),
    np.array([[5, 5, 5]], dtype=np.uint8),
    np.array([[0]], dtype=np.uint8),
]
DEMONSTRATIONS = [Pair(INPUT, output) for output in OUTPUTS]
NO_GRIDS = [None, [], [[]], np.zeros((0, 0)), [[1, 2], [3]], [[11]], "text"]


def judge(probes, demonstrations=DEMONSTRATIONS, target=None, prediction=None):
    return GridVerifier(target, demonstrations).verify(probes, prediction)


def test_all_probes_exact_is_success_with_a_full_score():
    verdict = judge(OUTPUTS)
    assert verdict.success
    assert verdict.score == 1
    assert verdict.feedback == "3 of 3 held-out demonstrations right"


@pytest.mark.parametrize("demonstrations", [None, []])
def test_without_probes_there_is_no_success(demonstrations):
    verdict = judge([], demonstrations, target=OUTPUTS[0], prediction=OUTPUTS[0])
    assert (verdict.success, verdict.score, verdict.feedback) == (False, 0, "")
    assert verdict.metrics["exact_match"] == 1


@pytest.mark.parametrize("nothing", NO_GRIDS, ids=str)
def test_what_is_no_grid_is_wrong(nothing):
    verdict = judge([nothing, OUTPUTS[1], OUTPUTS[2]], target=OUTPUTS[0], prediction=nothing)
    assert not verdict.success
    assert verdict.probes[0].predicted is None
    assert verdict.probes[0].score == 0
    assert verdict.prediction is None
    assert verdict.metrics["exact_match"] == verdict.metrics["shape_match"] == 0


def test_two_targets_give_the_same_verdict_but_other_metrics():
    probes, prediction = [OUTPUTS[0], [[5, 6, 5]], None], [[7, 7]]
    verdicts = [judge(probes, target=t, prediction=prediction) for t in (None, [[7, 7]], [[1]])]
    for verdict in verdicts[1:]:
        for field in dataclasses.fields(verdict):
            if field.name not in ("metrics", "probes", "prediction"):
                assert getattr(verdict, field.name) == getattr(verdicts[0], field.name)
        scores = [[p.score for p in v.probes] for v in (verdict, verdicts[0])]
        assert scores[0] == scores[1]
    shared = verdicts[0].metrics
    assert all(shared.items() <= verdict.metrics.items() for verdict in verdicts[1:])
    assert [v.metrics.get("exact_match") for v in verdicts] == [None, 1, 0]


def test_metrics_are_shares():
    verdict = judge(
        [OUTPUTS[0], [[5, 6, 5]], None], target=[[1, 1], [1, 1]], prediction=[[1, 2], [1, 1]]
    )
    assert verdict.metrics == {
        "probe_exact": 1 / 3,
        "probe_shape": 2 / 3,
        "probe_palette": 1 / 3,
        "probe_cells": pytest.approx((1 + 2 / 3) / 3),
        "exact_match": 0,
        "shape_match": 1,
        "cell_accuracy": 0.75,
    }


def test_demonstrations_come_as_pairs_tuples_or_json():
    told = [
        judge([[[1]]], [form]).feedback
        for form in (
            Pair(INPUT, OUTPUTS[1]),
            (torch.from_numpy(INPUT), torch.from_numpy(OUTPUTS[1])),
            {"input": INPUT.tolist(), "output": OUTPUTS[1].tolist()},
        )
    ]
    assert told[0] == told[1] == told[2]


def test_the_feedback_says_size_palette_and_cells():
    probes = [[[1, 9], [3, 0]], [[5], [7]], None]
    assert judge(probes).feedback.splitlines() == [
        "0 of 3 held-out demonstrations right",
        "demonstration 1: 2 of 4 cells wrong: (0,1) 9/2 (1,1) 0/4; colours missing 2 4, extra 0 9",
        "demonstration 2: size 2x1, should be 1x3; colours extra 7",
        "demonstration 3: no grid, should be 1x1",
    ]


def test_a_bounded_number_of_cells_is_named_in_equal_shares():
    rng = np.random.default_rng(0)
    truths = [np.zeros((size, size), dtype=np.uint8) for size in (30, 2, 9)]
    text = feedback_text([probe(rng.integers(1, 10, t.shape), t) for t in truths])
    share = MAX_CELLS // 3
    assert [line.count("/0") for line in text.splitlines()] == [0, share, 4, share]
    assert f"and {900 - share} more" in text
