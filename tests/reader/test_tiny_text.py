"""The tiny reader as a reader of text: the tokens of its training, and the same latents."""

import numpy as np
import pytest
import torch
from torch import nn

from arctrm.config.reader import ReaderConfig
from arctrm.data.task import Pair, Task
from arctrm.errors import ConfigError
from arctrm.reader import tokens as t
from arctrm.reader.attention import new_packing
from arctrm.reader.prompts import grid_text, plain_text
from arctrm.reader.text_module import TextReasoningModule
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tiny_text import TinyText

RNG = np.random.default_rng(0)


def random_grid(height, width):
    return RNG.integers(0, 10, (height, width)).astype(np.uint8)


TASK = Task(
    "t",
    (Pair(random_grid(3, 2), random_grid(1, 4)), Pair(random_grid(2, 2), random_grid(5, 5))),
    (Pair(random_grid(3, 3)),),
)
QUERY = TASK.test[0].input


def new_tiny(**changes):
    torch.manual_seed(0)
    reader = TinyReader(ReaderConfig(hidden_size=32, num_layers=2, num_heads=2, **changes), 3)
    for parameter in reader.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return TinyText(reader, condition=(2, 0, 1))


@pytest.fixture
def tiny():
    return new_tiny(sequence="task")


def compact(pairs, query):
    shown = [f"input\n{grid_text(p.input, '')}\noutput\n{grid_text(p.output, '')}\n" for p in pairs]
    return "".join(shown) + f"input\n{grid_text(query, '')}\noutput\n"


@pytest.mark.parametrize("write", [compact, plain_text])
def test_a_text_reads_as_the_tokens_of_its_pairs(write, tiny):
    read = tiny.text_prompt(write(TASK.demonstrations, QUERY))
    expected = t.prompt(TASK.demonstrations, QUERY, (2, 0, 1))
    assert np.array_equal(read.tokens, expected.tokens)
    assert np.array_equal(read.positions, expected.positions)
    assert (read.output_start, read.condition) == (expected.output_start, expected.condition)


def test_what_is_no_grid_is_passed_over(tiny):
    plain, told = (
        tiny.text_prompt(text)
        for text in (
            compact([], QUERY),
            compact([], QUERY) + "\n\nFeedback: demonstration 1: 3 of 9 cells wrong: (0,1) 3/5",
        )
    )
    assert np.array_equal(plain.tokens, told.tokens)
    for text in ("", "What is the rule?"):
        with pytest.raises(ConfigError, match="reads rows of digits after the words input and"):
            tiny.text_prompt(text)
    with pytest.raises(ConfigError, match="more than 30 rows or columns"):
        tiny.text_prompt("1" * 31)


def test_new_tokens_stand_where_an_output_stands(tiny):
    prompt = t.prompt([], QUERY)
    answer = random_grid(3, 4)
    whole, positions = t.pair_tokens(Pair(QUERY, answer), 0)
    new = torch.tensor(whole[len(prompt.tokens) :])[None]
    start = torch.tensor([prompt.output_start])
    got = tiny.positions_after(start, new, 0)
    assert got[0].tolist() == positions[len(prompt.tokens) :].tolist()
    with_prefix = tiny.positions_after(start, new, 4)
    assert with_prefix[0, 4:].tolist() == got[0].tolist()
    assert with_prefix[0, :4].tolist() == [
        t.pack_position(t.SEPARATOR_PART, 0, x) for x in (1, 2, 3, 4)
    ]
    assert tiny.text_of(new[0].tolist()) == grid_text(answer, "") + "\n"


def test_a_text_that_stops_within_an_output_is_gone_on_with(tiny):
    answer = random_grid(3, 4)
    whole, positions = t.pair_tokens(Pair(QUERY, answer), 0)
    read = tiny.text_prompt(compact([], QUERY) + grid_text(answer[:2], "") + "\n")
    assert np.array_equal(read.tokens, whole[: len(read.tokens)])
    rest = torch.tensor(whole[len(read.tokens) :])[None]
    got = tiny.positions_after(torch.tensor([read.output_start]), rest, 0)
    assert got[0].tolist() == positions[len(read.tokens) :].tolist()


