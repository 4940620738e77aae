"""The trunk is a LLaMA with loops, injection and 3-D positions: compared with transformers'."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from arctrm.config import TrunkConfig
from arctrm.data.task import Pair
from arctrm.model.attention import block_spans, has_tiles, prefix_mask, spans
from arctrm.model.layout import (
    CHOICES,
    SEPARATOR,
    VOCABULARY,
    Condition,
    pack_position,
    pair_tokens,
)
from arctrm.model.trunk import EPS, Trunk, llama_state
from helpers import random_grid

CONFIG = TrunkConfig(hidden_size=32, num_layers=2, num_heads=2, loops=1, injection=False)
LOOPED = CONFIG.model_copy(update={"loops": 3})
INJECTED = LOOPED.model_copy(update={"injection": True})


def new_trunk(config=INJECTED, tasks=3, scales=2, std=0.2):
    """Large enough weights for attention to matter; injection as if it had been trained."""
    torch.manual_seed(0)
    trunk = Trunk(config, tasks, scales)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if parameter.ndim == 2 and "halt" not in name:
                parameter.normal_(std=std)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return trunk


def batch(pairs, conditions=None):
    """Pairs on one axis: tokens, positions, row of each token, condition rows, lengths, prompts."""
    parts = [pair_tokens(pair) for pair in pairs]
    tokens, positions = (torch.from_numpy(np.concatenate(x)) for x in zip(*parts, strict=True))
    lengths = torch.tensor([len(own) for own, _ in parts])
    prompts = torch.tensor([own.tolist().index(SEPARATOR) + 1 for own, _ in parts])
    conditions = conditions or [Condition(i % 3, i % 8, i % 2, 0, i % 3) for i in range(len(parts))]
    return SimpleNamespace(
        tokens=tokens,
        positions=positions,
        row=torch.arange(len(parts)).repeat_interleave(lengths),
        conditions=torch.tensor(conditions),
        lengths=lengths.tolist(),
        prompts=prompts,
        offsets=F.pad(lengths.cumsum(0), (1, 0)).int(),
    )


def logits_of(trunk, given, whole=False):
    condition = trunk.condition(given.conditions)[given.row]
    prompts = None if whole else given.prompts
    seen = spans(given.offsets, max(given.lengths), torch.float32, prompts)
    return trunk.logits(trunk.hidden(trunk.embed(given.tokens, condition), given.positions, seen))


def pairs(count=3, seed=0):
    rng = np.random.default_rng(seed)
    sides = rng.integers(1, 6, (count, 4))
    return [Pair(random_grid(rng, a, b), random_grid(rng, c, d)) for a, b, c, d in sides.tolist()]


class Rotary(nn.Module):
    """The trunk's tables where transformers' LLaMA has its own."""

    def __init__(self, trunk):
        super().__init__()
        self.rotary = trunk.rotary

    def forward(self, x, position_ids):
        cos, sin = self.rotary(position_ids[0])
        return cos[None, :, 0], sin[None, :, 0]


def llama_of(trunk):
    """transformers' own model, with the weights of each loop as layers of their own."""
    config = trunk.config
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=config.inner_size,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            tie_word_embeddings=False,
            rms_norm_eps=EPS,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    plain.load_state_dict(llama_state(trunk))
    plain.model.rotary_emb = Rotary(trunk)
    plain.set_attn_implementation("eager")
    return plain


def plain_logits(plain, trunk, given):
    """Logits of one sequence by transformers' layers, what is injected added before each."""
    mask = prefix_mask(len(given.tokens), int(given.prompts[0]))[None, None]
    mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    embedded = plain.model.embed_tokens(given.tokens)[None]
    x = embedded + trunk.condition(given.conditions)
    if not trunk.config.injection:
        places = {"position_ids": given.positions[None], "attention_mask": mask}
        return plain(inputs_embeds=x, **places).logits[0]
    source = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    turn = plain.model.rotary_emb(x, given.positions[None])
    for layer, matrix in zip(plain.model.layers, trunk.injections.layers, strict=True):
        x = x + source @ matrix.weight.T
        x = layer(x, position_embeddings=turn, attention_mask=mask)
    return plain.lm_head(plain.model.norm(x))[0]


