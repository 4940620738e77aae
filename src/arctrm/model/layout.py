"""How the trunk sees a pair: one token for each cell, and where each token stands.

    START, input cells, SEPARATOR, output cells, END; in both grids ROW_END comes after every row

The position of a token is (part, row, column) packed into one number; the trunk unpacks it into
three rotary axes. Pair i of a sequence has the parts 4i (start), 4i + 1 (input), 4i + 2 (separator)
and 4i + 3 (output). The trunk itself knows sequences of one pair; hub models may read several.

Legend: T tokens, n tokens of one grid or prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import NUM_COLOURS, Grid, Pair

ROW_END = NUM_COLOURS
START, SEPARATOR, END, PAD, PREFIX = range(NUM_COLOURS + 1, NUM_COLOURS + 6)
HIDDEN = PAD  # Shown in the TRM voice where the colour of an answer cell is hidden
VOCABULARY = 16
CHOICES = (*range(NUM_COLOURS), ROW_END, END)  # Token of each of the 12 choices that spell a grid

CHOICE_OF = np.full(VOCABULARY, -100)  # choice that each token is; -100: none, and no loss
CHOICE_OF[list(CHOICES)] = np.arange(len(CHOICES))

START_PART, INPUT_PART, SEPARATOR_PART, OUTPUT_PART = range(4)
PARTS_PER_PAIR = 4
SIDE = 32  # Room for rows and columns 0..30 in a packed position


class Condition(NamedTuple):
    """What a sequence is told beside its tokens; the columns of the trunk's condition rows."""

    task: int = 0  # Row of the task embedding
    dihedral: int = 0  # Row of `data.views.DIHEDRALS`
    keeps_colours: int = 0  # 1 where the view keeps every colour
    inverse: int = 0  # 1 where an output is given and its input is asked for
    scale: int = 0  # Way in which the grids are shown larger, from 1; 0: as they are


PLAIN = Condition()
NUM_CONDITIONS = len(Condition._fields)
TASK, DIHEDRAL, KEEPS_COLOURS, INVERSE, SCALE = range(NUM_CONDITIONS)


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens that come before an output grid."""

    tokens: np.ndarray  # int64 [n]; ids of the reader
    positions: np.ndarray  # int64 [n]: position numbers as the reader counts them
    output_start: int  # Position number of the first output token
    condition: Condition = PLAIN


def pack_position(part: int, y: int = 0, x: int = 0) -> int:
    """One number for (part, row, column)."""
    return (part * SIDE + y) * SIDE + x


def part_of(positions: Tensor) -> Tensor:
    """START_PART to OUTPUT_PART: the part of its pair that each packed position is in."""
    return torch.div(positions, SIDE**2, rounding_mode="floor") % PARTS_PER_PAIR


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


def output_tokens(shape: tuple[int, int], grid: Grid | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of an answer of `shape`, END included; HIDDEN cells where no grid is."""
    blank = np.full(shape, HIDDEN, dtype=np.int64) if grid is None else grid
    tokens, positions = grid_tokens(blank, OUTPUT_PART)
    return np.append(tokens, END), np.append(positions, pack_position(OUTPUT_PART, shape[0]))


def pair_tokens(pair: Pair, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of pair number `index`; without an output, up to the separator."""
    first = index * PARTS_PER_PAIR
    cells, places = grid_tokens(pair.input, first + INPUT_PART)
    tokens = [np.array([START]), cells, np.array([SEPARATOR])]
    marks = (pack_position(first + part) for part in (START_PART, SEPARATOR_PART))
    positions = [np.array([next(marks)]), places, np.array([next(marks)])]
    if pair.output is not None:
        part = first + OUTPUT_PART
        cells, places = grid_tokens(pair.output, part)
        tokens += [cells, np.array([END])]
        positions += [places, np.array([pack_position(part, pair.output.shape[0])])]
    return np.concatenate(tokens), np.concatenate(positions)


def prompt(query: Grid, condition: Condition = PLAIN, pairs: Sequence[Pair] = ()) -> Prompt:
    """The prompt that asks for the output of `query`, after complete `pairs` (hub models only)."""
    parts = [pair_tokens(pair, index) for index, pair in enumerate((*pairs, Pair(query)))]
    tokens, positions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    start = pack_position(len(pairs) * PARTS_PER_PAIR + OUTPUT_PART)
    return Prompt(tokens, positions, start, condition)


def groups(
    rows: Sequence[int] | np.ndarray,
    places: Sequence[int] | np.ndarray,
    most_rows: int,
    most_places: int,
) -> Iterator[slice]:
    """Consecutive items within two bounds on the sum of their rows and places; one at least."""
    begin, num_rows, num_places = 0, 0, 0
    for index, (more, further) in enumerate(zip(rows, places, strict=True)):
        too_many = num_rows + more > most_rows or num_places + further > most_places
        if index > begin and too_many:
            yield slice(begin, index)
            begin, num_rows, num_places = index, 0, 0
        num_rows, num_places = num_rows + int(more), num_places + int(further)
    if begin < len(rows):
        yield slice(begin, len(rows))
