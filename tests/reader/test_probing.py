"""Probing: whatever the tokenizer, a cell is one id, and what cannot spell a grid is refused."""

import numpy as np
import pytest
from hub_models import END, TOKENIZERS, marked_words, sentence_piece, words, wrapped

from arctrm.errors import ConfigError
from arctrm.reader.probing import merges_digits, probe
from arctrm.reader.prompts import new_spelling, spell_grid

GRID = np.array([[1, 2, 3], [0, 0, 9]], np.uint8)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_every_tokenizer_spells_a_grid_with_one_id_per_cell(make):
    tokenizer = wrapped(TOKENIZERS[make]())
    tokens = probe(tokenizer).tokens
    ids = spell_grid(tokens, GRID)
    assert len(ids) == 2 * (3 + 1) + 1
    assert len({*tokens.colours, tokens.row_end, tokens.end}) == 12
    rows = tokenizer.decode(ids[:-1].tolist()).replace(" ", "").replace(";", "\n").split("\n")
    assert [row for row in rows if row] == ["123", "009"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids(END)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_each_colour_decodes_to_its_digit_alone(make):
    tokenizer = wrapped(TOKENIZERS[make]())
    for colour, token in enumerate(probe(tokenizer).tokens.colours):
        assert tokenizer.decode([token]).strip() == str(colour)


def test_merging_tokenizers_are_told_apart():
    merging = {make for make in TOKENIZERS if merges_digits(wrapped(TOKENIZERS[make]()))}
    # Words without a space between them are one unknown word.
    assert merging == {
        "byte-level, digits merge",
        "sentence pieces, digits merge",
        "words",
        "words with the space",
    }


def test_cells_are_bare_digits_unless_separated_ones_are_asked_for_or_all_there_is():
    both = wrapped(TOKENIZERS["byte-level, digits merge"]())
    assert probe(both).cells == probe(both, "restricted").cells == "restricted"
    separated = probe(both, "separated")
    assert separated.cells == "separated"
    assert [both.decode([token]) for token in separated.tokens.colours[:3]] == [" 0", " 1", " 2"]
    assert probe(wrapped(marked_words(*"0123456789"))).cells == "separated"


def test_how_it_was_found_is_said():
    assert probe(wrapped(sentence_piece())).how == (
        "cells are bare digits, rows end with a newline, a grid with <|end|>"
    )
    assert "rows end with ';'" in probe(wrapped(words(*"0123456789", ";"))).how


def test_a_letter_that_only_looks_like_a_byte_is_not_taken_for_the_newline():
    tokenizer = wrapped(words(*"0123456789", "Ċ", "|"))
    row_end = probe(tokenizer).tokens.row_end
    assert tokenizer.decode([row_end]) == "|"


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
        probe(wrapped(tokenizer), cells, "some/model")
    assert str(error.value).startswith("some/model: the tokenizer")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "tiny reader" in str(error.value)


def test_a_tokenizer_without_an_end_gets_a_token_of_its_own_for_it():
    wrapper = wrapped(words(*"0123456789", "\n", "#"), start=False)
    wrapper.eos_token = None
    assert wrapper.decode([probe(wrapper).tokens.end]) == "#"


def test_the_start_of_a_prompt_is_what_the_tokenizer_puts_before_text():
    for start in (True, False):
        tokenizer = wrapped(sentence_piece(), start=start)
        spelling = new_spelling(tokenizer, probe(tokenizer).tokens)
        assert len(spelling.start) == start
        assert spelling.input_mark != spelling.output_mark
        assert spelling.input_mark[-1] == spelling.output_mark[-1] == spelling.tokens.row_end