@pytest.mark.parametrize("config", [CONFIG, LOOPED, INJECTED], ids=["once", "looped", "injected"])
def test_forward_and_gradient_are_those_of_transformers_llama(config):
    """Each pass of a loop is a layer there, so the gradient here is the sum over passes."""
    trunk, given = new_trunk(config), batch(pairs(1))
    plain = llama_of(trunk)
    weight = torch.randn(len(given.tokens), VOCABULARY)
    ours, theirs = logits_of(trunk, given), plain_logits(plain, trunk, given)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    (ours * weight).sum().backward()
    own = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad()
    (theirs * weight).sum().backward()
    found = {name: p.grad for name, p in plain.named_parameters()}

    def layers(name):
        return (f"model.layers.{i}.{name}.weight" for i in range(config.depth))

    expected = {"embed_tokens": found["model.embed_tokens.weight"]}
    expected["norm"], expected["head.weight"] = found["model.norm.weight"], found["lm_head.weight"]
    joined = {
        "qkv_proj.weight": [f"self_attn.{x}_proj" for x in "qkv"],
        "o_proj.weight": ["self_attn.o_proj"],
        "gate_up_proj.weight": ["mlp.gate_proj", "mlp.up_proj"],
        "down_proj.weight": ["mlp.down_proj"],
        "input_norm": ["input_layernorm"],
        "post_norm": ["post_attention_layernorm"],
    }
    for name, theirs_of in joined.items():
        each = [torch.stack([found[own] for own in layers(one)]) for one in theirs_of]
        for number in range(config.num_layers):
            passes = [grads[number :: config.num_layers].sum(0) for grads in each]
            expected[f"layers.{number}.{name}"] = torch.cat(passes)
    if config.injection:
        named = trunk.injections.named_parameters()
        expected |= {f"injections.{name}": p.grad for name, p in named}
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(own[name], gradient, atol=2e-5 * max(1, scale), rtol=2e-5)


def test_injection_begins_with_nothing_and_every_pass_learns_its_own():
    torch.manual_seed(0)
    fresh, without = Trunk(INJECTED, 3), Trunk(LOOPED, 3)
    found = without.load_state_dict(fresh.state_dict(), strict=False)
    assert not found.missing_keys
    given = batch(pairs(2), [Condition()] * 2)
    ours, plain = logits_of(fresh, given), logits_of(without, given)
    assert torch.equal(ours, plain)
    ours.square().sum().backward()
    assert all(matrix.weight.grad.abs().sum() > 0 for matrix in fresh.injections.layers)


def test_names_and_shapes_are_those_of_the_checkpoint():
    shapes = {name: tuple(t.shape) for name, t in new_trunk().state_dict().items()}
    inner = INJECTED.inner_size
    block = {
        "qkv_proj.weight": (96, 32),
        "o_proj.weight": (32, 32),
        "gate_up_proj.weight": (2 * inner, 32),
        "down_proj.weight": (32, inner),
        "input_norm": (32,),
        "post_norm": (32,),
    }
    expected = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {f"injections.layers.{i}.weight": (32, 32) for i in range(6)}
    expected |= {"embed_tokens": (16, 32), "norm": (32,), "head.weight": (16, 32)}
    expected |= {"own_head.weight": (10, 32), "halt_head.weight": (1, 32), "halt_head.bias": (1,)}
    expected |= {"feedback.layers.0.weight": (32, 32), "voice_emb": (32,), "own_task_emb": (3, 32)}
    expected |= {"task_emb": (3, 32), "inverse_emb": (3, 32), "dihedral_emb": (8, 32)}
    expected |= {"colours_emb": (2, 32), "scale_emb": (2, 32)}
    assert shapes == expected


