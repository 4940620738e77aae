"""What follows the gradient, eagerly and as a CUDA graph."""

import pytest
import torch

from arctrm.config import OptimiserConfig, TRMConfig
from arctrm.training.optimisers import EMA, FlatGradients, Optimisers
from arctrm.training.state import pack_optimiser
from arctrm.training.update import LateGraph, Update
from arctrm.trm.model import TRM

CONFIG = OptimiserConfig(muon_lr=0.02, adamw_lr=0.01, weight_decay=0.1)
FACTORS = [0.25, 0.5, 1.0, 1.0, 0.1]


def new_update(device="cpu", clip_norm=1.0):
    torch.manual_seed(0)
    model = TRM(TRMConfig(hidden_size=16, num_heads=2, num_layers=2), 3).to(device)
    gradients = FlatGradients(list(model.parameters()))
    return Update(gradients, Optimisers(model, CONFIG), EMA(model, 0.9), clip_norm)


def train(update, factors=FACTORS):
    generator = torch.Generator().manual_seed(1)
    for step, factor in enumerate(factors, 1):
        update.gradients.flat.copy_(torch.randn(update.gradients.flat.shape, generator=generator))
        update(factor, step)
    return state_of(update)


def state_of(update):
    """Weights, their average and the state of the optimisers."""
    weights = zip(update.ema.names, update.ema.weights, strict=True)
    state = {f"weight.{name}": w for name, w in weights}
    state |= {f"average.{name}": a for name, a in update.ema.state().items()}
    for name, optimiser in update.optimisers.all.items():
        state |= pack_optimiser(name, optimiser)
    return state


def test_it_clips_steps_and_averages():
    update, apart = new_update(), new_update()
    got = train(update)
    generator = torch.Generator().manual_seed(1)
    for step, factor in enumerate(FACTORS, 1):
        apart.gradients.flat.copy_(torch.randn(apart.gradients.flat.shape, generator=generator))
        apart.gradients.clip(1.0)
        apart.optimisers.step(factor)
        apart.ema.update(step)
    for name, expected in state_of(apart).items():
        assert torch.equal(got[name], expected), name


def test_neither_clipping_nor_an_average_is_needed():
    update = new_update(clip_norm=0.0)
    update.ema = None
    update.gradients.flat.fill_(3.0)
    before = update.optimisers.all["adamw"].param_groups[0]["params"][0].detach().clone()
    update(1.0, 1)
    assert (update.gradients.flat == 3.0).all()
    assert not torch.equal(before, update.optimisers.all["adamw"].param_groups[0]["params"][0])


def test_every_call_of_a_late_graph_works_once(monkeypatch):
    """As on a GPU: capturing runs nothing, replaying does."""
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    monkeypatch.setattr("arctrm.training.update.captured", lambda work: Graph())
    graph = LateGraph(lambda: done.append("run"), lambda: done.append("prepare"))
    for _ in range(3):
        graph()
    assert done == ["run", "prepare", "replay", "replay"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_update_equals_an_eager_one():
    eager, captured = new_update("cuda"), new_update("cuda")
    captured.capture()
    expected, got = train(eager), train(captured)
    assert captured.apply.graph is not None
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_never_waits_for_the_device():
    update = new_update("cuda")
    train(update, [1.0])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(1.0, 2)
    finally:
        torch.cuda.set_sync_debug_mode(before)
