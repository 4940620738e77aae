"""The rendering of a solved task, read as the text a user sees."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from arctrm.data.task import Grid, Pair, Task
from arctrm.invariants.shared import weights
from arctrm.solving.report import Solution, solution_report
from arctrm.solving.vote import Evidence


def full(colour: int, height: int, width: int) -> Grid:
    return np.full((height, width), colour, dtype=np.uint8)


def shown(task: Task, solutions: list[Solution], correct=None, width: int = 80) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(solution_report(task, solutions, correct))
    return console.file.getvalue()


def solved(height: int, width: int, num_test: int = 1) -> tuple[Task, list[Solution]]:
    demonstrations = (Pair(full(1, height, width), full(2, height, width)),) * 3
    test = tuple(Pair(full(3, height, width), full(8, height, width)) for _ in range(num_test))
    evidence = (Evidence(12, 64, 3.214, 2 / 3), Evidence(1, 64, -0.5))
    solution = Solution((full(4, height, width), full(5, height, width)), evidence, 40, 12.34)
    return Task("0a1b2c3d", demonstrations, test), [solution] * num_test


def test_the_report_shows_the_evidence_for_each_attempt():
    text = shown(*solved(3, 3))
    lines = text.splitlines()
    (votes,) = (line for line in lines if "views" in line)
    assert votes.split() == ["12", "of", "64", "views", "1", "of", "64", "views"]
    for part in ("0a1b2c3d", "demonstration 3", "mean q 3.21", "mean q -0.50", "leave-one-out 67%"):
        assert part in text
    assert "40 adaptation steps, 12.3 s" in text


@pytest.mark.parametrize("side", [1, 3, 10, 16, 17, 30])
def test_both_attempts_stand_side_by_side_on_80_columns_whole(side):
    text = shown(*solved(side, side))
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= 80
    (heads,) = (line for line in lines if "attempt_" in line)
    assert "attempt_1" in heads
    assert "attempt_2" in heads
    cells = "".join(line for line in lines if set(line) <= set(" 12345→"))
    assert (cells.count("4"), cells.count("5")) == (side * side, side * side)


def test_small_attempts_stand_beside_their_test_input():
    heads = [line for line in shown(*solved(5, 5)).splitlines() if "attempt_1" in line]
    assert [line.split()[0] for line in heads] == ["test"]


def test_right_and_wrong_are_shown_only_when_told():
    task, solutions = solved(3, 3)
    silent = shown(task, solutions)
    assert "right" not in silent
    assert "wrong" not in silent
    (verdicts,) = (
        line for line in shown(task, solutions, [(False, True)]).splitlines() if "wrong" in line
    )
    assert verdicts.split() == ["wrong", "right"]
    unknown = shown(task, solutions, [(None, None)])
    assert "right" not in unknown
    assert "wrong" not in unknown


def test_the_report_never_shows_a_test_output():
    task, solutions = solved(2, 2, num_test=2)
    text = shown(task, solutions, [(True, False), (False, False)])
    assert "8 8" not in text
    assert text == shown(task.without_answers(), solutions, [(True, False), (False, False)])


def test_every_test_input_has_its_own_attempts():
    text = shown(*solved(3, 3, num_test=3))
    assert text.count("attempt_1") == text.count("attempt_2") == 3
    assert "test 3" in text


def test_an_attempt_without_votes_is_shown_as_such():
    task, (solution,) = solved(3, 3)
    unproposed = Solution(solution.attempts, (Evidence(0, 64, 0.0), Evidence(0, 64, 0.0)))
    text = shown(task, [unproposed])
    assert "0 of 64 views" in text
    assert "mean q" not in text


def test_what_an_attempt_breaks_is_named_the_heaviest_first_on_80_columns():
    task, (solution,) = solved(3, 3)
    known = sorted(weights(), key=lambda name: len(name))[-5:]
    first = replace(solution.evidence[0], broken=(*known, "of no weight"))
    second = replace(solution.evidence[1], broken=("of no weight",))
    text = shown(task, [replace(solution, evidence=(first, second))])
    assert text.count("unlike all demonstrations in:") == 1
    assert all(name in text for name in known[:3])
    assert not any(name in text for name in (*known[3:], "of no weight"))
    assert "and 2 more" in text
    both = replace(solution, evidence=(first, first))
    lines = shown(task, [both]).splitlines()
    assert sum(line.count(known[0]) == 2 for line in lines) == 1
