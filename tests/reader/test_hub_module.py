"""A trainable copy of a hub reader: parameters of its own in a model that is there once."""

import pytest
import torch
from hub_models import ARCHITECTURES, save_model
from torch import nn

from arctrm.config import ReaderConfig
from arctrm.config.reader_hub import HubReaderConfig
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.hub_module import HubModule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A module around a small random model: `loaded(architecture, mode, **hub)`."""
    folders = {}

    def load(architecture="llama", mode="lora", **hub) -> HubModule:
        if architecture not in folders:
            folders[architecture] = save_model(tmp_path_factory.mktemp("model"), architecture)
        config = HubReaderConfig(name=str(folders[architecture]), mode=mode, lora_rank=4, **hub)
        module = HubModule(load_hub_reader(config, CPU), ReaderConfig())
        with torch.no_grad():  # LoRA begins as a product with zero
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        return module

    return load


def said(module, grad=False):
    tokens = torch.arange(10, 22).view(1, -1)
    with torch.set_grad_enabled(grad):
        hidden = module.hub.run(tokens, torch.arange(12)[None], torch.ones_like(tokens))
        return module.hub.head(hidden)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_says_the_same_until_one_of_the_two_is_changed(loaded, architecture, mode):
    module = loaded(architecture, mode)
    before = said(module)
    module.requires_grad_(False)  # as when it is loaded to answer
    copy = module.trainable_copy()
    assert torch.equal(said(copy), before)
    said(copy, grad=True).square().mean().backward()
    learned = dict(copy.named_parameters())
    assert learned.keys() == dict(module.named_parameters()).keys()
    for name, parameter in learned.items():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None, name
    with torch.no_grad():
        for parameter in learned.values():
            parameter.mul_(1.5)
    assert not torch.equal(said(copy), before)
    assert torch.equal(said(module), before)
    assert all(p.grad is None for p in module.hub.model.parameters())


def test_a_frozen_module_is_its_own_copy(loaded):
    module = loaded(mode="frozen")
    assert module.trainable_copy() is module


def test_embeddings_that_are_also_the_head_stay_one(tmp_path):
    folder = save_model(tmp_path, tie_word_embeddings=True)
    config = HubReaderConfig(name=str(folder), mode="full")
    copy = HubModule(load_hub_reader(config, CPU), ReaderConfig()).trainable_copy()
    model = copy.hub.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in copy.pretrained.state_dict()


def test_a_copy_with_gradient_checkpointing_has_the_same_gradient(loaded):
    found = []
    for flag in (False, True):
        copy = loaded(mode="full", gradient_checkpointing=flag).trainable_copy()
        assert bool(copy.hub._checkpointed) == flag
        assert {id(m) for m in copy.hub._checkpointed} <= {id(m) for m in copy.hub.model.modules()}
        said(copy, grad=True).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in copy.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
