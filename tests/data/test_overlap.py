"""The overlap guard: content decides, in every orientation; the known facts hold."""

import numpy as np
import pytest

from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.overlap import (
    Overlap,
    check,
    check_inverse,
    find_overlaps,
    refused,
)
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import OverlapError
from helpers import grid

ONE = Pair(grid([1, 2, 0], [0, 0, 3]), grid([3, 3]))
TWO = Pair(grid([4, 4], [5, 5]), grid([6]))
OTHER_OUTPUT = Pair(TWO.input, grid([7]))
TEST = Task("t", (ONE,), (TWO,))


@pytest.fixture(scope="module")
def evaluation():
    return load_tasks("evaluation")


@pytest.mark.parametrize(
    "task",
    [Task("x", (ONE, TWO)), Task("x", (ONE,), (TWO,)), Task("x", (ONE,), (ONE, TWO))],
)
def test_a_test_pair_is_found_in_demonstrations_and_test_pairs(task):
    assert find_overlaps({"s": [task]}, [TEST]) == [Overlap("x", "s", "t", "pair")]


@pytest.mark.parametrize("turn", [np.copy, np.rot90, np.flipud])
def test_a_test_pair_that_an_inverse_task_would_show_is_refused(turn):
    turned = Pair(turn(TWO.output).copy(), turn(TWO.input).copy())
    tasks = {"s": [Task("x", (ONE, turned))], "eval": [TEST]}
    base = base_set_from_tasks(tasks, "eval", 0)
    with pytest.raises(OverlapError, match=r"reader\.inverse_share.*x \(test pair of t\)"):
        check_inverse(base, [TEST])


def test_other_inverse_tasks_are_no_overlap(evaluation):
    plain = base_set_from_tasks({"s": [Task("x", (ONE, TWO))], "eval": [TEST]}, "eval", 0)
    check_inverse(plain, [TEST])
    tasks = {"training": load_tasks("training", max_tasks=99), "evaluation": evaluation}
    check_inverse(base_set_from_tasks(tasks, "evaluation", 0), evaluation)


@pytest.mark.parametrize("turn", [np.rot90, np.fliplr, np.flipud, np.transpose])
def test_a_turned_or_mirrored_test_pair_is_found(turn):
    turned = Task("x", (Pair(turn(TWO.input).copy(), turn(TWO.output).copy()),))
    assert find_overlaps({"s": [turned]}, [TEST]) == [Overlap("x", "s", "t", "pair")]


def test_a_test_input_with_another_output_is_found_as_input():
    found = find_overlaps({"s": [Task("x", (OTHER_OUTPUT,))]}, [TEST])
    assert found == [Overlap("x", "s", "t", "input")]


def test_a_copy_of_a_test_task_in_another_subset_is_an_overlap():
    found = find_overlaps({"eval": [TEST], "more": [TEST]}, [TEST], "eval")
    assert found == [Overlap("t", "more", "t", "pair")]


def test_within_the_test_set_only_another_tasks_answer_is_refused():
    tasks = [TEST, Task("leak", (TWO,)), Task("hint", (OTHER_OUTPUT,)), Task("own", (ONE,), (ONE,))]
    overlaps = find_overlaps({"eval": tasks}, tasks, "eval")
    assert {overlap.task_id for overlap in overlaps} == {"leak", "hint", "own", "t"}
    assert {overlap.task_id for overlap in refused(overlaps, "eval")} == {"leak", "t"}


def test_the_refusal_names_the_ids_and_what_to_do():
    overlaps = [Overlap(f"task{number:02d}", "more", "t", "pair") for number in range(15)]
    with pytest.raises(OverlapError) as caught:
        check(overlaps, "eval")
    message = str(caught.value)
    assert "task00 (test pair of t)" in message
    assert "task09" in message
    assert "task10" not in message
    assert "and 5 more tasks" in message
    for key in ("data.drop_overlap", "data.exclude", "data.allow_overlap"):
        assert key in message


def test_arc_agi_1_training_holds_exactly_one_evaluation_test_pair(evaluation):
    found = find_overlaps({"training": load_tasks("training")}, evaluation)
    assert found == [Overlap("40853293", "training", "070dd51e", "pair")]


def test_arc_agi_1_evaluation_holds_a_test_input_and_a_mirrored_own_pair(evaluation):
    found = find_overlaps({"evaluation": evaluation}, evaluation, "evaluation")
    assert found == [
        Overlap("8719f442", "evaluation", "6ea4a07e", "input"),
        Overlap("992798f6", "evaluation", "992798f6", "pair"),
    ]
    check(found, "evaluation")


@pytest.mark.slow
def test_376_of_arc_agi_1s_evaluation_tasks_are_in_arc_agi_2_training(evaluation):
    found = find_overlaps({"training2": load_tasks("training2")}, evaluation)
    assert (
        len({o.task_id for o in found if o.kind == "pair" and o.task_id == o.test_task_id}) == 376
    )


def test_further_pairs_of_a_test_task_are_refused_and_its_demonstrations_are_not():
    generated = Task("t", (ONE, Pair(grid([8]), grid([9]))))
    found = find_overlaps({"eval": [TEST], "made": [generated]}, [TEST], "eval")
    assert found == [Overlap("t", "made", "t", "task")]
    with pytest.raises(OverlapError, match=r"made hold.*t \(further pairs of a test task\)"):
        check(found, "eval")
    assert not find_overlaps(
        {"made": [Task("t", (ONE,)), Task("x", generated.demonstrations)]}, [TEST]
    )
