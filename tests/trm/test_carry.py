"""The carry of dense batches: who halts, who starts afresh, who goes on."""

import pytest
import torch

from arctrm.config import TRMConfig
from arctrm.trm.carry import NUM_CELLS, Carry, ReferenceTRM, halting
from arctrm.trm.model import TRM, Latents

ROWS = 3
MANY = 20_000


def make(max_steps=4, q_bias=-5.0, exploration=0.0):
    torch.manual_seed(0)
    config = TRMConfig(
        layout="reference",
        condition_cells=False,
        hidden_size=16,
        num_heads=2,
        num_layers=1,
        H_cycles=1,
        L_cycles=1,
        halt_max_steps=max_steps,
        halt_exploration_prob=exploration,
    )
    trm = TRM(config, 5)
    with torch.no_grad():
        trm.q_head.bias.fill_(q_bias)
        trm.puzzle_emb.weights.normal_()
    return ReferenceTRM(trm)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randint(0, 12, (ROWS, NUM_CELLS), generator=generator),
        "puzzle_identifiers": torch.randint(0, 5, (ROWS,), generator=generator),
    }


@torch.no_grad()
def step(model, carry, data):
    return model(carry, data)


def by_row(latents):
    return [z.unflatten(0, (ROWS, -1)) for z in latents]


def test_the_first_step_starts_at_the_learned_latents_whatever_the_carry_holds():
    model, data = make().eval(), batch(0)
    fresh = model.initial_carry(data)
    assert fresh.halted.all()
    assert torch.equal(fresh.latents.z_H, model.trm.H_init.expand_as(fresh.latents.z_H))
    assert torch.equal(fresh.latents.z_L, model.trm.L_init.expand_as(fresh.latents.z_L))
    garbage = Latents(*(torch.randn_like(z) for z in fresh.latents))
    stale = Carry(garbage, fresh.steps + 9, fresh.halted, batch(8))
    (a, outputs), (b, other) = step(model, fresh, data), step(model, stale, data)
    assert torch.equal(outputs["logits"], other["logits"])
    assert a.steps.tolist() == b.steps.tolist() == [1] * ROWS


def test_halted_rows_take_the_new_batch_and_the_others_go_on_with_theirs():
    model, old, new = make().eval(), batch(0), batch(1)
    first, _ = step(model, model.initial_carry(old), old)
    went_on, expected_on = step(model, first, old)  # nobody halted: all go on with `old`
    _, expected_fresh = step(model, model.initial_carry(new), new)
    mixed = Carry(first.latents, first.steps, torch.tensor([False, True, False]), old)
    carry, outputs = step(model, mixed, new)
    assert carry.steps.tolist() == [2, 1, 2]
    for row, expected in enumerate((expected_on, expected_fresh, expected_on)):
        torch.testing.assert_close(outputs["logits"][row], expected["logits"][row])
    assert torch.equal(carry.current_data["inputs"][0], old["inputs"][0])
    assert torch.equal(carry.current_data["inputs"][1], new["inputs"][1])
    for z, on in zip(by_row(carry.latents), by_row(went_on.latents), strict=True):
        torch.testing.assert_close(z[[0, 2]], on[[0, 2]])
    assert (expected_on["logits"][1] - expected_fresh["logits"][1]).abs().max() > 1e-3


def test_training_halts_a_confident_row_and_evaluation_never_does():
    model, data = make(max_steps=3, q_bias=5.0), batch(0)
    carry, _ = step(model.train(), model.initial_carry(data), data)
    assert carry.halted.all()
    carry = model.eval().initial_carry(data)
    halted = []
    for _ in range(3):
        carry, _ = step(model, carry, data)
        halted.append(carry.halted.tolist())
    assert halted == [[False] * ROWS, [False] * ROWS, [True] * ROWS]


def test_training_keeps_an_unsure_row_until_the_last_step():
    model, data = make(max_steps=3, q_bias=-5.0).train(), batch(0)
    carry = model.initial_carry(data)
    for expected in (False, False, True):
        carry, _ = step(model, carry, data)
        assert carry.halted.tolist() == [expected] * ROWS
    carry, _ = step(model, carry, data)
    assert carry.steps.tolist() == [1] * ROWS


def test_a_row_halts_when_q_is_positive_or_its_steps_are_up():
    q = torch.tensor([-1.0, 1.0, 0.0, -1.0])
    steps = torch.tensor([1, 1, 1, 4])
    assert halting(q, steps, 4, 0.0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("q", [-9.0, 9.0])
def test_with_one_step_every_row_halts(q):
    assert halting(torch.full((5,), q), torch.ones(5), 1, 1.0).all()


def test_exploration_keeps_its_share_of_confident_rows_running():
    torch.manual_seed(0)
    q = torch.ones(MANY)
    stopped = halting(q, torch.ones(MANY), 6, 0.25).float().mean().item()
    assert stopped == pytest.approx(0.75, abs=0.01)  # the least an exploring row runs is 2 steps


def test_an_exploring_row_runs_a_uniform_number_of_steps_from_2_to_the_maximum():
    torch.manual_seed(0)
    q = torch.ones(MANY)
    shares = [halting(q, torch.full((MANY,), s), 5, 1.0).float().mean().item() for s in range(1, 6)]
    assert shares == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0], abs=0.015)


def test_exploration_never_stops_an_unsure_row():
    torch.manual_seed(0)
    assert not halting(-torch.ones(MANY), torch.full((MANY,), 3), 5, 1.0).any()