@pytest.mark.parametrize("whole", [False, True], ids=["prefix", "whole"])
def test_what_a_sequence_gives_does_not_depend_on_those_beside_it(whole):
    trunk, all_pairs = new_trunk(), pairs(5)
    conditions = [Condition(i % 3, i % 8, i % 2, i % 2, i % 3) for i in range(5)]
    together = logits_of(trunk, batch(all_pairs, conditions), whole)
    parts = together.split(batch(all_pairs).lengths)
    for pair, condition, own in zip(all_pairs, conditions, parts, strict=True):
        alone = logits_of(trunk, batch([pair], [condition]), whole)
        torch.testing.assert_close(own, alone, atol=2e-5, rtol=2e-5)


def test_outputs_see_what_is_before_them_and_inputs_see_each_other():
    trunk, (pair,) = new_trunk(), pairs(1, seed=3)
    given = batch([pair])
    before, prompt = logits_of(trunk, given), int(given.prompts[0])

    def changed(place):
        other = batch([pair])
        other.tokens[place] = (other.tokens[place] + 1) % 10
        return (logits_of(trunk, other) - before).abs().amax(1) > 1e-7

    cell = prompt + 1
    assert changed(cell).nonzero()[:, 0].tolist() == list(range(cell, len(given.tokens)))
    assert changed(prompt - 3).all()  # a cell of the input


def test_in_the_whole_form_every_token_sees_every_other():
    trunk, given = new_trunk(), batch(pairs(1, seed=3))
    before = logits_of(trunk, given, whole=True)
    given.tokens[-3] = (given.tokens[-3] + 1) % 10
    assert ((logits_of(trunk, given, whole=True) - before).abs().amax(1) > 1e-7).all()


def test_column_row_and_part_turn_angles_of_their_own():
    trunk = new_trunk(CONFIG.model_copy(update={"num_heads": 1}))
    places = [pack_position(*p) for p in ((0,), (0, 0, 1), (0, 1), (1,))]
    cos, sin = trunk.rotary(torch.tensor(places))
    assert cos.shape == sin.shape == (4, 1, 32)
    changed = (cos[1:, 0] != cos[:1, 0])[:, :16]
    assert changed.sum(1).tolist() == [6, 6, 4]
    assert changed.sum(0).tolist() == [1] * 16
    assert torch.equal(cos[..., :16], cos[..., 16:])


def test_attention_depends_on_distances_only():
    """A grid moved down and to the right, with everything that sees it, is read alike."""
    trunk, (pair,) = new_trunk(CONFIG), pairs(1, seed=1)
    given = batch([pair])
    before = logits_of(trunk, given)
    given.positions = given.positions + pack_position(4, 7, 9)
    torch.testing.assert_close(logits_of(trunk, given), before, atol=2e-5, rtol=2e-5)


def test_the_condition_is_the_sum_of_its_vectors():
    trunk = new_trunk()
    rows = torch.tensor([Condition(2, 5, 1, 0, 0), Condition(2, 5, 1, 1, 2)])
    both = trunk.dihedral_emb[5] + trunk.colours_emb[1]
    expected = [trunk.task_emb[2] + both, trunk.inverse_emb[2] + both + trunk.scale_emb[1]]
    torch.testing.assert_close(trunk.condition(rows), torch.stack(expected))
    plain = new_trunk(scales=0)
    assert plain.condition(rows[:1]).shape == (1, 32)
    trunk.condition(rows).sum().backward()
    assert trunk.task_emb.grad.abs().sum(1).nonzero().tolist() == [[2]]


def test_ids_and_distributions_are_embedded_alike_with_and_without_gradient():
    trunk, condition = new_trunk(), torch.randn(5, 32)
    ids = torch.tensor([0, 3, 15, 3, 9])
    with torch.no_grad():
        expected = trunk.embed(ids, condition)
    torch.testing.assert_close(trunk.embed(ids, condition), expected)
    torch.testing.assert_close(trunk.embed(F.one_hot(ids, 16).float(), condition), expected)
    trunk.embed(ids, condition).sum().backward()
    assert trunk.embed_tokens.grad[3].tolist() == [2.0] * 32


