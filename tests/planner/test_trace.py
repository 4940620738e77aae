"""The attempts in the terminal: all of them, shortened, and nothing a terminal would act on."""

import io

import torch
from rich.console import Console

from arctrm.planner import Attempt, PlannerResult, Verdict
from arctrm.planner.trace import attempts_table, shortened


def result(*rows):
    attempts = [
        Attempt(number, text, tokens, Verdict(success, score, feedback), torch.zeros(1))
        for number, (text, tokens, success, score, feedback) in enumerate(rows, 1)
    ]
    return PlannerResult(tuple(attempts))


def printed(*rows, width=100, **options):
    console = Console(file=io.StringIO(), width=width, legacy_windows=False)
    console.print(attempts_table(result(*rows), **options))
    return console.file.getvalue()


def test_every_attempt_is_shown_and_the_kept_one_marked():
    shown = printed(
        ("mirror it", 1200, False, 0.75, "demonstration 2: no grid, should be 3x3"),
        ("turn it", None, False, 0.5, "worse"),
    )
    for part in ("mirror it", "1,200", "0.75", "no grid", "turn it", "0.50", "worse", " - "):
        assert part in shown
    assert "1 *" in shown
    assert "2 *" not in shown
    assert "attempt 1 of 2, not every held-out demonstration right" in shown


def test_success_is_said():
    assert "attempt 1 of 1, every held-out" in printed(("a", 1, True, 1.0, ""))


def test_long_text_is_shortened_and_lines_are_joined():
    assert shortened("one\n\n two\tthree", 20) == "one two three"
    assert shortened("x" * 500, 10) == "x" * 9 + "…"
    assert "x" * 41 not in printed(("x" * 500, 9, False, 0.0, ""), width=300, max_text=40)


def test_markup_and_escape_sequences_of_a_model_are_only_text():
    shown = printed(("[bold]no[/] [/x]\x1b[31mred\x07", 1, False, 0.0, "[/y]\x1b[0m"))
    assert "[bold]no[/]" in shown
    assert "[/y]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_a_narrow_terminal_cuts_nothing_off():
    shown = printed(("word " * 20, 7, False, 0.1, "demonstration 1: no grid"), width=60)
    assert shown.count("word") == 20
