"""The rendering of a solved task and of the planner's attempts, read as the text a user sees."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from arctrm.data.task import Grid, Pair, Task
from arctrm.invariants.task import COPY, weights
from arctrm.planner import Attempt, PlannerResult, Verdict
from arctrm.solve.rank import Ranked
from arctrm.solve.report import attempts_table, solution_report
from arctrm.solve.solution import Answer, Solution


def full(colour: int, height: int, width: int) -> Grid:
    return np.full((height, width), colour, dtype=np.uint8)


def printed(content, width: int = 80) -> str:
    console = Console(width=width, file=StringIO(), color_system=None, legacy_windows=False)
    console.print(content)
    return console.file.getvalue()


def shown(solution: Solution, correct=None, width: int = 80) -> str:
    return printed(solution_report(solution, correct), width)


def solved(height: int, width: int, num_test: int = 1) -> Solution:
    demonstrations = (Pair(full(1, height, width), full(2, height, width)),) * 3
    test = tuple(Pair(full(3, height, width), full(8, height, width)) for _ in range(num_test))
    ranked = (
        Ranked(full(4, height, width), 12, 3.214, {"reader": 9, "joint": 3}, reader_scores=(-1.5,)),
        Ranked(full(5, height, width), 1, -0.5, {"trm": 1}, inverse_scores=(-7.0, -8.0)),
    )
    answers = (Answer(test[0].input, ranked, 64),) * num_test
    return Solution(Task("0a1b2c3d", demonstrations, test), answers, 2 / 3, 40, 12.34)


def with_ranked(solution: Solution, *ranked: Ranked) -> Solution:
    return replace(solution, answers=(replace(solution.answers[0], ranked=ranked),))


def test_the_report_shows_the_evidence_for_each_attempt():
    text = shown(solved(3, 3), width=100)
    for part in (
        *("0a1b2c3d", "demonstration 3", "votes: 12 of 13 (reader 9, joint 3)"),
        *(
            "votes: 1 of 13 (trm 1)",
            "confidence: 3.21",
            "confidence: -0.50",
            "log p of the grid: -1.50",
        ),
        *("log p of the input: -7.50", "leave-one-out score: 0.67"),
        "40 adaptation steps, 12.3 s",
    ):
        assert part in text
    known = shown(replace(solved(3, 3), known=True, adaptation_steps=0))
    assert "known to the model, 0 adaptation steps" in known


@pytest.mark.parametrize("side", [1, 3, 10, 16, 17, 30])
def test_both_attempts_stand_side_by_side_on_80_columns_whole(side):
    text = shown(solved(side, side))
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= 80
    (heads,) = (line for line in lines if "attempt_" in line)
    assert "attempt_1" in heads
    assert "attempt_2" in heads
    cells = "".join(line for line in lines if set(line) <= set(" 12345→"))
    assert (cells.count("4"), cells.count("5")) == (side * side, side * side)


def test_right_and_wrong_are_shown_only_when_told():
    solution = solved(3, 3)
    for untold in (None, [(None, None)]):
        text = shown(solution, untold)
        assert "right" not in text
        assert "wrong" not in text
    lines = shown(solution, [(False, True)]).splitlines()
    (verdicts,) = (line for line in lines if "wrong" in line)
    assert verdicts.split() == ["wrong", "right"]


def test_the_report_never_shows_a_test_output():
    solution, verdicts = solved(2, 2, num_test=2), [(True, False), (False, False)]
    text = shown(solution, verdicts)
    assert "8 8" not in text
    assert text == shown(replace(solution, task=solution.task.without_answers()), verdicts)


def test_without_a_candidate_the_input_is_submitted_and_said_to_have_no_evidence():
    solution = solved(3, 3)
    alone, [ranked] = with_ranked(solution), solution.candidates
    test_input = solution.task.test[0].input.tolist()
    assert [grid.tolist() for grid in alone.attempts[0]] == [test_input] * 2
    assert shown(alone).count("no grid in 64 answers") == 2
    assert with_ranked(solution, ranked[0]).evidence == [(ranked[0], ranked[0])]


def test_what_an_attempt_breaks_is_named_the_heaviest_first_on_80_columns():
    solution = solved(3, 3)
    first, second = solution.candidates[0]
    known = sorted(weights(), key=lambda name: len(name))[-5:]
    first = replace(first, broken=(COPY, *known, "of no weight"))
    text = shown(with_ranked(solution, first, replace(second, broken=("of no weight",))))
    assert text.count("unlike all demonstrations in:") == 1
    assert all(name in text for name in (COPY, *known[:2]))
    assert not any(name in text for name in (*known[2:], "of no weight"))
    assert "and 3 more" in text


# -- the planner's attempts


def attempts(*rows, width=100, **options):
    found = [
        Attempt(number, text, tokens, Verdict(success, score, feedback), torch.zeros(1))
        for number, (text, tokens, success, score, feedback) in enumerate(rows, 1)
    ]
    return printed(attempts_table(PlannerResult(tuple(found)), "attempts", **options), width)


def test_every_attempt_is_shown_and_the_kept_one_marked():
    text = attempts(
        ("mirror it", 1200, False, 0.75, "demonstration 2: no grid, should be 3x3"),
        ("turn it", None, False, 0.5, "worse"),
    )
    for part in ("mirror it", "1,200", "0.75", "no grid", "turn it", "0.50", "worse", " - "):
        assert part in text
    assert "1 *" in text
    assert "2 *" not in text
    assert "attempt 1 of 2, not every held-out demonstration right" in text
    assert "attempt 1 of 1, every held-out" in attempts(("a", 1, True, 1.0, ""))


def test_markup_and_escape_sequences_of_a_model_are_only_text():
    text = attempts(("[bold]no[/] [/x]\x1b[31mred\x07", 1, False, 0.0, "[/y]\x1b[0m"))
    assert "[bold]no[/]" in text
    assert "[/y]" in text
    assert "\x1b" not in text
    assert "\x07" not in text
