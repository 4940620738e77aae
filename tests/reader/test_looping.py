"""Looped layers: few weights, many passes, each with a place in a cache of its own."""

import copy

import pytest
import torch

from arctrm.config import ReaderConfig
from arctrm.reader.interface import left_padded
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import prompt
from arctrm.trm.model import count_parameters

CONFIG = ReaderConfig(hidden_size=32, num_layers=2, num_heads=2, loops=3, input_attention="full")
CONDITION = (1, 2, 0)


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return TinyReader(CONFIG, 3)


def cached_logits(reader):
    """Logits of one prompt through transformers' cache, and the cache."""
    asked = [prompt((), torch.arange(6, dtype=torch.uint8).view(2, 3).numpy(), CONDITION)]
    tokens, positions, mask = left_padded(asked)
    cache = reader.new_cache(tokens.shape[1] + 4)
    condition = torch.tensor([CONDITION])
    return reader.logits(tokens, positions, condition, mask, cache), cache


def test_the_weights_are_those_of_one_time(reader):
    once = TinyReader(CONFIG.model_copy(update={"loops": 1}), 3)
    assert reader.state_dict().keys() == once.state_dict().keys()
    assert count_parameters(reader) == count_parameters(once)
    assert [name for name, _ in reader.named_parameters()] == [
        name for name, _ in once.named_parameters()
    ]


def test_only_the_layers_that_are_kept_are_built(reader):
    """More would take time, and turn the random numbers of everything that comes after them."""
    torch.manual_seed(0)
    once = TinyReader(CONFIG.model_copy(update={"loops": 1}), 3).state_dict()
    for name, tensor in reader.state_dict().items():
        assert torch.equal(tensor, once[name]), name


def test_transformers_sees_every_pass(reader):
    """It runs as many layers, and makes room in a cache for as many, as its configuration says."""
    assert reader.llama.model.config.num_hidden_layers == CONFIG.depth
    assert len(reader.new_cache(8).layers) == CONFIG.depth


def test_there_are_as_many_passes_as_layers_times_loops(reader):
    assert len(reader.layers) == CONFIG.depth == 6
    assert reader.layers.passes == reader.layers.trained * 3
    slots = [layer.self_attn.layer_idx for layer in reader.layers]
    assert slots == [0, 1, 2, 3, 4, 5]
    assert [layer.self_attn.layer_idx for layer in reader.layers[:2]] == [0, 1]


def test_every_pass_has_keys_of_its_own(reader):
    _, cache = cached_logits(reader)
    keys = [layer.keys for layer in cache.layers]
    assert len(keys) == 6
    assert all(key.abs().sum() > 0 for key in keys)
    assert not torch.equal(keys[0], keys[2])


def test_layers_compiled_for_training_leave_the_cache_as_it_was(reader):
    expected, _ = cached_logits(reader)
    reader.compile_layers()
    found, cache = cached_logits(reader)
    assert torch.equal(found, expected)
    assert all(layer.keys.abs().sum() > 0 for layer in cache.layers)


def test_a_copy_that_is_given_other_weights_uses_them_in_every_pass(reader):
    torch.manual_seed(1)
    other = TinyReader(CONFIG, 3)
    twin = copy.deepcopy(reader)
    twin.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(cached_logits(twin)[0], cached_logits(other)[0])
    assert not torch.equal(cached_logits(reader)[0], cached_logits(other)[0])
