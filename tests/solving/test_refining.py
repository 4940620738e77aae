"""Rows leave when they are done and others take their room: same answers, fewer steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import InferenceConfig
from arctrm.solving.candidates import answer, refined, task_queries
from arctrm.solving.refining import fitting
from arctrm.solving.weights import load_solver

STEPS = 5
ALL = InferenceConfig(tokens_per_batch=1024, dtype="float32", steps=STEPS)
HALT = ALL.model_copy(update={"halt": True})


@pytest.fixture
def solver(trained):
    """Its halting logit changes from step to step and from row to row, around zero."""
    solver = load_solver(trained.run, ALL, torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in solver.trm.parameters():
        parameter.detach().normal_(std=0.3)
    solver.trm.q_head.bias.detach().fill_(-1.0)
    return solver


@pytest.fixture
def queries(solver, trained):
    tasks = [task.without_answers() for task in (*trained.known, *trained.others)]
    return [query for task in tasks for query in task_queries(solver, task, 4, 0)][:60]


def rows_computed(solver, monkeypatch):
    """Filled with the number of tokens of each supervision step."""
    tokens, step = [], solver.trm.supervision_step

    def spy(latents, x, seq, first_token):
        tokens.append(x.shape[0])
        return step(latents, x, seq, first_token)

    monkeypatch.setattr(solver.trm, "supervision_step", spy)
    return tokens


def first_positive(solver, queries):
    """Each query alone, step by step: what the first step with a positive logit says."""
    said = [
        refined(solver, queries, ALL.model_copy(update={"steps": count}))
        for count in range(1, STEPS + 1)
    ]
    return [
        next((own for own in by_step if own.q_halt > 0), by_step[-1])
        for by_step in zip(*said, strict=True)
    ]


@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_leaves_early_says_what_its_last_step_said(solver, queries, static):
    expected = first_positive(solver, queries)
    assert {own.steps for own in expected} >= {1, 2, STEPS}
    found = refined(solver, queries, HALT, static=static)
    for own, wanted in zip(found, expected, strict=True):
        assert own.steps == wanted.steps
        assert own.q_halt == pytest.approx(wanted.q_halt, abs=1e-4)
        np.testing.assert_array_equal(own.codes, wanted.codes)


def test_the_steps_computed_are_those_that_the_rows_took(solver, queries, monkeypatch):
    sizes = [solver.trm.config.num_slots + query.codes.size for query in queries]
    tokens = rows_computed(solver, monkeypatch)
    everything = [candidate.steps for _, candidate in answer(solver, queries, ALL)]
    assert everything == [STEPS] * len(queries)
    assert sum(tokens) == STEPS * sum(sizes)
    tokens.clear()
    steps = [candidate.steps for _, candidate in answer(solver, queries, HALT)]
    assert sum(tokens) == int(np.dot(steps, sizes)) < 0.8 * STEPS * sum(sizes)
    assert max(tokens) <= 1024


def test_on_a_static_axis_waiting_rows_take_the_room_of_those_that_left(
    solver, queries, monkeypatch
):
    tokens = rows_computed(solver, monkeypatch)
    every = refined(solver, queries, ALL, static=True)
    without = len(tokens)
    halted = refined(solver, queries, HALT, static=True)
    assert set(tokens) == {1024}
    share = sum(own.steps for own in halted) / sum(own.steps for own in every)
    assert len(tokens) - without < (share + 0.25) * without


def test_a_row_above_the_bound_is_answered_alone(solver, queries):
    large = replace(queries[0], codes=np.zeros((30, 30), np.uint8))
    [own] = refined(solver, [large], ALL)
    assert own.codes.shape == (900,)


def test_rows_fit_in_order():
    assert fitting([3, 4, 5], 7, 9) == 2
    assert fitting([3, 4, 5], 70, 1) == 1
    assert fitting([8, 1], 7, 9) == 0
    assert fitting([], 7, 9) == 0
