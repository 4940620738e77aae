"""The tiny reader: one model whether packed for training or cached for decoding."""

import re

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from arctrm.config import OptimiserConfig, ReaderConfig
from arctrm.data.task import Pair
from arctrm.reader.attention import new_packing, prefix_mask
from arctrm.reader.interface import left_padded
from arctrm.reader.tiny import GridRotary, TinyReader, llama_config
from arctrm.reader.tokens import (
    END,
    OUTPUT_PART,
    ROW_END,
    SEPARATOR,
    SIDE,
    START,
    pack_position,
    pair_length,
    pair_tokens,
    prompt,
)
from arctrm.training.optimisers import FlatGradients, Optimisers

CONFIG = ReaderConfig(hidden_size=32, num_layers=2, num_heads=2)


FULL = CONFIG.model_copy(update={"input_attention": "full"})
LOOPED = FULL.model_copy(update={"loops": 3})


INJECTED = LOOPED.model_copy(update={"injection": True})


@pytest.fixture(
    params=[CONFIG, FULL, LOOPED, INJECTED], ids=["causal", "full", "looped", "injected"]
)
def reader(request):
    return new_reader(request.param)


def new_reader(config):
    torch.manual_seed(0)
    reader = TinyReader(config, 3)
    if reader.injection is not None:
        for matrix in reader.injection.parameters():
            torch.nn.init.normal_(matrix, std=0.3)
    return reader


def grids(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 10, size, dtype=np.uint8) for size in sizes]


def packed_logits(reader, sequences, conditions):
    """Logits of each sequence (tokens, positions), all packed on one axis."""
    lengths = [len(tokens) for tokens, _ in sequences]
    tokens, positions = (torch.from_numpy(np.concatenate(x)) for x in zip(*sequences, strict=True))
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    condition = reader.condition(*torch.tensor(conditions).unbind(1))
    of_token = condition.repeat_interleave(torch.tensor(lengths), 0)
    prompts = None
    if reader.config.sees_inputs_whole:
        ends = [tokens.tolist().index(SEPARATOR) + 1 for tokens, _ in sequences]
        prompts = torch.tensor(ends)
    packing = new_packing(offsets, max(lengths), torch.float32, prompts)
    return reader.head(reader.hidden(tokens, positions, of_token, packing)).split(lengths)


def unrolled(reader):
    """The weights of a looped reader, those of each pass by the name of the layer it would be."""
    weights = dict(reader.llama.state_dict())
    layers = [name for name in weights if ".layers." in name]
    for time in range(1, reader.config.loops):
        for name in layers:
            head, number, tail = re.fullmatch(r"(.*layers\.)(\d+)(\..*)", name).groups()
            place = time * reader.config.num_layers + int(number)
            weights[f"{head}{place}{tail}"] = weights[name]
    return weights


def test_a_pair_is_start_input_separator_output_end_with_row_ends():
    pair = Pair(np.array([[1, 2], [3, 4]], np.uint8), np.array([[5]], np.uint8))
    tokens, positions = pair_tokens(pair, 1)
    expected = [START, 1, 2, ROW_END, 3, 4, ROW_END, SEPARATOR, 5, ROW_END, END]
    assert tokens.tolist() == expected
    assert len(tokens) == pair_length(pair)
    parts, y, x = positions // SIDE**2, positions // SIDE % SIDE, positions % SIDE
    assert parts.tolist() == [4, 5, 5, 5, 5, 5, 5, 6, 7, 7, 7]
    assert y.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert x.tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 0, 1, 0]


def test_a_prompt_is_the_pair_up_to_the_separator_and_says_where_the_output_begins():
    query, output = grids((3, 4), (2, 2))
    whole, places = pair_tokens(Pair(query, output), 0)
    asked = prompt((), query)
    assert asked.tokens.tolist() == whole[: len(asked.tokens)].tolist()
    assert asked.tokens[-1] == SEPARATOR
    assert asked.output_start == pack_position(OUTPUT_PART) == places[len(asked.tokens)]


