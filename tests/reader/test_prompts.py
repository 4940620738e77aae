"""Prompts: what goes in, what is left out and said so, and that no answer ever enters."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hub_models import TOKENIZERS, sentence_piece, wrapped

from arctrm.data.task import Pair, Task
from arctrm.data.views import View
from arctrm.errors import ConfigError
from arctrm.reader.grid_text import parse_grid_text
from arctrm.reader.probing import probe
from arctrm.reader.prompts import chat_prompt, new_spelling, pairs_prompt, spell_grid, task_prompt

TURNED = View(1, (0, 3, 1, 2, 4, 5, 6, 7, 8, 9))


def grid(*rows):
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


TASK = Task(
    "00aa",
    (
        Pair(grid("123", "456"), grid("12")),
        Pair(grid("111", "222", "333"), grid("77", "77")),
        Pair(grid("9"), grid("8")),
    ),
    (Pair(grid("321"), grid("5")), Pair(grid("20"), grid("02"))),
)


def reader(make="sentence pieces", chat=True):
    tokenizer = wrapped(TOKENIZERS[make](), chat=chat)
    tokens = probe(tokenizer).tokens
    return SimpleNamespace(
        name="some/model", tokenizer=tokenizer, spelling=new_spelling(tokenizer, tokens)
    )


def test_the_text_of_a_grid_prompt_is_inputs_and_outputs_line_by_line():
    own = reader("byte-level, digits merge")
    ids = task_prompt(own, TASK, 0, 1000).prompt.tokens
    text = own.tokenizer.decode(ids)
    end = own.tokenizer.eos_token
    assert text == own.tokenizer.bos_token + (
        f"input\n123\n456\noutput\n12\n{end}"
        f"input\n111\n222\n333\noutput\n77\n77\n{end}"
        f"input\n9\noutput\n8\n{end}"
        "input\n321\noutput\n"
    )


def test_cells_never_merge_whatever_the_tokenizer_would_do():
    own = reader("sentence pieces, digits merge")
    merged = own.tokenizer.encode("123", add_special_tokens=False)
    assert len(merged) == 2  # the mark and one token for three digits
    ids = task_prompt(own, TASK, 0, 1000).prompt.tokens
    assert merged[-1] not in ids
    assert spell_grid(own.spelling.tokens, grid("123")).tolist()[:3] == [
        own.spelling.tokens.colours[c] for c in (1, 2, 3)
    ]


def test_positions_count_tokens_and_the_output_follows():
    prompt = task_prompt(reader(), TASK, 1, 1000).prompt
    assert prompt.positions.tolist() == list(range(len(prompt.tokens)))
    assert prompt.output_start == len(prompt.tokens)
    assert prompt.tokens.dtype == prompt.positions.dtype == np.int64


@pytest.mark.parametrize("view", [View(0), TURNED])
@pytest.mark.parametrize("build", [task_prompt, chat_prompt])
def test_test_outputs_change_nothing(build, view):
    own = reader()
    before = build(own, TASK, 0, 2000, view)
    for output in (None, grid("0" * 30), grid("44", "44")):
        other = replace(TASK, test=tuple(Pair(pair.input, output) for pair in TASK.test))
        after = build(own, other, 0, 2000, view)
        assert np.array_equal(before.prompt.tokens, after.prompt.tokens)
        assert (before.text, before.dropped, before.note) == (after.text, after.dropped, after.note)


@pytest.mark.parametrize("build", [task_prompt, chat_prompt])
def test_other_test_inputs_do_not_enter_but_the_own_one_does(build):
    own = reader()
    before = build(own, TASK, 0, 2000).prompt.tokens
    other = replace(TASK, test=(TASK.test[0], Pair(grid("555"))))
    assert np.array_equal(before, build(own, other, 0, 2000).prompt.tokens)
    changed = replace(TASK, test=(Pair(grid("322")), TASK.test[1]))
    assert not np.array_equal(before, build(own, changed, 0, 2000).prompt.tokens)


def test_a_view_is_applied_to_demonstrations_and_query():
    own = reader()
    seen = replace(
        TASK,
        demonstrations=tuple(
            Pair(TURNED.apply(p.input), TURNED.apply(p.output)) for p in TASK.demonstrations
        ),
        test=tuple(Pair(TURNED.apply(p.input)) for p in TASK.test),
    )
    for build in (task_prompt, chat_prompt):
        there, here = build(own, TASK, 0, 2000, TURNED), build(own, seen, 0, 2000)
        assert np.array_equal(there.prompt.tokens, here.prompt.tokens)


def test_the_longest_demonstrations_are_left_out_first_and_it_is_said():
    own = reader()
    whole = task_prompt(own, TASK, 0, 10_000)
    length = len(whole.prompt.tokens)
    assert whole.dropped == ()
    assert whole.note == ""
    shorter = task_prompt(own, TASK, 0, length - 1)
    assert shorter.dropped == (1,)
    assert shorter.note == (
        f"task 00aa, test input 0: 1 of 3 demonstrations do not fit into {length - 1} tokens and "
        "were left out: train[1]"
    )
    least = pairs_prompt(own.spelling, [], TASK.test[0].input, 10_000).prompt
    alone = task_prompt(own, TASK, 0, len(least.tokens))
    assert alone.dropped == (0, 1, 2)
    assert "train[0], train[1], train[2]" in alone.note
    assert np.array_equal(alone.prompt.tokens, least.tokens)


def test_the_query_is_whole_at_every_bound_that_it_fits():
    own = reader()
    query = pairs_prompt(own.spelling, [], TASK.test[0].input, 10_000).prompt.tokens
    body = query[len(own.spelling.start) :]
    for bound in range(len(query), 80):
        ids = task_prompt(own, TASK, 0, bound).prompt.tokens
        assert len(ids) <= bound
        assert ids[: len(own.spelling.start)].tolist() == list(own.spelling.start)
        assert np.array_equal(ids[-len(body) :], body)


@pytest.mark.parametrize("build", [task_prompt, chat_prompt])
def test_a_query_that_does_not_fit_is_refused_in_one_sentence(build):
    with pytest.raises(
        ConfigError, match=r"00aa, test input 0: the query alone takes \d+ tokens, "
    ):
        build(reader(), TASK, 0, 5)


def test_a_chat_prompt_is_plain_language_through_the_template():
    built = chat_prompt(reader("byte-level, digits merge"), TASK, 0, 2000)
    assert built.text.startswith("<|user|>\n")
    assert built.text.endswith("Test\nInput:\n3 2 1\nOutput:\n<|assistant|>\n")
    assert "Demonstration 3\nInput:\n9\nOutput:\n8\n" in built.text
    answered = built.text + "Here it is:\n7 7\n7 7"
    assert parse_grid_text(answered).tolist() == [[7, 7], [7, 7]]


def test_cells_of_a_chat_prompt_stand_apart_only_where_digits_merge():
    merging = chat_prompt(reader("byte-level, digits merge"), TASK, 0, 2000).text
    single = chat_prompt(reader("byte-level, single digits"), TASK, 0, 2000).text
    assert "\n1 2 3\n4 5 6\n" in merging
    assert "\n123\n456\n" in single


def test_demonstrations_of_a_chat_prompt_are_left_out_too():
    own = reader()
    whole = chat_prompt(own, TASK, 0, 10_000)
    built = chat_prompt(own, TASK, 0, len(whole.prompt.tokens) - 1)
    assert built.dropped == (1,)
    assert "Demonstration 2\n" in built.text
    assert "Demonstration 3\n" not in built.text
    assert len(built.prompt.tokens) < len(whole.prompt.tokens)


def test_a_model_without_a_chat_template_is_refused_in_one_sentence():
    with pytest.raises(ConfigError) as error:
        chat_prompt(reader(chat=False), TASK, 0, 2000)
    assert str(error.value) == (
        "some/model: the tokenizer has no chat template, which prompt = 'chat' needs; set "
        "prompt = 'grid' or use the instruction-tuned version of the model"
    )


def test_a_chat_template_that_fails_is_one_sentence():
    own = reader()
    own.tokenizer.chat_template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(ConfigError, match=r"cannot be rendered \(only system messages\); set"):
        chat_prompt(own, TASK, 0, 2000)


def test_an_end_that_the_tokenizer_adds_is_not_left_in_the_start():
    from tokenizers import processors

    raw = sentence_piece()
    tokenizer = wrapped(raw)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    assert tokenizer.encode("input")[-1] == end
    assert new_spelling(tokenizer, probe(tokenizer).tokens).start == (start,)
