"""Hub readers: every architecture computes what transformers computes, trained or not."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from arctrm.config import HubConfig
from arctrm.data.task import Pair
from arctrm.errors import ConfigError
from arctrm.model.layout import PREFIX, output_tokens
from arctrm.reader import grammar
from arctrm.reader.decoding import decode
from arctrm.reader.hub import RoomyLayer, halve_linear_layers, with_soft
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.scoring import score
from helpers import random_grid
from hub_models import ARCHITECTURES, WIDTH, save_model

RNG = np.random.default_rng(0)
SIDE, BOUND = 5, 31
QUERIES = [random_grid(RNG, 3, n) for n in (1, 3, 2)]
PAIRS = [[Pair(random_grid(RNG, n, n + 1), random_grid(RNG, 2, n))] * n for n in (1, 3, 2)]
ANSWERS = [random_grid(RNG, 2, 3), random_grid(RNG, 1, 1), random_grid(RNG, 4, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of models, made once each: `folder(architecture)`."""
    made = {}

    def get(architecture="llama", **options):
        key = (architecture, *options.items())
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("model"), architecture, **options)
        return made[key]

    return get


def load(path, **options):
    return load_hub_reader(HubConfig(name=str(path), **options), torch.device("cpu"))


def prompts_of(reader):
    return [reader.prompt(q, pairs=pairs) for q, pairs in zip(QUERIES, PAIRS, strict=True)]


def sequences(reader, soft=0):
    """Prompts and answers in tokens of the layout, packed, and their offsets."""
    parts = [
        np.concatenate((p.layout, np.full(soft, PREFIX), output_tokens(a.shape, a)[0]))
        for p, a in zip(prompts_of(reader), ANSWERS, strict=True)
    ]
    ends = np.cumsum([0, *(len(part) for part in parts)])
    return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(ends)


