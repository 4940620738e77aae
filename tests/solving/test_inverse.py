"""The reader asked the other way round: what it says, about what, and what that changes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import EvalConfig, InferenceConfig, JudgingConfig, SolveConfig
from arctrm.data.views import View
from arctrm.reader.scoring import score
from arctrm.reader.tokens import prompt
from arctrm.solving import inverse, rounds
from arctrm.solving.adaptation import Adapter
from arctrm.solving.anytime import solve_task
from arctrm.solving.evaluate import run
from arctrm.solving.kept import KEPT, read_candidates
from arctrm.solving.vote import Candidate, by_experts, by_explanation, vote
from arctrm.solving.weights import load_solver

CPU = torch.device("cpu")
JUDGING = JudgingConfig()
RED, BLUE, GREEN = (np.full((1, 2), colour, np.uint8) for colour in (2, 1, 3))


@pytest.fixture(scope="module")
def checkpoint(trained_reader):
    return trained_reader(inverse_share=0.4)


@pytest.fixture(scope="module")
def solver(checkpoint):
    return load_solver(checkpoint, InferenceConfig(dtype="float32"), CPU)


@pytest.fixture(scope="module")
def plain(tiny_reader):
    """Of a reader that learned no inverse tasks."""
    return load_solver(tiny_reader, InferenceConfig(dtype="float32"), CPU)


def candidates(task):
    """Two grids for every test input: the true one and one that is it not."""
    return {
        (task.id, index): [pair.output, np.rot90(pair.input).copy()]
        for index, pair in enumerate(task.test)
    }


def test_it_says_what_a_reader_of_the_inverse_task_would_say_of_the_input(solver, trained):
    """The same weights, but that the vectors of the inverse tasks are those of the tasks."""
    task, other = trained.known[0], copy.deepcopy(solver.reader)
    other.puzzle_emb = other.inverse_emb
    readings = inverse.inverse_readings(solver, [task], JUDGING)
    found = inverse.judge_inputs(solver.reader, readings, candidates(task), JUDGING)
    assert [key for key, _ in found] == [one.key for one in readings]
    for (_, own), one in zip(found, readings, strict=True):
        view = one.view
        assert view == View(view.dihedral)
        condition = solver.row_of(task), view.dihedral, 1
        shown = [view.apply(grid) for grid in candidates(task)[one.key]]
        prompts = [prompt([], grid, condition) for grid in shown]
        asked = view.apply(task.test[one.key[1]].input)
        expected = score(other, prompts, [[asked] for _ in prompts])
        np.testing.assert_allclose(own, [value for (value,) in expected], rtol=1e-4)
    assert {one.view.dihedral for one in readings} == set(range(8))
    inputs = score(solver.reader, prompts, [[asked] for _ in prompts])
    assert abs(inputs[0][0] - own[0]) > 1e-3  # the task's own vector says something else


def test_fewer_views_judge_where_fewer_are_wanted(solver, trained):
    few = JudgingConfig(scoring_views=3)
    readings = inverse.inverse_readings(solver, trained.known[:2], few)
    assert {one.view.dihedral for one in readings} == {0, 1, 2}
    assert {one.key[0] for one in readings} == {task.id for task in trained.known[:2]}


def test_only_tasks_that_were_trained_on_are_asked_about(solver, trained):
    assert inverse.inverse_readings(solver, trained.others, JUDGING) == []


def test_who_is_asked(solver, plain, trained):
    assert inverse.is_asked(solver, JUDGING)
    assert not inverse.is_asked(solver, JudgingConfig(inverse_weight=0))
    assert not inverse.is_asked(solver, JudgingConfig(rank="votes"))
    assert not inverse.is_asked(plain, JUDGING)
    assert inverse.judge_inputs(plain.reader, [], {}, JUDGING) == []
    adapted = Adapter(solver, [trained.others[0]], SolveConfig().adaptation, 0).answering()
    assert adapted.row_of(trained.others[0]) is not None
    assert not inverse.is_asked(adapted, JUDGING)


# -- what it changes


def judged():
    """Three grids, judged but for the last: RED before BLUE before GREEN."""
    found = vote(
        [Candidate(grid, 0.0, "reader") for grid in (RED, RED, RED, BLUE, BLUE, GREEN)], seed=0
    )
    return by_experts(found, [[-1.0, -2.0], [-2.0, -2.0]])


def colours(ranked):
    return [int(one.grid[0, 0]) for one in ranked]


def test_means_of_both_are_added_by_weight():
    ranked = judged()
    assert colours(ranked) == [2, 1, 3]
    scores = [[-9.0, -5.0], [-9.0, -6.0], [-9.0, -4.0]]  # -9 and -5 in the mean: 4 nats
    assert colours(by_explanation(ranked, scores, 0.1)) == [2, 1, 3]  # 0.5 nats against 0.4
    assert colours(by_explanation(ranked, scores, 0.15)) == [1, 2, 3]
    first = by_explanation(ranked, scores, 0.15)[0]
    assert first.inverse_scores == (-5.0, -6.0, -4.0)
    assert first.reader_scores == (-2.0, -2.0)


def test_what_is_not_asked_about_stays_behind():
    ranked = judged()
    assert colours(by_explanation(ranked, [[-50.0]], 10.0)) == [2, 1, 3]
    assert colours(by_explanation(ranked, [], 1.0)) == [2, 1, 3]


def test_the_best_that_were_judged_are_asked_about():
    ranked = {("a", 0): judged()}
    assert colours_of(inverse.to_explain(ranked, JUDGING)) == [2, 1]
    assert colours_of(inverse.to_explain(ranked, JudgingConfig(inverse_candidates=1))) == [2]


def colours_of(grids):
    return [int(grid[0, 0]) for grid in grids["a", 0]]


# -- eval and solve


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory, write_tasks):
    chosen = [*trained.known[:2], trained.others[0]]
    return write_tasks(tmp_path_factory.mktemp("tasks"), chosen)


def evaluation(checkpoint, folder, **reader):
    return EvalConfig.model_validate(
        {
            "checkpoint": checkpoint,
            "evaluation": {"test_set": str(folder), "keep_candidates": True},
            "inference": {"views": 6, "dtype": "float32", "invariant_weight": 0.0},
            "reader": {"scoring_views": 2, **reader},
        }
    )


@pytest.mark.parametrize("weight", [0.0, 0.5, 50.0])
def test_eval_ranks_by_both(checkpoint, folder, trained, tmp_path, weight):
    run(evaluation(checkpoint, folder, inverse_weight=weight), tmp_path / "out")
    kept = read_candidates(tmp_path / "out" / KEPT)
    known = {task.id for task in trained.known[:2]}
    asked = 0
    for task, inputs in kept.items():
        for own in inputs:
            both = [one for one in own if one.inverse_scores]
            asked += len(both)
            assert own[: len(both)] == both
            assert not both or (weight and task in known)
            values = [
                np.mean(one.reader_scores) + weight * np.mean(one.inverse_scores) for one in both
            ]
            assert values == sorted(values, reverse=True)
    assert (asked > 2) == (weight > 0)


@pytest.mark.parametrize("known", [True, False])
def test_solve_asks_about_tasks_that_it_knows(solver, trained, monkeypatch, known):
    asked = []

    def spied(reader, readings, grids, decoding):
        found = inverse.judge_inputs(reader, readings, grids, decoding)
        asked.append(found)
        # As if the worst of them explained the input far better than the best.
        return [(key, [100.0 * n for n in range(len(own))]) for key, own in found]

    settings = SolveConfig.model_validate(
        {
            "budget": 60.0,
            "inference": {"views": 6, "dtype": "float32"},
            "reader": {"scoring_views": 2},
            "adaptation": {"max_steps": 1, "tokens_per_batch": 256},
        }
    )
    tasks = [task.without_answers() for task in (trained.known if known else trained.others)[:3]]
    plain = settings.model_copy(update={"reader": JUDGING_OFF})
    before = [one for task in tasks for one in solve_task(solver, task, plain)]
    monkeypatch.setattr(rounds, "judge_inputs", spied)
    after = [one for task in tasks for one in solve_task(solver, task, settings)]
    assert len(asked) == (2 * len(tasks) if known else 0)
    same = [
        all(map(np.array_equal, one.attempts, other.attempts))
        for one, other in zip(before, after, strict=True)
    ]
    assert all(same) == (not known)


JUDGING_OFF = JudgingConfig(scoring_views=2, inverse_weight=0)


def test_a_blank_task_embedding_blanks_both_tables(checkpoint):
    blank = InferenceConfig(dtype="float32", blank_task_embedding=True)
    reader = load_solver(checkpoint, blank, CPU).reader
    assert not reader.puzzle_emb.weights.any()
    assert not reader.inverse_emb.weights.any()


def test_the_mean_stands_behind_both_tables(solver, trained):
    for table in (solver.reader.puzzle_emb, solver.reader.inverse_emb):
        assert len(table.weights) == len(trained.known) + 1
        torch.testing.assert_close(table.weights[-1], table.weights[:-1].mean(0))


def test_a_reader_without_its_ensemble_is_asked_alone(solver):
    assert inverse.is_asked(replace(solver, with_ensemble=False), JUDGING)
