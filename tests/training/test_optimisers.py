"""Muon sees the matrices of the blocks one by one; AdamW everything else."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from arctrm.config import OptimiserConfig, TRMConfig
from arctrm.training.optimisers import EMA, FlatGradients, Optimisers
from arctrm.trm.model import TRM

CONFIG = OptimiserConfig(muon_lr=0.02, adamw_lr=0.01, weight_decay=0.1)
NUM_PARTS = {"qkv_proj": 3, "o_proj": 1, "gate_up_proj": 2, "down_proj": 1}


def new_model(num_layers=1):
    torch.manual_seed(0)
    config = TRMConfig(hidden_size=16, num_heads=2, num_layers=num_layers)
    return TRM(config, 3)


def fill(gradients, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients.flat.copy_(torch.randn(gradients.flat.shape, generator=generator))


def is_matrix(name):
    return ".layers." in name


def test_every_gradient_is_a_view_of_one_buffer():
    model = new_model()
    parameters = list(model.parameters())
    gradients = FlatGradients(parameters)
    assert gradients.flat.numel() == sum(p.numel() for p in parameters)
    fill(gradients, 0)
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters]), gradients.flat)
    (model.lm_head.weight.sum() * 2).backward()
    assert gradients.flat.data_ptr() == parameters[0].grad.data_ptr()
    gradients.zero()
    assert not any(p.grad.any() for p in parameters)


def test_backward_adds_into_the_buffer():
    p = nn.Parameter(torch.ones(3))
    gradients = FlatGradients([p])
    for _ in range(2):
        (p * 2).sum().backward()
    assert gradients.flat.tolist() == [4.0] * 3


def test_clipping_scales_to_the_norm_and_leaves_a_small_gradient_alone():
    p = nn.Parameter(torch.zeros(2))
    gradients = FlatGradients([p])
    gradients.flat.copy_(torch.tensor([3.0, 4.0]))
    gradients.clip(10.0)
    assert gradients.flat.tolist() == pytest.approx([3.0, 4.0])
    gradients.clip(1.0)
    assert gradients.flat.tolist() == pytest.approx([0.6, 0.8], rel=1e-4)


def test_muon_gets_each_projection_alone_and_adamw_all_the_rest():
    model = new_model(num_layers=2)
    FlatGradients(list(model.parameters()))
    optimisers = Optimisers(model, CONFIG)
    muon = optimisers.all["muon"].param_groups[0]["params"]
    adamw = optimisers.all["adamw"].param_groups[0]["params"]
    one_layer = [(16, 16)] * 3 + [(16, 16)] + [(256, 16)] * 2 + [(16, 256)]
    assert sorted(tuple(p.shape) for p in muon) == sorted(one_layer * 2)
    others = {id(p) for name, p in model.named_parameters() if not is_matrix(name)}
    assert {id(p) for p in adamw} == others
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in (*muon, *adamw)) == total


def test_the_separate_matrices_share_storage_with_the_fused_one():
    model = new_model()
    FlatGradients(list(model.parameters()))
    muon = Optimisers(model, CONFIG).all["muon"].param_groups[0]["params"]
    qkv = dict(model.named_parameters())["L_level.layers.0.self_attn.qkv_proj.weight"]
    own = {p.data_ptr(): p for p in muon}
    for part in range(3):
        matrix = own[qkv[16 * part].data_ptr()]
        assert matrix.shape == (16, 16)
        assert matrix.grad.data_ptr() == qkv.grad[16 * part].data_ptr()


def test_steps_equal_torchs_muon_and_adamw_on_separately_held_parameters():
    model = new_model()
    gradients = FlatGradients(list(model.parameters()))
    optimisers = Optimisers(model, CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = {
        name: [nn.Parameter(part.clone()) for part in p.detach().chunk(parts_of(name))]
        for name, p in model.named_parameters()
    }
    matrices = [p for name, parts in held.items() if is_matrix(name) for p in parts]
    others = [p for name, parts in held.items() if not is_matrix(name) for p in parts]
    muon = Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95)
    adamw = AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(3):
        fill(gradients, seed)
        for name, p in model.named_parameters():
            for part, grad in zip(held[name], p.grad.chunk(parts_of(name)), strict=True):
                part.grad = grad.clone()
        optimisers.step(1.0)
        muon.step()
        adamw.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), torch.cat([x.detach() for x in held[name]]))
        assert not torch.equal(p, before[name]), name


def parts_of(name):
    return next((n for key, n in NUM_PARTS.items() if f".{key}." in name), 1)


def test_adamw_alone_takes_everything():
    model = new_model()
    FlatGradients(list(model.parameters()))
    optimisers = Optimisers(model, OptimiserConfig(kind="adamw"))
    assert list(optimisers.all) == ["adamw"]
    assert len(optimisers.all["adamw"].param_groups[0]["params"]) == len(list(model.parameters()))


def test_the_factor_scales_both_peaks_and_zero_moves_nothing():
    model = new_model()
    gradients = FlatGradients(list(model.parameters()))
    optimisers = Optimisers(model, CONFIG)
    fill(gradients, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimisers.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimisers.step(0.25)
    rates = {name: o.param_groups[0]["lr"] for name, o in optimisers.all.items()}
    assert rates == pytest.approx({"muon": 0.005, "adamw": 0.0025})


def test_the_average_warms_up_and_then_decays_as_asked():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    ema = EMA(layer, decay=0.5)
    expected, value = 0.0, 0.0
    for step in range(1, 20):
        value += 1.0
        with torch.no_grad():
            layer.weight.fill_(value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.state()["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert layer.weight.item() == value  # the weights themselves are not touched
    assert expected < value - 0.5


def test_the_average_is_restored_as_it_was():
    model = new_model()
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    ema.update(1)
    saved = {name: average.clone() for name, average in ema.state().items()}
    assert set(saved) == {name for name, _ in model.named_parameters()}
    other = EMA(new_model(), 0.9)
    other.load(saved)
    assert all(torch.equal(other.state()[name], saved[name]) for name in saved)