def test_logits_of_the_choices_are_those_of_their_tokens():
    trunk, hidden = new_trunk(), torch.randn(4, 32)
    found = trunk.grid_logits(hidden)
    torch.testing.assert_close(found, trunk.logits(hidden)[:, list(CHOICES)])
    assert found.dtype == torch.float32


def test_activations_computed_anew_give_the_same_gradient():
    gradients = []
    for anew in (False, True):
        trunk = new_trunk(INJECTED.model_copy(update={"gradient_checkpointing": anew}))
        logits_of(trunk, batch(pairs(2))).square().sum().backward()
        gradients.append({n: p.grad for n, p in trunk.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_layers_of_trms_own_are_used_in_its_passes_only():
    given, results = batch(pairs(2)), []
    plain, trunk = new_trunk(), new_trunk(INJECTED.model_copy(update={"own_layers": 1}))
    trunk.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(logits_of(trunk, given), logits_of(plain, given))
    seen = spans(given.offsets, max(given.lengths), torch.float32)
    x = trunk.embed(given.tokens, trunk.condition(given.conditions)[given.row])
    for begun in (False, True):
        if begun:
            trunk.begin_trm()
        results.append(trunk.hidden(x, given.positions, seen, own=True))
    expected = plain.hidden(x, given.positions, seen, own=True)
    torch.testing.assert_close(results[1], expected)
    assert (results[0] - expected).norm() > 0.1 * expected.norm()
    (gradient,) = torch.autograd.grad(
        trunk.hidden(x, given.positions, seen, own=True).sum(),
        trunk.layers[-1].o_proj.weight,
        allow_unused=True,
    )
    assert gradient is None


def test_a_cast_copy_is_frozen_and_computes_in_its_dtype():
    trunk, given = new_trunk(), batch(pairs(2))
    before = logits_of(trunk, given).detach()
    same, narrow = trunk.cast(torch.float32), trunk.cast(torch.bfloat16)
    assert torch.equal(logits_of(same, given), before)
    assert not any(p.requires_grad for one in (same, narrow) for p in one.parameters())
    assert same.layers[0].o_proj.weight.data_ptr() == trunk.layers[0].o_proj.weight.data_ptr()
    assert narrow.layers[0].o_proj.weight.dtype == narrow.dtype == torch.bfloat16
    assert narrow.task_emb.dtype == torch.float32
    found = logits_of(narrow, given)
    assert found.dtype == torch.float32
    assert ((found - before).norm() / before.norm()) < 0.05
    trunk.layers[0].o_proj.weight.data.zero_()
    assert torch.equal(logits_of(narrow, given), found)
    assert trunk.dtype == torch.float32
    assert all(p.requires_grad for p in trunk.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("tiled", [False, True], ids=["flex", "tiles"])
def test_compiled_blocks_by_spans_are_the_plain_ones_with_gradient(tiled):
    if tiled and not has_tiles(torch.device("cuda"), torch.bfloat16, 64):
        pytest.skip("not measured on this GPU, or no Triton")
    config = INJECTED.model_copy(update={"hidden_size": 128}) if tiled else INJECTED
    given, results = batch(pairs(6)), []
    tokens, positions = given.tokens.cuda(), given.positions.cuda()
    for compiled in (False, True):
        trunk = new_trunk(config).cuda()
        if compiled:
            trunk.dtype = torch.bfloat16
            trunk.compile_blocks()
            offsets, prompts = given.offsets.cuda(), given.prompts.cuda()
            longest = max(given.lengths)
            seen = block_spans(
                offsets, len(tokens), longest, prompts, kernel="tiles" if tiled else "flex"
            )
        else:
            seen = spans(given.offsets.cuda(), 100, torch.float32, given.prompts.cuda())
        condition = trunk.condition(given.conditions.cuda())[given.row.cuda()]
        logits = trunk.logits(trunk.hidden(trunk.embed(tokens, condition), positions, seen))
        logits.square().mean().backward()
        results.append([logits.detach(), trunk.layers[1].qkv_proj.weight.grad])
    for exact, rounded in zip(*results, strict=True):
        assert ((rounded.float() - exact).norm() / exact.norm()) < 0.1
