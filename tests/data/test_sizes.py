"""The size of an unknown output: the first rule that fits every demonstration."""

import numpy as np
import pytest

from arctrm.data.sizes import output_size, plausible_sides
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task


def task(*sizes):
    """Demonstrations of (input height, input width, output height, output width)."""
    pairs = [Pair(np.zeros(s[:2], np.uint8), np.zeros(s[2:], np.uint8)) for s in sizes]
    return Task("a", tuple(pairs))


CASES = {
    "same": ([(3, 4, 3, 4), (5, 6, 5, 6)], (7, 8), (7, 8)),
    "constant": ([(3, 4, 2, 2), (5, 6, 2, 2)], (9, 9), (2, 2)),
    "ratio": ([(2, 4, 4, 2), (3, 6, 6, 3)], (5, 10), (10, 5)),
    "offset": ([(3, 4, 4, 3), (5, 9, 6, 8)], (7, 7), (8, 6)),
    "other axis": ([(3, 5, 5, 3), (4, 6, 6, 4)], (7, 9), (9, 7)),
    "irregular": ([(3, 3, 1, 1), (3, 3, 4, 2)], (3, 3), (4, 2)),
    "no longer than 30": ([(2, 2, 6, 6), (3, 3, 9, 9)], (20, 20), (9, 9)),
    "same before constant": ([(3, 3, 3, 3)], (5, 5), (5, 5)),
    "nothing to go by": ([], (5, 6), (5, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_likeliest_size(name):
    sizes, asked, expected = CASES[name]
    assert output_size(task(*sizes), np.zeros(asked, np.uint8)) == expected


def test_every_plausible_side_is_named_the_likeliest_first():
    known = task((3, 3, 3, 3), (3, 4, 3, 8))
    assert plausible_sides(known, np.zeros((5, 5), np.uint8), 0) == [5, 3, 5, 5]
    assert plausible_sides(known, np.zeros((5, 5), np.uint8), 1) == [8, 13, 10]


def test_most_sizes_are_right():
    tasks = load_tasks("evaluation", max_tasks=100)
    right = [
        pair.output.shape == output_size(task.without_answers(), pair.input)
        for task in tasks
        for pair in task.test
    ]
    assert np.mean(right) > 0.8


def grid(height, width, *cells):
    """Zeros with `cells` (row, column, colour)."""
    made = np.zeros((height, width), np.uint8)
    for y, x, colour in cells:
        made[y, x] = colour
    return made


def test_the_size_of_something_shown_is_a_rule_where_no_side_explains_the_answer():
    def pair(box_height, box_width, height, width):
        far = grid(12, 12, (1, 1, 3), (box_height, box_width, 3), (11, 11, 5), (11, 10, 5))
        return Pair(far, np.zeros((height, width), np.uint8))

    box = Task("box", (pair(3, 5, 3, 5), pair(6, 4, 6, 4)))
    asked = grid(12, 12, (1, 1, 3), (7, 2, 3), (11, 11, 5), (11, 10, 5))
    assert output_size(box, asked) == (7, 2)
    twice = Task("twice", (pair(3, 5, 6, 10), pair(6, 4, 12, 8)))
    assert output_size(twice, asked) == (14, 4)