def test_packed_and_cached_logits_are_the_same(reader):
    pairs = [Pair(*grids((3, 4), (2, 5))), Pair(*grids((6, 2), (7, 7), seed=1))]
    conditions = [(0, 3, 1), (2, 5, 0)]
    packed = packed_logits(reader, [pair_tokens(pair, 0) for pair in pairs], conditions)
    prompts = [prompt((), p.input, c) for p, c in zip(pairs, conditions, strict=True)]
    tokens, positions, mask = left_padded(prompts)
    cache = reader.new_cache(tokens.shape[1] + 60)
    logits = reader.logits(tokens, positions, torch.tensor(conditions), mask, cache)
    y = torch.zeros(2, dtype=torch.long)
    start = torch.tensor([p.output_start for p in prompts])
    for row, asked in enumerate(prompts):
        torch.testing.assert_close(
            logits[row, -len(asked.tokens) :], packed[row][: len(asked.tokens)], atol=1e-5, rtol=0
        )
    for count in range(5):  # the first row of both outputs
        x = torch.full_like(y, count)
        now = torch.tensor([int(pair.output[0, count]) for pair in pairs])[:, None]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        places = reader.output_positions(start, count, y, x)[:, None]
        logits = reader.logits(now, places, torch.tensor(conditions), mask, cache)
        for row, asked in enumerate(prompts):
            expected = packed[row][len(asked.tokens) + count]
            torch.testing.assert_close(logits[row, 0], expected, atol=1e-5, rtol=0)


def test_the_packed_layers_are_those_of_a_plain_llama(reader):
    """Same weights in a LlamaForCausalLM with our rotary module, each pass of a looped reader as
    layers of its own: same logits."""
    if reader.config.injection:
        pytest.skip("a plain LLaMA has no injection")
    pair = Pair(*grids((3, 3), (3, 3)))
    tokens, positions = (torch.from_numpy(x) for x in pair_tokens(pair, 0))
    as_deep = reader.config.model_copy(update={"num_layers": reader.config.depth, "loops": 1})
    plain = LlamaForCausalLM(llama_config(as_deep))
    plain.load_state_dict(unrolled(reader))
    plain.model.rotary_emb = GridRotary(16, CONFIG.rope_base)
    plain.set_attn_implementation("eager")
    condition = reader.condition(*torch.tensor([(1, 2, 0)]).unbind(1))
    embedded = plain.model.embed_tokens(tokens)[None] + condition
    mask = torch.ones(1, len(tokens), dtype=torch.long)
    if reader.config.sees_inputs_whole:
        mask = prefix_mask(len(tokens), tokens.tolist().index(SEPARATOR) + 1)[None, None]
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    out = plain(inputs_embeds=embedded, position_ids=positions[None], attention_mask=mask)
    [packed] = packed_logits(reader, [(tokens.numpy(), positions.numpy())], [(1, 2, 0)])
    torch.testing.assert_close(packed, out.logits[0], atol=1e-5, rtol=0)


def test_injection_begins_with_nothing_and_is_learned():
    """At first the reader is the one without; the matrix of every pass gets a gradient."""
    torch.manual_seed(0)
    fresh = TinyReader(INJECTED, 3)
    without = TinyReader(LOOPED, 3)
    found = without.load_state_dict(fresh.state_dict(), strict=False)
    assert found.unexpected_keys == [f"injection.layers.{number}.weight" for number in range(6)]
    assert not found.missing_keys
    sequence = [pair_tokens(Pair(*grids((3, 4), (2, 5))), 0)]
    [ours], [plain] = (packed_logits(one, sequence, [(1, 2, 0)]) for one in (fresh, without))
    assert torch.equal(ours, plain)
    ours.square().sum().backward()
    assert all(matrix.weight.grad.abs().sum() > 0 for matrix in fresh.injection.layers)


