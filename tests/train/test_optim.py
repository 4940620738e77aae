"""Muon sees the matrices of the layers one by one and moves as torch's; AdamW takes the rest."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from arctrm.config import OptimiserConfig, TrunkConfig
from arctrm.errors import CheckpointError
from arctrm.model.trunk import Trunk
from arctrm.train.optim import EMA, FlatGradients, Optimisers, Update, trained_parameters

CONFIG = OptimiserConfig(muon_lr=0.02, adamw_lr=0.01, weight_decay=0.1)
NUM_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}


def new_model(device="cpu"):
    torch.manual_seed(0)
    trunk = Trunk(TrunkConfig(hidden_size=16, num_heads=2, num_layers=2, loops=1), 3)
    return nn.ModuleDict({"trunk": trunk}).to(device)


def new_update(device="cpu", clip_norm=1.0, config=CONFIG, **options):
    trained = trained_parameters(new_model(device))
    gradients = FlatGradients(trained)
    return Update(gradients, Optimisers(trained, config), EMA(trained, 0.9), clip_norm, **options)


def fill(gradients, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients.flat.copy_(torch.randn(gradients.flat.shape, generator=generator))


def is_matrix(name):
    return ".layers." in name and not name.endswith("norm")


def parts_of(name):
    return next((n for key, n in NUM_PARTS.items() if key in name), 1)


def test_every_gradient_is_a_view_of_one_buffer_that_backward_adds_to():
    trained = trained_parameters(new_model())
    gradients = FlatGradients(trained)
    assert gradients.flat.numel() == sum(p.numel() for p in trained.values())
    fill(gradients, 0)
    assert torch.equal(torch.cat([p.grad.flatten() for p in trained.values()]), gradients.flat)
    gradients.zero()
    for _ in range(2):
        (trained["trunk.norm"].sum() * 2).backward()
    assert trained["trunk.norm"].grad.tolist() == [4.0] * 16
    assert gradients.flat.sum() == 4 * 16


def test_empty_tables_and_frozen_weights_are_left_out():
    model = new_model()
    model["trunk"].head.requires_grad_(False)
    assert model["trunk"].scale_emb.numel() == 0
    names = set(trained_parameters(model))
    assert {"trunk.scale_emb", "trunk.head.weight"}.isdisjoint(names)
    assert len(names) == len(list(model.parameters())) - 2


def test_clipping_scales_to_the_norm_and_leaves_a_small_gradient_alone():
    gradients = FlatGradients({"p": nn.Parameter(torch.zeros(2))})
    gradients.flat.copy_(torch.tensor([3.0, 4.0]))
    gradients.clip(10.0)
    assert gradients.flat.tolist() == pytest.approx([3.0, 4.0])
    gradients.clip(1.0)
    assert gradients.flat.tolist() == pytest.approx([0.6, 0.8], rel=1e-4)


def test_weights_of_a_hub_model_stay_with_adamw():
    names = ("hub.model.layers.0.q_proj.weight", "adapters.back.layers.0.weight")
    trained = {name: nn.Parameter(torch.ones(4, 4)) for name in names}
    FlatGradients(trained)
    optimisers = Optimisers(trained, CONFIG)
    assert optimisers.all["adamw"].param_groups[0]["params"] == [trained[names[0]]]
    alone = {names[0]: trained[names[0]]}
    assert list(Optimisers(alone, CONFIG).all) == ["adamw"]
    assert list(Optimisers(trained, OptimiserConfig(kind="adamw")).all) == ["adamw"]


def test_steps_equal_torchs_muon_and_adamw_on_separately_held_parameters():
    update = new_update(clip_norm=0.0)
    names = list(update.ema.parameters)
    before = {n: w.clone() for n, w in zip(names, update.ema.weights, strict=True)}
    held = {
        n: [nn.Parameter(part.clone()) for part in w.chunk(parts_of(n))] for n, w in before.items()
    }
    muon = torch.optim.Muon(
        [p for n, parts in held.items() if is_matrix(n) for p in parts],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
    )
    others = [p for n, parts in held.items() if not is_matrix(n) for p in parts]
    adamw = AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(3):
        fill(update.gradients, seed)
        begin = 0
        for parts in held.values():
            for p in parts:
                p.grad = update.gradients.flat[begin : begin + p.numel()].view_as(p).clone()
                begin += p.numel()
        update(1.0, seed + 1)
        muon.step()
        adamw.step()
    for name, weight in zip(names, update.ema.weights, strict=True):
        expected = torch.cat([p.detach() for p in held[name]])
        atol = 1e-3 if is_matrix(name) else 1e-6  # Newton-Schulz in bfloat16
        torch.testing.assert_close(weight, expected, atol=atol, rtol=0, msg=name)
        assert not torch.equal(weight, before[name]), name


def test_the_factor_scales_both_peaks_and_zero_moves_nothing():
    update = new_update()
    fill(update.gradients, 0)
    before = [w.clone() for w in update.ema.weights]
    update(0.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, update.ema.weights, strict=True))
    update(0.25, 2)
    rates = {name: o.param_groups[0]["lr"] for name, o in update.optimisers.all.items()}
    assert rates == pytest.approx({"muon": 0.005, "adamw": 0.0025})


def state_of(update):
    """Weights, their average and the state of the optimisers."""
    weights = zip(update.ema.parameters, update.ema.weights, strict=True)
    state = {f"weight.{name}": w for name, w in weights}
    state |= {f"average.{name}": a for name, a in update.ema.state().items()}
    return state | update.optimisers.state()


def run(update, seeds, first=1):
    for step, seed in enumerate(seeds, first):
        fill(update.gradients, seed)
        update(1.0, step)
    return state_of(update)


def test_a_restored_update_goes_on_to_the_same_bits():
    whole = new_update()
    saved = {name: tensor.clone() for name, tensor in run(whole, range(3)).items()}
    resumed = new_update()
    run(resumed, [9])  # state of its own, which must not survive
    for name, weight in zip(resumed.ema.parameters, resumed.ema.weights, strict=True):
        weight.copy_(saved[f"weight.{name}"])
    resumed.ema.load({n: saved[f"average.{n}"] for n in resumed.ema.parameters})
    resumed.optimisers.load({n: t for n, t in saved.items() if n.startswith(("muon", "adamw"))})
    expected, got = run(whole, [3, 4], 4), run(resumed, [3, 4], 4)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_state_of_other_parameters_is_refused_and_changes_nothing():
    update = new_update()
    run(update, [0])
    before = {name: tensor.clone() for name, tensor in update.optimisers.state().items()}
    other = {**before, "muon.0.momentum_buffer": torch.zeros(2, 2)}
    for wrong in ({}, {n: t for n, t in before.items() if not n.startswith("muon")}, other):
        with pytest.raises(CheckpointError, match="of other parameters"):
            update.optimisers.load(wrong)
    for name, tensor in update.optimisers.state().items():
        assert torch.equal(tensor, before[name])


def test_the_average_warms_up_and_then_decays_as_asked():
    weight = nn.Parameter(torch.zeros(1))
    ema = EMA({"w": weight}, decay=0.5)
    expected = 0.0
    for step in range(1, 20):
        with torch.no_grad():
            weight.fill_(step)
        ema.set_decay(step)
        ema.move()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema.state()["w"].item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == 19  # the weights themselves are not touched
    assert expected < 18.5


def test_every_call_of_a_captured_update_works_once(monkeypatch):
    """As on a GPU: capturing runs nothing, replaying does."""
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    def capture(work):
        done.append("capture")
        return Graph()

    monkeypatch.setattr("arctrm.train.optim.captured", capture)
    update = new_update(captures=True)
    monkeypatch.setattr(update.optimisers, "apply", lambda: done.append("run"))
    for step in (1, 2, 3):
        update(1.0, step)
    assert done == ["run", "capture", "replay", "replay"]


@pytest.mark.gpu
def test_a_captured_update_equals_an_eager_one():
    eager, captured = new_update("cuda"), new_update("cuda", captures=True)
    expected, got = run(eager, range(5)), run(captured, range(5))
    assert captured.graph is not None
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.gpu
def test_an_update_never_waits_for_the_device():
    update = new_update("cuda")
    run(update, [0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(1.0, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
