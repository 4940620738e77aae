"""The rendering of a solved task and of the planner's attempts, read as the text a user sees."""

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from arctrm.data.task import Grid, Pair, Task
from arctrm.invariants.task import COPY, broken
from arctrm.planner import Attempt, PlannerResult, Verdict
from arctrm.solve.rank import Ranked
from arctrm.solve.report import attempts_table, progress_bar, solution_json, solution_report
from arctrm.solve.solution import COUNTS, LIKELY, Answer, Event, Progress, Solution


def full(colour: int, height: int, width: int) -> Grid:
    return np.full((height, width), colour, dtype=np.uint8)


def printed(content, width: int = 80) -> str:
    console = Console(width=width, file=StringIO(), color_system=None, legacy_windows=False)
    console.print(content)
    return console.file.getvalue()


def shown(solution: Solution, correct=None, width: int = 80, **options) -> str:
    return printed(solution_report(solution, correct, **options), width)


def words(solution: Solution, **options) -> str:
    """What is shown, on one line."""
    return " ".join(shown(solution, **options).split())


def solved(height: int, width: int, num_test: int = 1) -> Solution:
    demonstrations = (Pair(full(1, height, width), full(2, height, width)),) * 3
    test = tuple(Pair(full(3, height, width), full(8, height, width)) for _ in range(num_test))
    first, second = {"reader": range(9), "joint": range(3)}, {"trm": (5,)}
    ranked = tuple(
        Ranked(full(colour, height, width), sum(votes.values()), q, votes, views, **scores)
        for colour, q, views, scores in (
            (4, 3.214, first, {"reader_scores": (-1.5,)}),
            (5, -0.5, second, {"inverse_scores": (-7.0, -8.0)}),
        )
        for votes in [{source: len(own) for source, own in views.items()}]
    )
    answers = (Answer(test[0].input, ranked, 64),) * num_test
    events = (Event("first answer", 0.0, 1.5), Event("adapting", 1.5, 9.0))
    task = Task("0a1b2c3d", demonstrations, test)
    return Solution(task, answers, 0.5, 40, 12.34, events=events)


def with_ranked(solution: Solution, *ranked: Ranked) -> Solution:
    return replace(solution, answers=(replace(solution.answers[0], ranked=ranked),))


def test_the_evidence_is_in_words_and_with_verbose_in_numbers_too():
    text = words(solved(3, 3))
    for part in (
        "0a1b2c3d test 3x3 attempt_1 3x3 attempt_2 3x3",
        "a guess: a held-out demonstration was answered wrong (10 of 23 such tasks were solved)",
        "attempt_1: 12 of 64 proposals; TRM and the reader agree; keeps everything that the",
        "attempt_2: 1 of 64 proposals; TRM alone; keeps everything that the",
        "adapted in 40 steps, 12.3 s",
    ):
        assert part in text
    numbers = (
        *("votes of 13 12 (reader 9, joint 3) 1 (trm 1)", "confidence 3.21 -0.50"),
        *("log p of the grid -1.50 -", "log p of the input - -7.50", "leave-one-out score 0.50"),
        *("first answer 1.5 s, adapting 9.0 s", "demonstration 3"),
    )
    assert not any(part in text for part in numbers)
    verbose = words(solved(3, 3), verbose=True)
    assert all(part in verbose for part in numbers)
    known = words(replace(solved(3, 3), known=True, adaptation_steps=0))
    assert "known to the model, 12.3 s" in known


def test_a_certainty_says_what_share_of_such_tasks_was_solved():
    solution = solved(3, 3)
    for score, reason in zip((1.0, 0.0, None), COUNTS, strict=True):
        [found] = replace(solution, leave_one_out=score).certainties
        right, whole = COUNTS[reason]
        assert found.counts == (right, whole)
        assert found.level == ("likely right" if right / whole >= LIKELY else "a guess")
        assert f"({right} of {whole} such tasks were solved)" in str(found)
    few = replace(solution, known=True)
    [many] = [replace(few, answers=(replace(few.answers[0], num_candidates=20),))]
    assert [one.certainties[0].level for one in (few, many)] == ["a guess", "likely right"]
    assert few.certainties[0].counts is None


