"""Where each token of a pair stands, and what it is."""

import numpy as np
import pytest
import torch

from arctrm.config import PAIR_TOKENS
from arctrm.data.task import Pair
from arctrm.model import layout
from arctrm.model.layout import (
    CHOICES,
    END,
    HIDDEN,
    OUTPUT_PART,
    ROW_END,
    SEPARATOR,
    SIDE,
    START,
    VOCABULARY,
    Condition,
)
from helpers import random_grid

PAIR = Pair(np.array([[1, 2], [3, 4]], np.uint8), np.array([[5]], np.uint8))


def unpacked(positions):
    return positions // SIDE**2, positions // SIDE % SIDE, positions % SIDE


def test_a_pair_is_start_input_separator_output_end_with_row_ends():
    tokens, positions = layout.pair_tokens(PAIR, 1)
    expected = [START, 1, 2, ROW_END, 3, 4, ROW_END, SEPARATOR, 5, ROW_END, END]
    assert tokens.tolist() == expected
    assert tokens.dtype == positions.dtype == np.int64
    assert len(tokens) == layout.pair_length(PAIR)
    parts, y, x = unpacked(positions)
    assert parts.tolist() == [4, 5, 5, 5, 5, 5, 5, 6, 7, 7, 7]
    assert y.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert x.tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 0, 1, 0]
    assert layout.part_of(torch.from_numpy(positions)).tolist() == [0, *[1] * 6, 2, 3, 3, 3]


def test_a_prompt_is_the_pair_up_to_the_separator_and_says_where_the_output_begins():
    condition = Condition(3, 1, 1, 0, 2)
    asked = layout.prompt(PAIR.input, condition)
    whole, places = layout.pair_tokens(PAIR)
    assert asked.tokens.tolist() == whole[: len(asked.tokens)].tolist()
    assert asked.tokens[-1] == SEPARATOR
    assert asked.output_start == places[len(asked.tokens)] == layout.pack_position(OUTPUT_PART)
    assert asked.condition == condition
    after = layout.prompt(PAIR.input, condition, [PAIR, PAIR])
    assert after.tokens.tolist() == [*whole, *whole, *asked.tokens]
    assert after.output_start == layout.pack_position(2 * 4 + OUTPUT_PART)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (30, 30), (3, 7)])
def test_a_prompt_and_an_answer_are_the_pair_at_every_size(shape):
    rng = np.random.default_rng(0)
    pair = Pair(random_grid(rng, *shape[::-1]), random_grid(rng, *shape))
    asked = layout.prompt(pair.input)
    own, places = layout.output_tokens(shape, pair.output)
    tokens, positions = layout.pair_tokens(pair)
    assert np.array_equal(tokens, np.append(asked.tokens, own))
    assert np.array_equal(positions, np.append(asked.positions, places))
    assert len(set(positions.tolist())) == len(positions) <= PAIR_TOKENS
    assert (tokens < VOCABULARY).all()


def test_an_answer_without_a_grid_has_hidden_cells():
    tokens, positions = layout.output_tokens((2, 3), None)
    assert tokens.tolist() == [*[HIDDEN] * 3, ROW_END, *[HIDDEN] * 3, ROW_END, END]
    shown = layout.output_tokens((2, 3), np.zeros((2, 3), np.uint8))
    assert np.array_equal(positions, shown[1])


def test_choices_are_the_colours_the_row_end_and_the_end():
    assert list(CHOICES) == [*range(10), ROW_END, END]
