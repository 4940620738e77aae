"""Reads a grid out of what a model wrote: JSON, spaced, unspaced or comma-separated digits.

The last well-formed grid wins, because models think first and answer last; grids that stand under
a line saying "Input" are not answers. A block of rows is taken whole or not at all: a ragged block,
one cut off in the middle of a row, or one with a cell that is no digit gives nothing, and none of
its parts does. An answer without a grid is None, which equals no grid, not even an empty one.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from arctrm.data.parse import parse_grid
from arctrm.data.task import Grid
from arctrm.errors import TaskError

WORDS = "input|output|answer|prediction|solution|result"
LABEL = re.compile(
    r"\W*(?:(?:test|expected|predicted|final|the|example|demonstration|pair|\d+)\W+)*"
    rf"({WORDS})(?:\s+grid)?(?:\s*\#?\d+)?\W*",
    re.IGNORECASE,
)
"""A line that only says what comes next."""
PREFIX = re.compile(rf"\W*({WORDS}|row\s*\d+|line\s*\d+)\W*[:=]\s*(?=[\d\[])", re.IGNORECASE)
"""What may stand before the cells on a line of its own."""
LAST_WORD = re.compile(rf"\b({WORDS})\W*$", re.IGNORECASE)
TABLE_RULE = re.compile(r"[|:+\s-]*\|[|:+\s-]*")
"""The line under the head of a Markdown table."""
BETWEEN = re.compile(r"[\s,|;]+")
FENCE = "```"


def parse_grid_text(text: str) -> Grid | None:
    """The answer in a model's text, uint8 [1..30, 1..30]; None when there is no grid in it."""
    spans = list(_json_grids(text))
    rest = text
    for begin, end, _ in spans:  # what was read as JSON is not read again as lines
        rest = rest[:begin] + _blank(rest[begin:end]) + rest[end:]
    found = [(begin, grid) for begin, _, grid in spans if grid is not None]
    found += list(_line_grids(rest))
    answers = [(begin, grid) for begin, grid in found if not _is_input(text, begin)]
    return max(answers, key=lambda item: item[0])[1] if answers else None


def _blank(text: str) -> str:
    """The same number of characters, with no row in them."""
    return "?" * len(text)


def _json_grids(text: str) -> Iterator[tuple[int, int, Grid | None]]:
    """(begin, end, grid) of every list of lists; None where it is no grid, so that no part is."""
    decoder = json.JSONDecoder()
    begin = text.find("[")
    while begin >= 0:
        after = begin + 1
        try:
            value, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            value, end = None, begin
        if _is_rows(value):
            yield begin, end, _checked(value)
            after = end
        begin = text.find("[", after)


def _is_rows(value: Any) -> bool:
    """A list of lists that are not themselves lists of lists (those are lists of grids)."""
    return (
        isinstance(value, list)
        and any(isinstance(row, list) for row in value)
        and not any(
            isinstance(cell, list) for row in value if isinstance(row, list) for cell in row
        )
    )


def _line_grids(text: str) -> Iterator[tuple[int, Grid]]:
    """(begin, grid) of every block of lines that read as rows of one grid."""
    block: list[list[int] | None] = []
    first = begin = 0
    for line in [*text.splitlines(keepends=True), ""]:
        if TABLE_RULE.fullmatch(line) is None:
            row, is_row = _row(line)
            if is_row:
                first = first if block else begin
                block.append(row)
            elif block:
                grid = None if None in block else _checked(block)
                if grid is not None:
                    yield first, grid
                block = []
        begin += len(line)


def _row(line: str) -> tuple[list[int] | None, bool]:
    """(cells, whether the line stands for a row); the cells are None when they are no digits."""
    body = PREFIX.sub("", line, count=1).strip().removesuffix(",").strip("|\"' \t")
    bracketed = body.startswith("[") and body.endswith("]")
    cells = BETWEEN.split(body[1:-1].strip() if bracketed else body)
    if len(cells) == 1 and len(body) > 1 and body.isascii() and body.isdigit():
        return [int(digit) for digit in body], True
    if all(re.fullmatch(r"[0-9]", cell) for cell in cells):
        return [int(cell) for cell in cells], True
    return None, _looks_like_cells(cells)


def _looks_like_cells(cells: list[str]) -> bool:
    """A row with something wrong in it, rather than prose.

    Brackets that stand alone are the remains of JSON that does not close.
    """
    if len(cells) == 1 and len(cells[0]) > 1:
        word = cells[0].strip("[]\"'")
        return not word or (any(c.isdigit() for c in word) and word.isalnum())
    bare = [cell.strip("[]\"'") for cell in cells]
    short = all(len(cell) <= 1 or re.fullmatch(r"[-+]?\d+(\.\d+)?", cell) for cell in bare)
    return short and any(cell in ("[", "]") or bare[i] for i, cell in enumerate(cells))


def _checked(rows: Any) -> Grid | None:
    try:
        return parse_grid(rows, "answer")
    except TaskError:
        return None


def _is_input(text: str, begin: int) -> bool:
    """Whether the last thing said before this grid is that it is an input."""
    on_this_line = PREFIX.match(text[begin:].partition("\n")[0])
    if on_this_line is not None:
        return on_this_line[1].lower() == "input"
    *before, partial = text[:begin].split("\n")
    if partial.strip():
        last_word = LAST_WORD.search(partial)
        return last_word is not None and last_word[1].lower() == "input"
    for line in reversed(before):
        if line.strip() and not line.strip().startswith(FENCE):
            label = LABEL.fullmatch(line)
            return label is not None and label[1].lower() == "input"
    return False
