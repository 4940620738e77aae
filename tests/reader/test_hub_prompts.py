"""Prompts: one id for each cell whatever the tokenizer, and what is left out is said."""

import numpy as np
import pytest

from arctrm.data.task import Pair
from arctrm.errors import ConfigError
from arctrm.model import layout
from arctrm.reader.hub_prompts import chat_prompt, find_spelling, pairs_prompt
from arctrm.reader.text import parse_grid_text
from helpers import grid
from hub_models import END, TOKENIZERS, marked_words, words, wrapped

GRID = np.array([[1, 2, 3], [0, 0, 9]], np.uint8)


QUERY = grid("321")
PAIRS = [
    Pair(grid("123", "456"), grid("12")),
    Pair(grid("111", "222", "333"), grid("77", "77")),
    Pair(grid("9"), grid("8")),
]


def asked(make="sentence pieces", bound=10_000, pairs=PAIRS, query=QUERY):
    spelling = find_spelling(wrapped(TOKENIZERS[make]()))
    return pairs_prompt(spelling, query, pairs, bound, "some/model")


def chatted(make="sentence pieces", bound=10_000, chat=True, tokenizer=None, pairs=PAIRS):
    tokenizer = tokenizer or wrapped(TOKENIZERS[make](), chat=chat)
    return chat_prompt(tokenizer, QUERY, pairs, bound, "some/model")


@pytest.mark.parametrize("make", TOKENIZERS)
def test_every_tokenizer_spells_a_grid_with_one_id_per_cell(make):
    tokenizer = wrapped(TOKENIZERS[make]())
    spelling = find_spelling(tokenizer)
    assert len(set(spelling.choices)) == 12
    assert [tokenizer.decode([t]).strip() for t in spelling.choices[:10]] == list("0123456789")
    ids, last = spelling.spelt(layout.pair_tokens(Pair(GRID, GRID))[0], [0])
    marks = len(spelling.start) + len(spelling.input_mark) + len(spelling.output_mark)
    assert len(ids) == marks + 2 * 2 * (3 + 1) + 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids(END)
    assert last[0] == marks - len(spelling.output_mark) - 1
    assert np.diff(last).tolist() == [1] * 8 + [len(spelling.output_mark)] + [1] * 9
    rows = tokenizer.decode(ids[-9:-1].tolist()).replace(" ", "").replace(";", "\n").split("\n")
    assert [row for row in rows if row] == ["123", "009"]


def test_cells_are_bare_digits_unless_those_with_a_space_are_all_there_is():
    both = wrapped(TOKENIZERS["byte-level, digits merge"]())
    assert both.decode(list(find_spelling(both).choices[:10])) == "0123456789"
    alone = wrapped(marked_words(*"0123456789"))
    tokens = alone.convert_ids_to_tokens(list(find_spelling(alone).choices[:3]))
    assert tokens == ["▁0", "▁1", "▁2"]


@pytest.mark.parametrize(
    ("tokenizer", "lacks"),
    [
        (words(*"012345789", "\n"), "6"),
        (marked_words(*"012345789"), "0"),
        (words(*"0123456789"), "a newline"),
    ],
)
def test_what_cannot_spell_a_grid_is_refused_in_one_sentence(tokenizer, lacks):
    said = f"some/model: the tokenizer has no token of its own for {lacks}, .* tiny reader"
    with pytest.raises(ConfigError, match=said):
        find_spelling(wrapped(tokenizer), "some/model")


def test_the_text_of_a_prompt_is_inputs_and_outputs_line_by_line():
    tokenizer = wrapped(TOKENIZERS["byte-level, digits merge"]())
    prompt = asked("byte-level, digits merge")
    end = tokenizer.eos_token
    assert tokenizer.decode(prompt.tokens) == tokenizer.bos_token + (
        f"input\n123\n456\noutput\n12\n{end}"
        f"input\n111\n222\n333\noutput\n77\n77\n{end}"
        f"input\n9\noutput\n8\n{end}"
        "input\n321\noutput\n"
    )
    assert prompt.positions.tolist() == list(range(len(prompt.tokens)))
    assert prompt.output_start == len(prompt.tokens)
    assert np.array_equal(prompt.layout, layout.prompt(QUERY, pairs=PAIRS).tokens)


@pytest.mark.parametrize("build", [asked, chatted])
def test_a_query_that_does_not_fit_is_refused_in_one_sentence(build):
    with pytest.raises(ConfigError, match=r"some/model: the query alone takes \d+ tokens, allowed"):
        build(bound=5)


def test_a_chat_prompt_is_plain_language_through_the_template():
    tokenizer = wrapped(TOKENIZERS["byte-level, digits merge"](), chat=True)
    text = tokenizer.decode(chatted(tokenizer=tokenizer).tokens)
    assert text.startswith("<|user|>\n")
    assert text.endswith("Test\nInput:\n3 2 1\nOutput:\n<|assistant|>\n")
    assert "\n1 2 3\n4 5 6\n" in text
    assert "Demonstration 3\nInput:\n9\nOutput:\n8\n" in text
    assert parse_grid_text(text + "Here it is:\n7 7\n7 7").tolist() == [[7, 7], [7, 7]]
    single = wrapped(TOKENIZERS["byte-level, single digits"](), chat=True)
    assert "\n123\n456\n" in single.decode(chatted(tokenizer=single).tokens)


@pytest.mark.parametrize("build", [asked, chatted])
def test_the_longest_demonstrations_are_left_out_first(build):
    whole, least = (len(build(pairs=own).tokens) for own in (PAIRS, []))
    without = build(pairs=[PAIRS[0], PAIRS[2]])
    assert np.array_equal(build(bound=whole - 1).tokens, without.tokens)
    assert len(build(bound=least).tokens) == least
    for bound in range(least, whole, 7):
        assert len(build(bound=bound).tokens) <= bound


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ConfigError, match="some/model: the tokenizer has no chat template, which"):
        chatted(chat=False)