def test_what_is_injected_is_the_cell_and_the_condition_and_not_how_large_they_are():
    reader = new_reader(INJECTED)
    given = []
    reader.injection.layers[3].register_forward_hook(
        lambda module, args, out: given.append(args[0])
    )
    pair = Pair(*grids((3, 4), (2, 5)))
    tokens, positions = pair_tokens(pair, 0)
    packed_logits(reader, [(tokens, positions)], [(1, 2, 0)])
    condition = reader.condition(*torch.tensor([(1, 2, 0)]).unbind(1))
    embedded = reader.llama.model.embed_tokens(torch.from_numpy(tokens)) + condition
    expected = embedded / embedded.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(given[0][0], expected, atol=1e-2, rtol=1e-2)


def test_injection_has_the_same_gradient_where_activations_are_computed_anew():
    gradients = []
    for again in (False, True):
        reader = new_reader(INJECTED)
        reader.checkpointed = again
        sequence = [pair_tokens(Pair(*grids((3, 4), (2, 5))), 0)]
        packed_logits(reader, sequence, [(1, 2, 0)])[0].square().sum().backward()
        gradients.append([p.grad for p in reader.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, anew in zip(*gradients, strict=True):
        assert torch.equal(plain, anew)


def test_injection_is_trained_as_the_layers_are():
    reader = new_reader(INJECTED)
    FlatGradients(list(reader.parameters()))
    muon = Optimisers(reader, OptimiserConfig()).all["muon"]
    shapes = [p.shape for p in muon.param_groups[0]["params"]]
    assert shapes.count((32, 32)) == 2 * 4 + 6


def test_a_token_sees_nothing_after_it_and_nothing_of_other_sequences(reader):
    first, second = (pair_tokens(Pair(*grids((3, 3), (2, 2), seed=s)), 0) for s in (0, 1))
    conditions = [(0, 0, 0), (1, 1, 1)]
    before = packed_logits(reader, [first, second], conditions)
    changed = first[0].copy()
    changed[-4] = (changed[-4] + 1) % 10
    after = packed_logits(reader, [(changed, first[1]), second], conditions)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0][:-4], after[0][:-4])
    assert not torch.equal(before[0][-4:], after[0][-4:])


def test_an_input_seen_whole_changes_with_its_last_cell_and_a_causal_one_does_not(reader):
    tokens, positions = pair_tokens(Pair(*grids((3, 3), (2, 2))), 0)
    [before] = packed_logits(reader, [(tokens, positions)], [(0, 0, 0)])
    changed = tokens.copy()
    last = changed.tolist().index(SEPARATOR) - 2
    changed[last] = (changed[last] + 1) % 10
    [after] = packed_logits(reader, [(changed, positions)], [(0, 0, 0)])
    assert torch.equal(before[:last], after[:last]) != reader.config.sees_inputs_whole
    assert not torch.equal(before[last + 2 :], after[last + 2 :])


def test_column_row_and_part_turn_angles_of_their_own():
    rotary = GridRotary(32, 100.0)
    origin, right, down, later = (pack_position(*p) for p in ((0,), (0, 0, 1), (0, 1), (1,)))
    cos, _ = rotary(torch.zeros(1), torch.tensor([[origin, right, down, later]]))
    changed = (cos[0, 1:] != cos[0, :1])[:, :16]
    assert changed.sum(1).tolist() == [6, 6, 4]
    assert changed.sum(0).tolist() == [1] * 16


def test_task_dihedral_and_colour_flag_each_change_the_answer(reader):
    sequence = pair_tokens(Pair(*grids((3, 3), (3, 3))), 0)
    [base] = packed_logits(reader, [sequence], [(0, 0, 0)])
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        [logits] = packed_logits(reader, [sequence], [other])
        assert not torch.allclose(base, logits)
    without = TinyReader(ReaderConfig(**{**CONFIG.model_dump(), "task_embedding": False}), 3)
    rows = torch.tensor([0, 1])
    condition = without.condition(rows, torch.zeros_like(rows), torch.zeros_like(rows))
    assert torch.equal(condition[0], condition[1])
