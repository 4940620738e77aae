"""Prompts: one id for each cell whatever the tokenizer, and what is left out is said."""

import numpy as np
import pytest
from tokenizers import processors

from arctrm.data.task import Pair
from arctrm.errors import ConfigError
from arctrm.model import layout
from arctrm.reader.hub_prompts import chat_prompt, find_spelling, merges_digits, pairs_prompt
from arctrm.reader.text import parse_grid_text
from hub_models import END, TOKENIZERS, marked_words, sentence_piece, words, wrapped

GRID = np.array([[1, 2, 3], [0, 0, 9]], np.uint8)


def grid(*rows):
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


QUERY = grid("321")
PAIRS = [
    Pair(grid("123", "456"), grid("12")),
    Pair(grid("111", "222", "333"), grid("77", "77")),
    Pair(grid("9"), grid("8")),
]


def asked(make="sentence pieces", bound=10_000, pairs=PAIRS, query=QUERY):
    spelling = find_spelling(wrapped(TOKENIZERS[make]()))
    return pairs_prompt(spelling, query, pairs, bound, "task 00aa")


def chatted(make="sentence pieces", bound=10_000, chat=True, tokenizer=None, pairs=PAIRS):
    tokenizer = tokenizer or wrapped(TOKENIZERS[make](), chat=chat)
    return chat_prompt(tokenizer, QUERY, pairs, bound, "task 00aa", "some/model")


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


def test_merging_tokenizers_are_told_apart():
    merging = {make for make in TOKENIZERS if merges_digits(wrapped(TOKENIZERS[make]()))}
    # Words without a space between them are one unknown word.
    digits = {"byte-level, digits merge", "sentence pieces, digits merge"}
    assert merging == {*digits, "words", "words with the space"}


def test_cells_are_bare_digits_unless_separated_ones_are_asked_for_or_all_there_is():
    both = wrapped(TOKENIZERS["byte-level, digits merge"]())
    assert find_spelling(both).choices == find_spelling(both, "restricted").choices
    separated = find_spelling(both, "separated").choices
    assert [both.decode([token]) for token in separated[:3]] == [" 0", " 1", " 2"]
    found = find_spelling(wrapped(marked_words(*"0123456789")))
    assert found.how.startswith("cells are digits with the space before them")


def test_how_it_was_found_is_said():
    assert find_spelling(wrapped(sentence_piece())).how == (
        "cells are bare digits, rows end with a newline, a grid with <|end|>"
    )
    assert "rows end with ';'" in find_spelling(wrapped(words(*"0123456789", ";"))).how


def test_a_letter_that_only_looks_like_a_byte_is_not_taken_for_the_newline():
    tokenizer = wrapped(words(*"0123456789", "Ċ", "|"))
    assert tokenizer.decode([find_spelling(tokenizer).choices[10]]) == "|"


@pytest.mark.parametrize(
    ("tokenizer", "cells", "said"),
    [
        (words("a", "b", "\n"), "auto", "has no token of its own for the digit 0"),
        (words(*"012345789", "\n"), "auto", "has no token of its own for the digit 6"),
        (words(*"0123456789", "\n"), "separated", "has no token with a space before it for the"),
        (words(*"0123456789", "\n"), "separated", "set cells = 'restricted' or use a reader whose"),
        (marked_words(*"0123456789"), "restricted", "set cells = 'separated' or use a reader"),
        (words(*"0123456789"), "auto", "has no token for a newline"),
    ],
)
def test_what_cannot_spell_a_grid_is_refused_in_one_sentence(tokenizer, cells, said):
    with pytest.raises(ConfigError) as error:
        find_spelling(wrapped(tokenizer), cells, "some/model")
    assert str(error.value).startswith("some/model: the tokenizer")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "tiny reader" in str(error.value)


def test_a_tokenizer_without_an_end_gets_a_token_of_its_own_for_it():
    wrapper = wrapped(words(*"0123456789", "\n", "#"), start=False)
    wrapper.eos_token = None
    assert wrapper.decode([find_spelling(wrapper).choices[11]]) == "#"


def test_the_start_of_a_prompt_is_what_the_tokenizer_puts_before_text():
    for start in (True, False):
        spelling = find_spelling(wrapped(sentence_piece(), start=start))
        assert len(spelling.start) == start
        assert spelling.input_mark != spelling.output_mark
        assert spelling.input_mark[-1] == spelling.output_mark[-1] == spelling.choices[10]


def test_an_end_that_the_tokenizer_adds_is_not_left_in_the_start():
    tokenizer = wrapped(sentence_piece())
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    assert tokenizer.encode("input")[-1] == end
    assert find_spelling(tokenizer).start == (start,)


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


def test_cells_never_merge_whatever_the_tokenizer_would_do():
    tokenizer = wrapped(TOKENIZERS["sentence pieces, digits merge"]())
    merged = tokenizer.encode("123", add_special_tokens=False)
    assert len(merged) == 2  # the mark and one token for three digits
    assert merged[-1] not in asked("sentence pieces, digits merge").tokens


def test_the_longest_demonstrations_are_left_out_first_and_it_is_said():
    whole, least = asked(), asked(pairs=[])
    assert whole.note == ""
    length = len(whole.tokens)
    assert asked(bound=length - 1).note == (
        f"task 00aa: 1 of 3 demonstrations do not fit into {length - 1} tokens and were left out: "
        "train[1]"
    )
    without = asked(pairs=[PAIRS[0], PAIRS[2]])
    assert np.array_equal(asked(bound=length - 1).tokens, without.tokens)
    alone = asked(bound=len(least.tokens))
    assert "train[0], train[1], train[2]" in alone.note
    assert np.array_equal(alone.tokens, least.tokens)
    for bound in range(len(least.tokens), length):
        assert len(asked(bound=bound).tokens) <= bound


@pytest.mark.parametrize("build", [asked, chatted])
def test_a_query_that_does_not_fit_is_refused_in_one_sentence(build):
    with pytest.raises(ConfigError, match=r"task 00aa: the query alone takes \d+ tokens, allowed"):
        build(bound=5)


def test_a_chat_prompt_is_plain_language_through_the_template():
    text = chatted("byte-level, digits merge").text
    assert text.startswith("<|user|>\n")
    assert text.endswith("Test\nInput:\n3 2 1\nOutput:\n<|assistant|>\n")
    assert "Demonstration 3\nInput:\n9\nOutput:\n8\n" in text
    assert parse_grid_text(text + "Here it is:\n7 7\n7 7").tolist() == [[7, 7], [7, 7]]


def test_cells_of_a_chat_prompt_stand_apart_only_where_digits_merge():
    assert "\n1 2 3\n4 5 6\n" in chatted("byte-level, digits merge").text
    assert "\n123\n456\n" in chatted("byte-level, single digits").text


def test_demonstrations_of_a_chat_prompt_are_left_out_too():
    whole = chatted()
    shorter = chatted(bound=len(whole.tokens) - 1)
    assert "left out: train[1]" in shorter.note
    assert "Demonstration 2\n" in shorter.text
    assert "Demonstration 3\n" not in shorter.text


def test_chat_templates_that_are_not_there_or_fail_are_one_sentence():
    with pytest.raises(ConfigError, match="some/model: the tokenizer has no chat template, which"):
        chatted(chat=False)
    tokenizer = wrapped(sentence_piece(), chat=True)
    tokenizer.chat_template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(ConfigError, match=r"cannot be rendered \(only system messages\); set"):
        chatted(tokenizer=tokenizer)
