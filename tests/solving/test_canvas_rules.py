"""Size rules: what they predict, and that the canvas they give is large enough."""

import numpy as np
import pytest

from arctrm.data.sources import load_tasks
from arctrm.data.task import Grid, Pair, Task
from arctrm.solving.canvas_rules import output_size, plausible_sides, query_canvas

Size = tuple[int, int]


def blank(size: Size) -> Grid:
    return np.zeros(size, dtype=np.uint8)


def sized_task(*pairs: tuple[Size, Size]) -> Task:
    demonstrations = tuple(Pair(blank(i), blank(o)) for i, o in pairs)
    return Task("sized", demonstrations)


@pytest.mark.parametrize(
    ("pairs", "query", "expected"),
    [
        ([((3, 4), (3, 4)), ((5, 2), (5, 2))], (7, 9), (7, 9, "same")),
        ([((3, 4), (2, 1)), ((5, 2), (2, 1))], (7, 9), (2, 1, "constant")),
        ([((2, 2), (6, 6)), ((3, 2), (9, 6)), ((3, 5), (9, 15))], (4, 3), (12, 9, "ratio")),
        ([((4, 6), (2, 3)), ((8, 2), (4, 1))], (10, 12), (5, 6, "ratio")),
        ([((3, 3), (5, 5)), ((4, 6), (6, 8))], (10, 2), (12, 4, "offset")),
        ([((3, 3), (3, 1)), ((4, 6), (4, 1))], (10, 2), (10, 1, "same x constant")),
        ([((3, 5), (5, 3)), ((4, 2), (2, 4))], (7, 9), (9, 7, "transposed same")),
        ([((9, 9), (2, 4)), ((9, 8), (5, 1))], (9, 9), (5, 4, "maximum")),
    ],
)
def test_a_rule_that_fits_all_demonstrations_gives_the_size(pairs, query, expected):
    assert tuple(output_size(sized_task(*pairs), blank(query))) == expected


def test_a_rule_that_leaves_the_30_cells_is_not_believed():
    task = sized_task(((3, 3), (9, 9)), ((5, 5), (15, 15)))
    assert output_size(task, blank((12, 12))) == (15, 15, "maximum")
    assert query_canvas(task, blank((12, 12))) == (30, 30)


def test_the_canvas_has_room_for_every_rule_that_fits():
    task = sized_task(((3, 3), (9, 9)), ((3, 3), (9, 9)))
    rules = {side.rule: side.length for side in plausible_sides(task, blank((4, 3)), axis=0)}
    assert rules == {"constant": 9, "ratio": 12, "offset": 10}
    assert query_canvas(task, blank((4, 3))) == (13, 10)


def test_the_canvas_has_room_for_one_step_more_than_the_demonstrations():
    task = sized_task(((1, 5), (10, 10)), ((1, 5), (5, 5)), ((1, 5), (15, 15)))
    assert query_canvas(task, blank((1, 5))) == (21, 21)


def test_the_canvas_holds_the_query_and_never_exceeds_30():
    task = sized_task(((30, 10), (1, 1)), ((20, 8), (1, 1)))
    assert query_canvas(task, blank((30, 12))) == (30, 13)


def test_the_size_is_guessed_without_looking_at_the_test_pairs():
    task = sized_task(((3, 3), (9, 4)), ((5, 5), (8, 2)))
    with_answer = Task(task.id, task.demonstrations, (Pair(blank((6, 6)), blank((30, 30))),))
    assert query_canvas(with_answer, blank((6, 6))) == query_canvas(task, blank((6, 6)))


def test_the_canvas_holds_the_output_of_all_arc_agi_1_training_tests_at_2_percent_more_cells():
    cells = needed = 0
    for task in load_tasks("training"):
        for pair in task.test:
            assert pair.output is not None
            canvas = query_canvas(task.without_answers(), pair.input)
            room = np.maximum(pair.input.shape, pair.output.shape) + 1
            room = np.minimum(room, 30)
            assert (canvas >= room).all(), task.id
            cells, needed = cells + np.prod(canvas), needed + np.prod(room)
    assert needed
    assert cells / needed < 1.02
