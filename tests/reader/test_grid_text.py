"""Grids out of free text: every usual way of writing one, and nothing where there is none."""

import numpy as np
import pytest

from arctrm.reader.grid_text import parse_grid_text
from arctrm.reader.prompts import grid_text

GRID = [[0, 1, 2], [3, 4, 5]]

WAYS = {
    "spaced": "0 1 2\n3 4 5",
    "unspaced": "012\n345",
    "comma separated": "0, 1, 2\n3, 4, 5",
    "comma without space": "0,1,2\n3,4,5",
    "tabs": "0\t1\t2\n3\t4\t5",
    "JSON": "[[0, 1, 2], [3, 4, 5]]",
    "JSON over lines": "[\n  [0, 1, 2],\n  [3, 4, 5]\n]",
    "JSON over many lines": "[\n [\n 0,\n 1,\n 2\n ],\n [\n 3,\n 4,\n 5\n ]\n]",
    "rows as JSON": "[0, 1, 2]\n[3, 4, 5]",
    "rows as JSON with commas": "[0, 1, 2],\n[3, 4, 5],",
    "rows as bracketed digits with spaces": "[0 1 2]\n[3 4 5]",
    "numpy": "np.array([[0, 1, 2], [3, 4, 5]])",
    "object": '{"output": [[0, 1, 2], [3, 4, 5]]}',
    "list of grids": "[[[0, 1, 2], [3, 4, 5]]]",
    "fence": "```\n0 1 2\n3 4 5\n```",
    "fence with language": "```text\n012\n345\n```",
    "fence with JSON": "```json\n[[0,1,2],[3,4,5]]\n```",
    "text around": "Let me think. The shape is 2x3.\n\n0 1 2\n3 4 5\n\nThat is my answer.",
    "label": "Output:\n0 1 2\n3 4 5",
    "label on the first line": "Output: 0 1 2\n3 4 5",
    "label in bold": "**Output grid:**\n\n0 1 2\n3 4 5",
    "numbered rows": "Row 1: 0 1 2\nRow 2: 3 4 5",
    "indented": "    0 1 2\n    3 4 5   ",
    "carriage returns": "0 1 2\r\n3 4 5\r\n",
    "table": "| 0 | 1 | 2 |\n|---|---|---|\n| 3 | 4 | 5 |",
    "quoted rows": '"012",\n"345"',
    "echo of the input first": "Input:\n7 7\n7 7\n\nOutput:\n0 1 2\n3 4 5",
    "echo of the input last": "Answer:\n0 1 2\n3 4 5\n\nTest input:\n7 7\n7 7",
    "echo of the input in JSON": '{"output": [[0,1,2],[3,4,5]], "input": [[7,7],[7,7]]}',
    "fenced echo of the input": "Output:\n```\n012\n345\n```\nInput:\n```\n77\n```",
    "two tries, the last counts": "First 7 7:\n7 7\n7 7\n\nNo, better:\n0 1 2\n3 4 5",
    "JSON, then rows": "[[7, 7]]\nSo:\n012\n345",
    "rows, then JSON": "77\n77\nSo: [[0, 1, 2], [3, 4, 5]]",
    "thoughts": "<think>maybe [[1]]?</think>\n0 1 2\n3 4 5",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_grid_is_read_in_every_usual_way_of_writing_it(way):
    grid = parse_grid_text(WAYS[way])
    assert grid is not None
    assert grid.dtype == np.uint8
    assert grid.tolist() == GRID


NONE = {
    "nothing": "",
    "blank": " \n\n ",
    "prose": "I do not know the answer to this one.",
    "prose with numbers": "There are 3 colours and 12 cells in a 3x4 grid.",
    "ragged": "0 1 2\n3 4",
    "ragged unspaced": "012\n34",
    "ragged JSON": "[[0, 1, 2], [3, 4]]",
    "ragged JSON over lines": "[\n [0, 1, 2],\n [3, 4]\n]",
    "cut off in a row": "0 1 2\n3 4 5\n6",
    "JSON cut off": "[[0, 1, 2], [3, 4, 5",
    "JSON over lines cut off": "[\n  [0, 1, 2],\n  [3, 4, 5],\n  [6",
    "JSON over lines cut off between rows": "[\n  [0, 1, 2],\n  [3, 4, 5],",
    "empty JSON": "[]",
    "empty rows": "[[], []]",
    "one empty row": "[[]]",
    "colour 10": "0 1 10\n2 3 4",
    "colour 10 in JSON": "[[0, 1, 10], [2, 3, 4]]",
    "negative": "0 -1\n2 3",
    "letters": "0 a 2\n3 4 5",
    "a letter in unspaced digits": "012\n3x5\n678",
    "a word in the middle": "0 1\n? 2\n3 4",
    "floats": "[[0.0, 1.0], [2.0, 3.0]]",
    "booleans": "[[true, false]]",
    "null": "[[null, 1]]",
    "31 rows": "\n".join(["0 1"] * 31),
    "31 columns": "0" * 31 + "\n" + "1" * 31,
    "31 rows in JSON": str([[0]] * 31),
    "only an echo of the input": "Input:\n0 1 2\n3 4 5",
    "nesting": "[" * 5000,
    "flat list": "The colours are [1, 2, 3].",
}


@pytest.mark.parametrize("case", NONE)
def test_what_is_no_grid_is_none(case):
    assert parse_grid_text(NONE[case]) is None


def test_no_part_of_a_malformed_block_is_taken_for_the_grid():
    assert parse_grid_text("1 2\n3 4\n\n5 6\n7") is not None  # the block before it is a grid
    assert parse_grid_text("1 2\n3 4\n5 6\n7") is None


def test_what_grid_text_writes_is_read_back_at_every_size():
    rng = np.random.default_rng(0)
    for _ in range(100):
        grid = rng.integers(0, 10, rng.integers(1, 31, 2)).astype(np.uint8)
        for between in ("", " ", ",", ", "):
            assert np.array_equal(parse_grid_text(grid_text(grid, between)), grid)
        assert np.array_equal(parse_grid_text(str(grid.tolist())), grid)
