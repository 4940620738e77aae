"""What is asked: views, sizes, bounds, and nothing of the answer."""

from dataclasses import replace

import numpy as np
import pytest

from arctrm.config import TaskChoiceConfig
from arctrm.data.task import Pair, Task
from arctrm.data.views import DIHEDRALS, IDENTITY, View, fixed_colours
from arctrm.errors import DataError, TaskError
from arctrm.model import layout
from arctrm.model.layout import Condition, grid_length
from arctrm.solve.questions import (
    Key,
    inverse_questions,
    keys_of,
    load_test_set,
    questions,
    require_test_inputs,
)


@pytest.fixture
def task(trained):
    return trained.known[0].without_answers()


def test_every_test_input_is_asked_under_every_view_the_identity_first(solver, trained):
    task = replace(trained.known[0], test=trained.known[0].test * 2)
    asked = questions(solver, task, 5, seed=0)
    assert [one.key for one in asked] == [Key(task.id, 0), Key(task.id, 1)] * 5
    assert [one.number for one in asked] == [number for number in range(5) for _ in range(2)]
    assert asked[0].view == IDENTITY
    assert len({one.view for one in asked}) == 5


def test_a_question_shows_its_view_and_says_so(solver, trained):
    for task in trained.known:
        row = solver.row_of(task)
        for one in questions(solver, task, 12, seed=0):
            given = task.test[one.key.index].input
            np.testing.assert_array_equal(one.query, one.view.apply(given))
            keeps = int(one.view.identity_colours)
            assert one.condition == Condition(row, one.view.dihedral, keeps)
            expected = layout.prompt(one.query, one.condition)
            np.testing.assert_array_equal(one.prompt.tokens, expected.tokens)
            np.testing.assert_array_equal(one.turned_back(one.shown(given)), given)
            assert all(one.view.colours[c] == c for c in np.flatnonzero(fixed_colours(task)))


def test_a_held_out_answer_changes_no_question(solver, trained):
    task = trained.known[1]
    other = replace(task, test=tuple(Pair(p.input, (p.output + 1) % 10) for p in task.test))
    for a, b in zip(*(questions(solver, t, 6, 0) for t in (task, other)), strict=True):
        assert (a.key, a.view, a.shape, a.room, a.condition) == (
            *(b.key, b.view, b.shape, b.room, b.condition),
        )
        np.testing.assert_array_equal(a.prompt.tokens, b.prompt.tokens)


def test_an_unknown_task_is_asked_about_with_the_mean(solver, trained):
    asked = questions(solver, trained.others[0], 3, seed=0)
    assert {one.condition.task for one in asked} == {solver.mean_row}


def test_the_likeliest_size_turns_with_the_view_and_fits_into_the_room(solver):
    wide = Pair(np.ones((2, 4), np.uint8), np.ones((2, 8), np.uint8))
    task = Task("wide", (wide, wide), (Pair(np.ones((3, 5), np.uint8)),))
    for one in questions(solver, task, 16, seed=0):
        turned = DIHEDRALS[one.view.dihedral][0]
        assert one.shape == ((8, 3) if turned else (3, 8))
        assert grid_length(*one.shape) + 1 <= one.room


def test_inverse_questions_are_of_known_tasks_under_dihedral_views(solver, trained):
    asked = inverse_questions(solver, [*trained.known[:2], trained.others[0]], 3)
    assert {one.key.task for one in asked} == {task.id for task in trained.known[:2]}
    assert [one.view for one in asked[:: len(asked) // 3]] == [View(n) for n in range(3)]
    for one in asked:
        assert one.prompt is None
        assert (one.condition.inverse, one.condition.keeps_colours) == (1, 1)
    assert len(inverse_questions(solver, trained.known[:1], 100)) == 8
    assert inverse_questions(solver, trained.others, 8) == []


# -- test sets


def test_answers_come_apart_from_the_tasks(trained):
    tasks, known = load_test_set(TaskChoiceConfig(test_set=str(trained.folder)))
    assert [task.id for task in tasks] == sorted(task.id for task in trained.known)
    assert not any(pair.output is not None for task in tasks for pair in task.test)
    for task in trained.known:
        np.testing.assert_array_equal(known[task.id][0], task.test[0].output)


def test_tasks_can_be_chosen_and_bounded(trained):
    ids = [task.id for task in trained.known]
    choose = lambda **options: load_test_set(
        TaskChoiceConfig.model_validate({"test_set": str(trained.folder), **options})
    )[0]
    assert [task.id for task in choose(tasks=[ids[3], ids[1]])] == [ids[1], ids[3]]
    assert [task.id for task in choose(max_tasks=2)] == ids[:2]
    assert len(choose(held_out=3)) == 3
    with pytest.raises(DataError, match=r"evaluation\.tasks names 'ffffffff'"):
        choose(tasks=["ffffffff"])


def test_a_task_without_a_test_input_is_refused(task):
    with pytest.raises(TaskError, match="task t has no test input"):
        require_test_inputs([task, Task("t", task.demonstrations)], "somewhere")
    assert keys_of([task, task]) == [Key(task.id, 0)] * 2
