"""The attempts of a planner in the terminal, for `solve --trace`."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from arctrm.planner.planner import Attempt, PlannerResult

MAX_TEXT = 160
"""Characters of an attempt's text that are shown."""


def attempts_table(
    result: PlannerResult, title: str = "attempts", max_text: int = MAX_TEXT
) -> Table:
    """One row per attempt: score, new tokens, text (shortened), feedback; the kept one is green."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", show_lines=True)
    for column in ("attempt", "score", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("text", "feedback"):
        table.add_column(column, overflow="fold")
    for attempt in result.reasoning_history:
        kept = attempt is result.best
        table.add_row(*_cells(attempt, kept, max_text), style="green" if kept else None)
    table.caption = Text(_summary(result))
    table.caption_justify = "left"
    return table


def shortened(text: str, max_length: int) -> str:
    """One line of at most `max_length` characters, without anything a terminal would act on."""
    line = " ".join(_printable(text).split())
    return line if len(line) <= max_length else line[: max(0, max_length - 1)] + "…"


def _cells(attempt: Attempt, kept: bool, max_text: int) -> Sequence[Text]:
    tokens = "-" if attempt.new_tokens is None else f"{attempt.new_tokens:,}"
    return [
        Text(f"{attempt.number}{' *' if kept else ''}"),
        Text(f"{attempt.score:.2f}"),
        Text(tokens),
        Text(shortened(attempt.text, max_text)),
        Text("\n".join(_printable(line) for line in attempt.feedback.splitlines())),
    ]


def _summary(result: PlannerResult) -> str:
    outcome = (
        "every held-out demonstration right"
        if result.success
        else "not every held-out demonstration right"
    )
    return f"* kept: attempt {result.best.number} of {result.total_attempts}, {outcome}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