TEXTS = [compact(TASK.demonstrations, QUERY), compact([], QUERY), compact([], random_grid(1, 1))]


@pytest.mark.parametrize("with_prefix", [False, True])
def test_latents_are_the_same_alone_in_a_batch_and_with_gradient(with_prefix, tiny):
    module = TextReasoningModule(tiny)
    prefix = torch.randn(3, 4, 32) if with_prefix else None
    many = module.generate_latent(TEXTS, prefix, 10)
    for row, text in enumerate(TEXTS):
        one = module.generate_latent(text, None if prefix is None else prefix[row], 10)
        torch.testing.assert_close(many.z_init[row], one.z_init, atol=1e-5, rtol=1e-5)
        assert many.text[row] == one.text
    trained = TextReasoningModule(tiny, freeze=False)
    tiny.model.requires_grad_(True)
    again = trained.generate_latent(TEXTS, prefix, 10)
    torch.testing.assert_close(again.z_init.detach(), many.z_init, atol=1e-5, rtol=1e-5)
    again.z_init.square().sum().backward()
    embeddings = tiny.model.puzzle_emb.weights.grad
    assert embeddings[2].norm() > 0
    assert tiny.model.llama.model.layers[0].self_attn.q_proj.weight.grad.norm() > 0


@torch.no_grad()
def packed_hidden(tiny, text):
    """Hidden states of a text, laid out as in training."""
    read, prompt = tiny.text_prompt(text), None
    count = len(read.tokens)
    if tiny.model.config.sees_inputs_whole:
        prompt = torch.tensor([read.tokens.tolist().index(t.SEPARATOR) + 1])
    return tiny.model.hidden(
        torch.tensor(read.tokens),
        torch.tensor(read.positions),
        tiny.model.condition(*torch.tensor([read.condition]).unbind(1)).expand(count, -1),
        new_packing(torch.tensor([0, count], dtype=torch.int32), count, torch.float32, prompt),
    )


def test_hidden_states_are_those_of_the_packed_forward(tiny):
    module = TextReasoningModule(tiny)
    hidden, mask = module.hidden_states(TEXTS)
    for row, text in enumerate(TEXTS):
        expected = packed_hidden(tiny, text)
        torch.testing.assert_close(hidden[row][mask[row]], expected, atol=1e-5, rtol=1e-5)


def test_a_reader_that_sees_inputs_whole_reads_texts_of_a_pair_as_it_was_trained():
    """Packed and as a text, with and without a cache, alone and beside others."""
    tiny = new_tiny(input_attention="full")
    module = TextReasoningModule(tiny)
    texts = [compact([], query) + tail for query, tail in ((QUERY, ""), (QUERY[:2], "12\n3"))]
    hidden, mask = module.hidden_states(texts)
    for row, text in enumerate(texts):
        expected = packed_hidden(tiny, text)
        torch.testing.assert_close(hidden[row][mask[row]], expected, atol=1e-5, rtol=1e-5)
    prefix = torch.randn(2, 32)
    with torch.no_grad():
        written = module.generate_latent(texts, prefix, 8)  # with a cache
    again = TextReasoningModule(tiny, freeze=False)
    tiny.model.requires_grad_(True)
    at_once = again.generate_latent(texts, prefix, 8)  # in one pass
    assert at_once.text == written.text
    torch.testing.assert_close(at_once.z_init.detach(), written.z_init, atol=1e-5, rtol=1e-5)


def test_a_text_that_ends_within_an_input_is_refused_where_inputs_are_seen_whole(tiny):
    text = "input\n123\n456\n"
    assert len(tiny.text_prompt(text).tokens) == 9
    with pytest.raises(ConfigError, match=r"ends within an input.*line that says output"):
        new_tiny(input_attention="full").text_prompt(text)
