"""How the tiny reader sees pairs: 16 tokens, one per cell, and where each token stands.

    START, input cells, SEPARATOR, output cells, END; in both grids ROW_END comes after every row

The position of a token is (part, row, column) packed into one number, so that it passes through
every interface that knows one position per token; `reader.tiny` unpacks it into three rotary axes.
Pair i of a sequence has the parts 4i (start), 4i + 1 (input), 4i + 2 (separator), 4i + 3 (output).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import NUM_COLOURS, Grid, Pair
from arctrm.reader.interface import GridTokens, Prompt

ROW_END = NUM_COLOURS
START, SEPARATOR, END, PAD, PREFIX = range(NUM_COLOURS + 1, NUM_COLOURS + 6)
VOCABULARY = 16
GRID_TOKENS = GridTokens(tuple(range(NUM_COLOURS)), ROW_END, END)

START_PART, INPUT_PART, SEPARATOR_PART, OUTPUT_PART = range(4)
PARTS_PER_PAIR = 4
SIDE = 32
"""Room for rows and columns 0..30 in a packed position."""

INVERSE = 2
"""Added to the colour flag of a condition that asks for the input of an output."""

FIRST_MARK = VOCABULARY
"""Codes of the tokens of a hub reader's marks begin here; below it a code is a token."""


class Marks(NamedTuple):
    """Codes of the tokens around the grids of a pair."""

    start: tuple[int, ...] = ()
    """Before the first pair of a sequence."""
    before_input: tuple[int, ...] = (START,)
    before_output: tuple[int, ...] = (SEPARATOR,)

    def length(self, tokens: int, pairs: int) -> int:
        """Tokens of a sequence of `pairs` pairs that has `tokens` with the tiny reader's marks."""
        added = len(self.before_input) + len(self.before_output) - 2
        return tokens + pairs * added + len(self.start)


def pack_position(part: int, y: int = 0, x: int = 0) -> int:
    """One number for (part, row, column)."""
    return (part * SIDE + y) * SIDE + x


def part_of(positions: Tensor) -> Tensor:
    """START_PART to OUTPUT_PART: the part of its pair that each packed position is in."""
    return torch.div(positions, SIDE**2, rounding_mode="floor") % PARTS_PER_PAIR


def prompt_of(positions: Tensor) -> Tensor:
    """Number of the pair whose prompt the token at each packed position belongs to, -1: none.

    The prompt of a pair is its start, its input and its separator (soft prefixes that stand behind
    the separator are not of it).
    """
    part, place = part_of(positions), positions % SIDE**2
    inside = (part < SEPARATOR_PART) | ((part == SEPARATOR_PART) & (place == 0))
    return (positions // (SIDE**2 * PARTS_PER_PAIR) + 1) * inside - 1


def grid_length(height: int, width: int) -> int:
    """Tokens of a grid: its cells and one row end for each row."""
    return height * (width + 1)


def pair_length(pair: Pair) -> int:
    """Tokens of a pair: both grids, start, separator and end (an absent output counts nothing)."""
    output = 0 if pair.output is None else grid_length(*pair.output.shape)
    return 3 + grid_length(*pair.input.shape) + output


def grid_tokens(grid: Grid, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and packed positions, int64 [height x (width + 1)]."""
    height, width = grid.shape
    tokens = np.full((height, width + 1), ROW_END, dtype=np.int64)
    tokens[:, :width] = grid
    y, x = np.mgrid[:height, : width + 1]
    return tokens.ravel(), ((part * SIDE + y) * SIDE + x).ravel()


def pair_tokens(pair: Pair, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of pair number `index`; without an output, up to the separator."""
    first = index * PARTS_PER_PAIR
    cells, places = grid_tokens(pair.input, first + INPUT_PART)
    tokens = [_one(START), cells, _one(SEPARATOR)]
    mark = pack_position(first + SEPARATOR_PART)
    positions = [_one(pack_position(first)), places, _one(mark)]
    if pair.output is not None:
        part = first + OUTPUT_PART
        cells, places = grid_tokens(pair.output, part)
        tokens += [cells, _one(END)]
        positions += [places, _one(pack_position(part, pair.output.shape[0]))]
    return np.concatenate(tokens), np.concatenate(positions)


def prompt(
    pairs: Sequence[Pair], query: Grid, condition: tuple[int, int, int] = (0, 0, 0)
) -> Prompt:
    """The prompt that asks for the output of `query` after complete `pairs` (none: pair form)."""
    parts = [pair_tokens(pair, index) for index, pair in enumerate((*pairs, Pair(query)))]
    tokens, positions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    start = pack_position(len(pairs) * PARTS_PER_PAIR + OUTPUT_PART)
    return Prompt(tokens, positions, start, condition)


def _one(value: int) -> np.ndarray:
    return np.array([value], dtype=np.int64)
