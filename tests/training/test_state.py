"""Optimiser and random state come back exactly."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from arctrm.errors import CheckpointError
from arctrm.training.checkpoints import (
    CheckpointMeta,
    model_tensors,
    pack_generator,
    pack_optimiser,
    read_model,
    read_rank,
    read_trainer,
    restore_rng,
    rng_state,
    unpack_generator,
    unpack_optimiser,
    write_checkpoint,
)
from arctrm.training.muon import Muon


class Run:
    """A small training run with every kind of state: two optimisers and four generators."""

    def __init__(self, *, fused: bool) -> None:
        self.model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Dropout(0.5), nn.Linear(8, 4))
        matrices = [self.model[0].weight]
        rest = list(self.model[2].parameters())
        self.optimisers = {
            "muon": Muon(matrices, lr=0.02),
            "adamw": torch.optim.AdamW(rest, lr=0.01, fused=fused),
        }
        self.draws = np.random.default_rng(7)

    def train(self, steps):
        for _ in range(steps):
            noise = random.gauss(0, 1) + np.random.standard_normal() + self.draws.normal()
            loss = (self.model(torch.randn(5, 4)) + noise).square().mean()
            loss.backward()
            for optimiser in self.optimisers.values():
                optimiser.step()
                optimiser.zero_grad()

    def save(self, run):
        trainer = {}
        for name, optimiser in self.optimisers.items():
            trainer |= pack_optimiser(name, optimiser)
        own = rng_state() | {"draws": pack_generator(self.draws)}
        meta = CheckpointMeta(step=3, elapsed=0.0, examples=0, config={}, task_ids=())
        return write_checkpoint(run, meta, model_tensors(self.model.state_dict()), trainer, own)

    def load(self, path):
        self.model.load_state_dict(read_model(path, ema=False))
        trainer, own = read_trainer(path), read_rank(path, 0)
        for name, optimiser in self.optimisers.items():
            unpack_optimiser(name, optimiser, trainer)
        unpack_generator(self.draws, own["draws"])
        restore_rng(own)


def disturb_generators():
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


@pytest.mark.parametrize("fused", [False, True])
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(tmp_path, fused):
    whole = Run(fused=fused)
    whole.train(3)
    path = whole.save(tmp_path)
    whole.train(4)

    disturb_generators()
    resumed = Run(fused=fused)
    resumed.train(1)  # state of its own, which must not survive
    resumed.load(path)
    resumed.train(4)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_the_optimiser_state_the_run_would_differ(tmp_path):
    whole = Run(fused=False)
    whole.train(3)
    path = whole.save(tmp_path)
    whole.train(1)
    resumed = Run(fused=False)
    resumed.load(path)
    resumed.optimisers["adamw"].state.clear()
    resumed.train(1)
    assert not torch.equal(whole.model[2].weight, resumed.model[2].weight)


def test_buffers_keep_their_dtype_and_python_numbers_their_type():
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimiser = torch.optim.AdamW([param])
    optimiser.state[param] = {
        "exp_avg": torch.tensor([0.1, 0.2, 0.3]),  # float32 for a bfloat16 parameter
        "count": 2**40 + 1,
        "rate": 0.1,
        "ready": True,
    }
    packed = pack_optimiser("o", optimiser)
    fresh = torch.optim.AdamW([param])
    unpack_optimiser("o", fresh, packed)
    got = fresh.state[param]
    assert torch.equal(got.pop("exp_avg"), torch.tensor([0.1, 0.2, 0.3]))
    assert got == {"count": 2**40 + 1, "rate": 0.1, "ready": True}
    assert got["ready"] is True


def test_an_optimiser_that_has_not_stepped_is_restored_as_such():
    optimiser = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    stepped = Run(fused=False)
    stepped.train(1)
    unpack_optimiser("adamw", optimiser, pack_optimiser("adamw", optimiser))
    assert not any(optimiser.state.values())


def test_optimiser_state_of_another_model_is_refused():
    run = Run(fused=False)
    run.train(1)
    packed = pack_optimiser("adamw", run.optimisers["adamw"])
    with pytest.raises(CheckpointError, match="holds 2 parameters, the optimiser has 1"):
        unpack_optimiser("adamw", torch.optim.AdamW([nn.Parameter(torch.ones(3))]), packed)
    other = torch.optim.AdamW(nn.Linear(8, 5).parameters())
    with pytest.raises(CheckpointError, match=r"holds shape \(4, 8\), the parameter has \(5, 8\)"):
        unpack_optimiser("adamw", other, packed)
    with pytest.raises(CheckpointError, match="'muon': the checkpoint holds no parameters"):
        unpack_optimiser("muon", run.optimisers["muon"], packed)


def test_random_state_with_a_part_missing_is_refused():
    state = rng_state()
    del state["rng.numpy"]
    with pytest.raises(CheckpointError, match=r"'rng\.numpy' is absent"):
        restore_rng(state)


def test_a_generator_of_another_kind_is_refused():
    packed = pack_generator(np.random.default_rng(0))
    other = np.random.Generator(np.random.Philox(0))
    with pytest.raises(CheckpointError, match="holds PCG64, this run draws with Philox"):
        unpack_generator(other, packed)