@pytest.mark.parametrize("side", [1, 3, 10, 16, 17, 30])
def test_both_attempts_stand_side_by_side_on_80_columns_whole(side):
    text = shown(solved(side, side))
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= 80
    [_] = (line for line in lines if "attempt_1" in line and "attempt_2" in line)
    cells = "".join(line for line in lines if set(line) <= set(" 12345→"))
    assert (cells.count("4"), cells.count("5")) == (side * side, side * side)


def test_right_and_wrong_are_shown_only_when_told():
    solution = solved(3, 3)
    for untold in (None, [(None, None)]):
        text = shown(solution, untold)
        assert not {"right", "wrong"} & {line.strip() for line in text.splitlines()}
    lines = shown(solution, [(False, True)]).splitlines()
    assert ["wrong", "right"] in [line.split() for line in lines]


def test_the_report_never_shows_a_test_output():
    solution, verdicts = solved(2, 2, num_test=2), [(True, False), (False, False)]
    text = shown(solution, verdicts)
    assert "8 8" not in text
    assert text == shown(replace(solution, task=solution.task.without_answers()), verdicts)


def test_without_a_candidate_the_input_is_submitted_and_said_to_be():
    solution = solved(3, 3)
    alone, [ranked] = with_ranked(solution), solution.candidates
    test_input = solution.task.test[0].input.tolist()
    assert [grid.tolist() for grid in alone.attempts[0]] == [test_input] * 2
    assert "no answer found: the input is submitted" in words(alone)
    copied = with_ranked(solution, replace(ranked[0], broken=(COPY,)))
    assert "no answer found: the input is submitted" in words(copied, verbose=True)
    lone = with_ranked(solution, ranked[0])
    assert lone.evidence == [(ranked[0], ranked[0])]
    assert "attempt_2: the same; no other grid was proposed" in words(lone)


def test_what_an_attempt_breaks_is_named_the_heaviest_first():
    solution = solved(3, 3)
    names = [
        name
        for name, nats in broken(solution.task, solution.task.test[0].input, full(4, 3, 3))
        if nats
    ]
    assert len(names) > 3
    said = f"keep but: {', '.join(names[:3])}, and {len(names) - 3} more attempt_2"
    assert said in words(solution)
    right = replace(solution.candidates[0][0], grid=full(2, 3, 3))
    answer = replace(solution.answers[0], test_input=full(1, 3, 3), ranked=(right,))
    text = words(replace(solution, answers=(answer,)))
    assert "keeps everything that the demonstrations keep attempt_2: the same" in text


def test_the_line_for_scripts_holds_the_attempts_and_the_evidence():
    solution = solved(2, 2, num_test=2)
    found = json.loads(solution_json(solution, [(True, False), (None, None)]))
    assert (found["task"], found["adaptation_steps"], found["leave_one_out"]) == (
        "0a1b2c3d",
        40,
        0.5,
    )
    first, second = found["answers"]
    assert (first["attempt_1"], first["attempt_2"]) == ([[4, 4]] * 2, [[5, 5]] * 2)
    assert (first["right"], second["right"]) == ([True, False], [None, None])
    assert first["certainty"] == "a guess"
    assert first["evidence"][0]["votes"] == {"reader": 9, "joint": 3}
    assert "right" not in json.loads(solution_json(solution))["answers"][0]
    never = replace(solution.candidates[0][0], reader_scores=(-np.inf,))
    [evidence] = json.loads(solution_json(with_ranked(solution, never)))["answers"][0]["evidence"]
    assert evidence["reader_score"] is None


def test_without_a_terminal_progress_is_a_line_for_each_stage(capsys):
    with progress_bar(60.04) as tell:
        for stage, seconds in (("first answer", 0.0), ("reading", 2.5), ("reading", 4.0)):
            tell(Progress(stage, "view 1 of 2", seconds, 60.0, [full(3, 2, 2)]))
    assert capsys.readouterr().err == "0.0 of 60 s: first answer\n2.5 of 60 s: reading\n"


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
