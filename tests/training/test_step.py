"""One training step on one packed batch: its gradient, its counts, its carry."""

import numpy as np
import pytest
import torch

from arctrm.config import DataConfig, OptimiserConfig, TRMConfig
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.task import Pair, Task
from arctrm.training.losses import row_losses
from arctrm.training.optimisers import FlatGradients, Optimisers
from arctrm.training.step import COUNTS, GraphedStep, MicroStep
from arctrm.training.stream import DIHEDRAL, EMBEDDING, FLAG, LENGTH, SCALE, STEPS, PairStream
from arctrm.trm.model import TRM
from arctrm.trm.packing import sequences

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "H_cycles": 2, "L_cycles": 1}
PLAIN = DataConfig(num_aug=1, enlarge_canvas=0.0)
"""One view (the identity) on the tight canvas: every row of a pair is the same."""


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


PAIR = Pair(grid([1, 2], [3, 4]), grid([4, 3], [2, 1]))
OTHER = Pair(grid([5, 6, 7]), grid([7, 7], [6, 5]))


def base_of(*pairs, subsets=("a", "b")):
    """One task per pair, each in a subset of its own."""
    tasks = {s: [Task(f"task_{s}", (p,))] for s, p in zip(subsets, pairs, strict=False)}
    return base_set_from_tasks(tasks, None, 1)


def make(
    base, rows=8, halt_max_steps=3, scale=1.0, data=PLAIN, device=CPU, dtype=torch.float32, **trm
):
    config = TRMConfig(**SMALL, **trm)
    torch.manual_seed(0)
    model = TRM(config, base.num_tasks).to(device)
    model.dtype = dtype  # before the state, whose latents have it too
    gradients = FlatGradients(list(model.parameters()))
    stream = PairStream(base, data, config, 0, device, scaled=True)
    state = stream.new_state(model, 1024, rows)
    return model, gradients, MicroStep(model, stream, state, halt_max_steps, scale)


def counts(step):
    return dict(zip(COUNTS, step.counts.tolist(), strict=True))


def test_the_gradient_is_the_mean_over_rows_of_cells_plus_half_halt():
    base = base_of(PAIR, OTHER)
    _, gradients, step = make(base)
    torch.manual_seed(5)
    step()
    got = gradients.flat.clone()
    _, _, twin = make(base)  # the same weights and queue
    torch.manual_seed(5)
    batch = twin.stream.next_batch(twin.state, twin.model)
    kinds = (batch.rows[:, c] for c in (EMBEDDING, DIHEDRAL, FLAG))
    tokens = batch.tokens
    x = twin.model.embed(batch.codes, tokens.row, tokens.first, *twin.model.prefix(*kinds))
    seq = sequences(tokens, twin.model.config, torch.float32)
    _, said = twin.model.supervision_step(batch.latents, x, seq, tokens.first)
    losses = row_losses(said.logits, said.q_halt, batch.labels, tokens.row)
    ((losses.cells + 0.5 * losses.halt)[losses.real].mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in twin.model.parameters()])
    torch.testing.assert_close(got, expected)
    assert got.norm() > 1e-3


def test_absent_rows_and_dummy_tokens_add_nothing():
    _, gradient_of_one, step_of_one = make(base_of(PAIR), rows=1)
    _, gradient_of_many, step_of_many = make(base_of(PAIR), rows=200)  # more than fit
    step_of_one()
    step_of_many()
    counted = counts(step_of_many)
    assert counts(step_of_one)["rows"] == 1
    assert 1 < counted["rows"] < 200
    assert counted["tokens"] == counted["rows"] * (8 + 9)
    torch.testing.assert_close(gradient_of_one.flat, gradient_of_many.flat, atol=1e-6, rtol=1e-4)


def test_tasks_that_are_not_drawn_get_no_gradient():
    data = PLAIN.model_copy(update={"weights": {"a": 0.0}})
    model, _, step = make(base_of(PAIR, OTHER), data=data)
    step()
    touched = model.puzzle_emb.weights.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, True]


@pytest.mark.parametrize("scaling", [{}, {"share": 0.6}])
def test_every_trained_parameter_gets_gradient_from_real_rows(scaling):
    model, _, step = make(base_of(PAIR, OTHER), data=DataConfig(num_aug=50), scaling=scaling)
    for _ in range(3):
        step()
    untouched = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert untouched == []


