"""What demonstrations share is found, and a grid that breaks it is told from one that does not."""

import numpy as np
import pytest

from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.invariants.properties import Side, components, properties
from arctrm.invariants.task import COPY, Invariants, broken, broken_cells, changes, weights
from helpers import grid

RING = grid("33300", "30300", "33300", "00000", "00066")
"""A ring of 3 around a cell, and a line of 6."""


def test_cells_are_connected_by_sides_corners_and_colours():
    slant = grid("100", "010", "022")
    kinds = [(c, o) for c in (False, True) for o in (False, True)]
    counts = [components(slant, 0, corners, one).max() for corners, one in kinds]
    assert counts == [2, 3, 1, 2]
    assert components(slant, 0, corners=True, one_colour=True).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 2, 2],
    ]
    assert components(np.zeros((2, 3), np.uint8), 0, corners=True, one_colour=True).max() == 0


def test_a_cell_is_enclosed_where_no_sides_lead_out():
    assert np.argwhere(Side(RING).enclosed).tolist() == [[1, 1]]
    open_ring = RING.copy()
    open_ring[0, 1] = 0
    assert not Side(open_ring).enclosed.any()
    leaking_by_a_corner = RING.copy()
    leaking_by_a_corner[0, 0] = 0
    assert Side(leaking_by_a_corner).enclosed[1, 1]


PAIRS = {
    "same size": (RING, RING, True),
    "height by height": (grid("12"), grid("12", "12"), 2),
    "size of what there is": (grid("000", "030", "000"), grid("7"), True),
    "lost colours": (RING, grid("30"), frozenset({6})),
    "cells filled": (RING, RING.T, True),
    "cells of each colour": (RING, RING[::-1], True),
    "mirrored left to right": (RING, grid("121"), True),
    "part of the input": (RING, grid("00", "66"), True),
    "objects": (RING, RING, 2),
    "the same forms": (grid("300", "000"), grid("000", "002"), True),
    "the same forms and colours": (grid("300", "000"), grid("000", "002"), False),
    "colours they change to": (grid("123"), grid("143"), frozenset({4})),
    "what is filled stays": (grid("030"), grid("434"), True),
    "colour for colour": (grid("112"), grid("334"), True),
    "changes beside something": (grid("0300"), grid("0340"), True),
    "changes next to something": (grid("0300"), grid("0304"), False),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_property_has_its_value(name):
    before, after, value = PAIRS[name]
    assert properties(Side(before), Side(after))[name, -1] == value


def test_a_property_of_a_colour_is_one_of_that_colour():
    found = properties(Side(grid("1122")), Side(grid("1130")))
    assert found["cells of a colour", 1] is True
    assert found["cells of a colour", 2] is False
    assert found["a colour goes", 2] is True
    assert found["black is there", 0] is True


RECOLOURED = (
    Pair(grid("020", "002"), grid("030", "003")),
    Pair(grid("200", "000", "020"), grid("300", "000", "030")),
)
"""2 becomes 3."""


def test_a_right_answer_breaks_nothing_and_a_wrong_one_what_all_demonstrations_keep():
    own, given = Invariants(RECOLOURED), grid("0022")
    assert own.broken(given, grid("0033")) <= {"the place", "height by height"} | own.names
    assert "colours they change to" not in own.broken(given, grid("0033"))
    other_colour = own.broken(given, grid("0044"))
    assert {"colours they change to", "new colours"} <= other_colour
    stray = own.broken(given, grid("3033"))
    assert {"cells filled", "colours that change", "the four cells around"} & stray
    assert "same size" in own.broken(given, grid("003"))


def test_a_cell_rule_is_contradicted_where_it_was_seen_and_nowhere_else():
    own = Invariants((Pair(grid("0102"), grid("0304")),))
    assert "the eight cells around" in own.names
    assert "the eight cells around" in own.broken(grid("0102"), grid("0305"))
    assert "the eight cells around" not in own.broken(grid("7878"), grid("1111"))


def test_what_a_candidate_breaks_is_named_with_its_nats_the_heaviest_first():
    task, given = Task("a", RECOLOURED), grid("0022")
    found = broken(task, given, grid("0044"))
    assert {name for name, _ in found} == Invariants(RECOLOURED).broken(given, grid("0044"))
    assert all(nats == weights().get(name, 0.0) for name, nats in found)
    assert [nats for _, nats in found] == sorted((nats for _, nats in found), reverse=True)
    assert broken(Task("of another id", RECOLOURED), given, grid("0044")) == found


def test_a_copy_of_the_input_is_broken_only_where_every_demonstration_changes_something():
    task, given = Task("a", RECOLOURED), grid("0022")
    assert changes(task)
    assert broken(task, given, given)[0][0] == COPY
    assert COPY not in dict(broken(task, given, grid("0033")))
    kept = Task("a", (*RECOLOURED, Pair(given, given)))
    assert not changes(kept)
    assert COPY not in dict(broken(kept, given, given))
    assert not changes(Task("a", ()))
    assert COPY not in weights()


def test_right_answers_of_training_tasks_break_little():
    """Where wrong ones, here the right one with one cell changed, break something mostly."""
    tasks = load_tasks("training")[:30]
    nats, right, wrong = weights(), [], []
    for task in tasks:
        own = Invariants(task.demonstrations)
        for pair in task.test:
            changed = pair.output.copy()
            changed[0, 0] = (changed[0, 0] + 5) % 10
            for made, found in ((pair.output, right), (changed, wrong)):
                found.append(sum(nats.get(name, 0.0) for name in own.broken(pair.input, made)))
    assert np.mean(np.array(right) > 2) < 0.2
    assert np.mean(np.array(wrong) > 2) > 0.7


def test_weights_name_invariants_and_are_positive():
    known = {name for name, _ in properties(Side(RING), Side(RING))}
    known |= {name for name, _ in properties(Side(RING), Side(grid("0")))}
    known |= Invariants((Pair(RING, RING),)).names
    assert set(weights()) <= known
    assert all(nats > 0 for nats in weights().values())


CELLS = {
    "no new colour": (RING, lambda g: g.__setitem__((3, 0), 7), [[3, 0]]),
    "the edge stays": (RING, lambda g: g.__setitem__((0, 4), 6), [[0, 4]]),
    "what is filled stays": (RING, lambda g: g.__setitem__((4, 4), 0), [[4, 4]]),
    "the place": (RING, lambda g: g.__setitem__((1, 1), 0), [[1, 1]]),
}


@pytest.mark.parametrize("name", CELLS)
def test_the_cells_that_break_an_invariant_are_named(name):
    given, spoil, cells = CELLS[name]
    right = given.copy()
    right[1, 1] = 6  # what is enclosed is filled
    wrong = right.copy()
    spoil(wrong)
    task = Task("t", (Pair(given, right),) * 2, (Pair(given),))
    assert name in dict(broken(task, given, wrong))
    assert np.argwhere(broken_cells(task, given, wrong)[name]).tolist() == cells
    assert broken_cells(task, given, right) == {}


def test_cells_are_those_of_broken_invariants_only():
    for task in load_tasks("training")[:30]:
        given = task.test[0].input
        for pair in task.demonstrations:
            names = {name for name, _ in broken(task, given, pair.output)}
            cells = broken_cells(task, given, pair.output)
            assert set(cells) <= names
            assert all(own.shape == pair.output.shape and own.any() for own in cells.values())
