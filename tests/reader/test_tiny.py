"""The tiny reader says of itself what callers ask, and reads a task by its condition."""

import sys

import numpy as np
import pytest
import torch
from plain_reader import LOOPED, new_prompts, new_trunk

from arctrm.data.task import Pair
from arctrm.model.layout import SEPARATOR, Condition, Prompt
from arctrm.reader.decoding import decode
from arctrm.reader.scoring import score
from arctrm.reader.store import PackedStore, RowStore
from arctrm.reader.tiny import TinyReader

QUERY = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)


def test_it_says_what_callers_ask():
    trunk = new_trunk(dtype=torch.bfloat16)
    reader = TinyReader(trunk)
    assert (reader.device.type, reader.dtype, reader.width) == ("cpu", torch.bfloat16, 64)
    assert (reader.follows_drafts, reader.batch_rows, reader.asks_inverse) == (True, 16, False)
    assert reader.capacity == sys.maxsize
    packed = TinyReader(trunk, asks_inverse=True, packed=True)
    assert (packed.follows_drafts, packed.batch_rows, packed.asks_inverse) == (False, 4096, True)


def test_a_prompt_is_the_input_up_to_the_separator_whatever_the_pairs():
    reader, condition = TinyReader(new_trunk()), Condition(1, 3, 1)
    one = reader.prompt(QUERY, condition)
    other = reader.prompt(QUERY, condition, [Pair(QUERY, QUERY)])
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.tokens[-1] == SEPARATOR
    assert len(one.tokens) == 2 * 4 + 2
    assert one.condition == condition


@pytest.mark.parametrize("name", Condition._fields)
def test_every_part_of_the_condition_changes_what_is_written(name):
    reader = TinyReader(new_trunk())
    plain, changed = (reader.prompt(QUERY, Condition(**{name: value})) for value in (0, 1))
    grids = [[np.array([[3]], np.uint8)]] * 2
    (one,), (other,) = score(reader, [plain, changed], grids)
    assert abs(one - other) > 1e-3


def test_stores_alone_and_opened_for_a_call_are_alike():
    for packed, kind in ((False, RowStore), (True, PackedStore)):
        reader, asked = TinyReader(new_trunk(), packed=packed, max_places=500), new_prompts(3)
        alone = reader.store(asked, [20] * 3)
        opened = reader.opened([len(prompt.tokens) + 20 for prompt in asked])
        assert type(alone) is kind
        torch.testing.assert_close(alone.read(), opened.store(asked, [20] * 3).read())


def test_packed_rows_have_as_many_places_as_are_needed_and_there():
    reader = TinyReader(new_trunk(), packed=True, max_places=500)
    assert reader.opened([100, 50]).capacity == 150
    assert reader.opened([100] * 9).capacity == 500
    assert reader.opened([900, 10]).capacity == 900


def test_a_call_reads_with_the_weights_of_its_beginning_and_the_next_with_the_new_ones():
    trunk = new_trunk(LOOPED)
    reader, asked = TinyReader(trunk), new_prompts(3)
    before = decode(reader, asked, max_side=3)
    with torch.no_grad():
        trunk.layers[0].down_proj.weight.mul_(-1)
    after = decode(reader, asked, max_side=3)
    assert [one.log_probability for one in before] != [one.log_probability for one in after]


def test_prompts_are_compared_by_content():
    one = new_prompts(1)[0]
    copy = Prompt(one.tokens.copy(), one.positions.copy(), one.output_start, one.condition)
    found = decode(TinyReader(new_trunk()), [one, copy], max_side=3)
    assert found[0].choices == found[1].choices