def test_a_scale_that_no_row_has_gets_no_gradient():
    model, _, step = make(base_of(PAIR), rows=1, scaling={"share": 0.5})
    step.state.queue[:, SCALE] = 2
    step.stream.place(step.state.queue, torch.zeros(1, 8))
    step()
    touched = model.scale_emb.weights.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, True, False]


def test_the_loss_scale_scales_the_gradient_and_steps_add_up():
    _, whole, step = make(base_of(PAIR))
    _, half, half_step = make(base_of(PAIR), scale=0.5)
    step()
    half_step()
    torch.testing.assert_close(half.flat, whole.flat / 2)


def test_counts_are_sums_over_the_rows_of_all_steps():
    _, _, step = make(base_of(PAIR), rows=4, halt_max_steps=2)
    step()
    first = counts(step)
    assert first["rows"] == 4
    assert first["finished"] == 0
    assert first["tokens"] == 4 * (8 + 9)
    assert 0 < first["cell_loss"] / 4 < 5
    step()
    both = counts(step)
    assert both["rows"] == 8
    assert both["finished"] == 4
    assert both["finished_steps"] == 8


def test_rows_stay_until_their_steps_are_up_and_keep_their_latents():
    model, _, step = make(base_of(PAIR), rows=3, halt_max_steps=2)
    step()
    row = step.state.rows.clone()
    latents = step.state.z_H.clone()
    assert step.state.rows[:, STEPS].tolist() == [1, 1, 1]
    assert not step.state.halted.any()
    own = slice(0, int(row[0, LENGTH]))
    assert (latents[own] - model.H_init).abs().max() > 1e-3
    batch = step.stream.next_batch(step.state, model)
    assert torch.equal(batch.rows, row)
    assert torch.equal(batch.latents.z_H[own], latents[own])
    step()
    assert step.state.rows[:, STEPS].tolist() == [2, 2, 2]
    assert step.state.halted.all()
    step()
    assert step.state.rows[:, STEPS].tolist() == [1, 1, 1]


def test_with_one_step_every_row_is_replaced():
    _, _, step = make(base_of(PAIR), rows=3, halt_max_steps=1)
    for _ in range(3):
        step()
        assert step.state.halted.all()
    assert counts(step)["finished_steps"] == counts(step)["finished"] == 9


def test_a_confident_row_leaves_early():
    model, _, step = make(base_of(PAIR), rows=3, halt_max_steps=9, halt_exploration_prob=0.0)
    with torch.no_grad():
        model.q_head.bias.fill_(5.0)
    step()
    assert step.state.halted.all()


@pytest.mark.parametrize(("kind", "adamw_lr"), [("muon", 0.02), ("adamw", 0.005)])
def test_two_pairs_are_learned_in_sixty_steps(kind, adamw_lr):
    base = base_of(PAIR, OTHER)
    model, gradients, step = make(base, halt_max_steps=2)
    optimisers = Optimisers(model, OptimiserConfig(kind=kind, muon_lr=0.02, adamw_lr=adamw_lr))
    losses = []
    for _ in range(60):
        gradients.zero()
        step.counts.zero_()
        step()
        optimisers.step(1.0)
        got = counts(step)
        losses.append(got["cell_loss"] / got["rows"])
    assert losses[0] > 2.0
    assert losses[-1] < 0.1
    assert got["exact"] == got["rows"]
    assert got["shape"] == got["rows"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_learns_like_an_eager_one():
    cuda = torch.device("cuda")
    losses = {}
    for captured in (False, True):
        model, gradients, step = make(
            base_of(PAIR, OTHER), halt_max_steps=2, device=cuda, dtype=torch.bfloat16
        )
        optimisers = Optimisers(model, OptimiserConfig(muon_lr=0.02, adamw_lr=0.02))
        run = GraphedStep(step) if captured else step
        for _ in range(60):
            gradients.zero()
            step.counts.zero_()
            run()
            optimisers.step(1.0)
        got = counts(step)
        losses[captured] = got["cell_loss"] / got["rows"]
    assert losses[False] < 0.3
    assert losses[True] < 0.3