@torch.no_grad()
def plain_logits(path, tokens, device_map=None):
    """transformers' own forward pass over one prompt, alone and without a cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(input_ids=torch.as_tensor(tokens)[None], use_cache=False).logits[0]


def near(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_store_and_packed_sequences_give_the_logits_of_each_sequence_alone(architecture, folder):
    path = folder(architecture)
    reader = load(path)
    prompts, spelled = prompts_of(reader), grammar.spell(ANSWERS)
    assert max(len(prompt.tokens) for prompt in prompts) > 32  # beyond the sliding windows
    store = reader.store(prompts, [BOUND] * 3)
    first, rest = store.read(), store.append(spelled.grid, spelled.choices, spelled.states)
    packed = reader.grid_logits(reader.run_packed(*sequences(reader)))
    for row, (prompt, end) in enumerate(zip(prompts, sequences(reader)[1][1:], strict=True)):
        ids = reader.choices[spelled.choices[spelled.grid == row]]
        whole = plain_logits(path, np.concatenate((prompt.tokens, ids)))[:, reader.choices]
        near(first[row], whole[len(prompt.tokens) - 1])
        near(rest[spelled.grid == row], whole[len(prompt.tokens) :])
        near(packed[end - len(ids) - 1 : end], whole[len(prompt.tokens) - 1 :])


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_grids_are_decoded_and_scored_as_the_forward_pass_counts_them(architecture, folder):
    path = folder(architecture)
    reader = load(path)
    prompts = prompts_of(reader)
    sampled = decode(reader, prompts * 3, mode="sampled", max_output_tokens=BOUND, max_side=SIDE)
    greedy = decode(reader, prompts, max_output_tokens=BOUND, max_side=SIDE)
    for prompt, among in zip(prompts, greedy, strict=True):
        [alone] = decode(reader, [prompt], max_output_tokens=BOUND, max_side=SIDE)
        assert alone.choices == among.choices
    done = [
        (p, d) for p, d in zip(prompts * 4, sampled + greedy, strict=True) if d.grid is not None
    ]
    candidates = [[d.grid, ANSWERS[0], ANSWERS[1]] for _, d in done]
    scores = score(reader, [p for p, _ in done], candidates, max_side=SIDE)
    for (prompt, decoded), grids, own in zip(done, candidates, scores, strict=True):
        assert own[0] == pytest.approx(decoded.log_probability, abs=1e-3)
        choices, state = grammar.encode_choices(grids[1])
        ids = np.concatenate((prompt.tokens, reader.choices[torch.from_numpy(choices)]))
        logits = plain_logits(path, ids)[len(prompt.tokens) - 1 : -1, reader.choices]
        log_p = grammar.log_probabilities(logits, state, SIDE)
        expected = float(log_p.gather(1, torch.from_numpy(choices)[:, None]).sum())
        assert own[1] == pytest.approx(expected, abs=1e-3)


def test_rows_may_be_uneven_rewound_given_up_and_equal(folder):
    reader = load(folder())
    prompts = [prompts_of(reader)[i] for i in (0, 1, 0, 2)]
    grids = [ANSWERS[0], ANSWERS[2], ANSWERS[1], ANSWERS[0]]
    expected = {}
    for row, (prompt, grid) in enumerate(zip(prompts, grids, strict=True)):
        alone, spelled = reader.store([prompt], [BOUND]), grammar.spell([grid])
        expected[row] = [alone.read()[0]]
        expected[row] += alone.append(spelled.grid, spelled.choices, spelled.states)
    store, spelled = reader.store(prompts, [BOUND] * 4), grammar.spell(grids)
    near(store.read(), torch.stack([expected[row][0] for row in range(4)]))

    def append(row, begin, end):
        own = (spelled.grid == row).nonzero()[begin:end, 0]
        states = spelled.states.index_select(own)
        logits = store.append(torch.full_like(own, row), spelled.choices[own], states)
        near(logits, torch.stack(expected[row][begin + 1 : begin + 1 + len(own)]))

    append(1, 0, 5)
    append(0, 0, 3)
    store.rewind(1, 2)
    append(1, 2, 9)
    store.rewind(1, 0)
    store.rewind(0, 1)
    append(0, 1, 4)
    store.release([1, 2])
    append(3, 0, 4)
    append(0, 4, 6)


def test_logits_of_all_tokens_are_those_of_the_model(folder):
    for architecture in ("llama", "gemma2"):  # which caps its logits
        reader = load(folder(architecture))
        prompt = prompts_of(reader)[1]
        hidden = reader.run(*reader.padded([prompt]))
        assert hidden.dtype == torch.float32
        near(reader.logits(hidden)[0], plain_logits(folder(architecture), prompt.tokens))
        near(reader.grid_logits(hidden), reader.logits(hidden)[..., reader.choices])
        near(reader.run(*reader.padded([prompt])), hidden)  # all is as before


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_soft_prefix_is_read_packed_as_behind_a_prompt(architecture, folder):
    reader = load(folder(architecture))
    tokens, offsets = sequences(reader, soft=2)
    vectors = torch.randn(3, 2, WIDTH)
    soft = torch.zeros(len(tokens), WIDTH)
    soft[tokens == PREFIX] = vectors.flatten(0, 1)
    packed = reader.run_packed(tokens, offsets, soft)
    lengths = [grammar.num_tokens(answer) for answer in ANSWERS]
    last = reader.last_states(with_soft(prompts_of(reader), vectors), [(), (), ()])
    near(packed[offsets[1:] - torch.tensor(lengths) - 1], last)


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="needs an x86 CPU"
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without and with biases
def test_linear_layers_of_half_the_size_give_the_same_but_for_rounding(architecture, folder):
    reader = load(folder(architecture))
    before = reader.store(prompts_of(reader), [BOUND] * 3).read()
    halve_linear_layers(reader)
    after = reader.store(prompts_of(reader), [BOUND] * 3).read()
    near(after, before, 2e-2)
    assert not torch.equal(after, before)
    layers = reader.model.get_decoder().modules()
    assert all(m.weight is None for m in layers if type(m) is torch.nn.Linear)


def test_a_cache_with_free_places_holds_what_was_appended_row_by_row():
    layer, new = RoomyLayer(), torch.randn(3, 2, 400, 8)
    for begin, end in ((0, 5), (5, 6), (6, 300), (300, 400)):
        keys, values = layer.update(new[:, :, begin:end], -new[:, :, begin:end])
        assert torch.equal(keys, new[:, :, :end])
        assert torch.equal(values, -new[:, :, :end])
    layer.keys, layer.values = keys[:, :, :2], values[:, :, :2]
    layer.reorder_cache(torch.tensor([2, 0]))
    keys, _ = layer.update(new[:2, :, 7:8], new[:2, :, 7:8])
    assert torch.equal(keys, torch.cat((new[[2, 0], :, :2], new[:2, :, 7:8]), 2))


def test_a_prompt_leaves_room_for_the_largest_grid_unless_bounded(folder):
    assert load(folder()).max_prompt_tokens == 1024 // 2  # 931 tokens would leave almost nothing
    assert load(folder(max_position_embeddings=4096)).max_prompt_tokens == 4096 - 931
    assert load(folder(), max_tokens=100).max_prompt_tokens == 100


def test_a_frozen_reader_has_nothing_to_train_and_stays_in_evaluation_mode(folder):
    reader = load(folder())
    assert not list(reader.parameters())
    assert not reader.state_dict()
    assert not reader.train().model.training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_gradients_reach_the_soft_prefix_and_what_is_trained(mode, checkpointing, folder):
    reader = load(folder(), mode=mode, gradient_checkpointing=checkpointing).train()
    for name, parameter in reader.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zero at first, which keeps gradient from lora_A
    tokens, offsets = sequences(reader, soft=1)
    soft = torch.randn(len(tokens), WIDTH, requires_grad=True)
    reader.grid_logits(reader.run_packed(tokens, offsets, soft)).logsumexp(-1).sum().backward()
    assert ((soft.grad.norm(dim=1) > 0) == (tokens == PREFIX)).all()
    trained = dict(reader.named_parameters())
    assert bool(trained) == (mode != "frozen")
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trained.values())
    assert all(("lora_" in name) == (mode == "lora") for name in trained)


def test_lora_starts_at_the_model_and_its_state_goes_over_to_another(folder):
    frozen, trained, fresh = (load(folder(), mode=mode) for mode in ("frozen", "lora", "lora"))
    before = frozen.run_packed(*sequences(frozen))
    near(trained.run_packed(*sequences(frozen)), before, 1e-6)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = trained.run_packed(*sequences(frozen))
    assert not torch.allclose(after, before)
    fresh.load_state_dict(trained.state_dict())
    near(fresh.run_packed(*sequences(frozen)), after, 1e-6)


def test_lora_targets_are_the_layers_named_and_wrong_names_are_refused(folder):
    assert len(load(folder(), mode="lora", lora_targets=("q_proj",)).state_dict()) == 2 * 2
    assert not any("lm_head" in name for name in load(folder(), mode="lora").state_dict())
    with pytest.raises(ConfigError, match=r"hub.lora_targets = \['query'\] .* not found"):
        load(folder(), mode="lora", lora_targets=("query",))


@pytest.mark.parametrize(("architecture", "mode"), [("llama", "full"), ("mixtral", "lora")])
def test_a_trainable_copy_says_the_same_until_one_of_the_two_is_changed(architecture, mode, folder):
    reader = load(folder(architecture), mode=mode)
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = sequences(reader)
    before = reader.run_packed(*tokens).detach()
    reader.requires_grad_(False)  # as when it is loaded to answer
    copy = reader.trainable_copy()
    near(copy.run_packed(*tokens).detach(), before, 1e-6)
    copy.grid_logits(copy.run_packed(*tokens)).square().mean().backward()
    assert copy.state_dict().keys() == reader.state_dict().keys()
    with torch.no_grad():
        for parameter in copy.parameters():
            assert parameter.grad is not None
            parameter.mul_(1.5)
    assert not torch.allclose(copy.run_packed(*tokens), before)
    near(reader.run_packed(*tokens), before, 1e-6)
    assert all(p.grad is None for p in reader.model.parameters())


def test_embeddings_that_are_also_the_head_stay_one_in_a_copy(tmp_path):
    copy = load(save_model(tmp_path, tie_word_embeddings=True), mode="full").trainable_copy()
    model = copy.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "pretrained.lm_head.weight" not in copy.state_dict()
