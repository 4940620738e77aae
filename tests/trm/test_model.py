"""One supervision step: what it depends on, and where its gradient goes."""

import pytest
import torch

from arctrm.config import TRMConfig
from arctrm.trm.layers import run_level
from arctrm.trm.model import Q_HEAD_BIAS, TRM, Latents, count_parameters
from arctrm.trm.packing import longest_row, sequences, token_map

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "L_cycles": 2}
LENGTHS, WIDTHS = torch.tensor([8 + 12, 8 + 6]), torch.tensor([4, 3])
TASKS = 3


def new_model(**fields):
    torch.manual_seed(0)
    return TRM(TRMConfig(**SMALL, **fields), TASKS)


def randomise(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
    return model


def prepare(model, task=(0, 1), dihedral=(0, 3), flag=(1, 0), blank=False):
    """Embedded input of two rows, their layout and their first tokens."""
    slots, total = model.config.num_prefix_slots, int(LENGTHS.sum())
    tokens = token_map(LENGTHS, WIDTHS, total, longest_row(model.config), slots)
    codes = torch.arange(total) % 12
    kinds = (torch.tensor(kind) for kind in (task, dihedral, flag))
    x = model.embed(codes, tokens.row, tokens.first, *model.prefix(*kinds, blank=blank))
    return x, sequences(tokens, model.config, torch.float32), tokens


def predict(model, **kinds):
    x, seq, tokens = prepare(model, **kinds)
    return model.supervision_step(model.initial_latents(len(x)), x, seq, tokens.first)


def objective(prediction):
    return prediction.logits.square().mean() + prediction.q_halt.square().sum()


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters()}
    return {n: torch.zeros(1) if g is None else g.clone() for n, g in found.items()}


def test_the_loss_reaches_every_parameter():
    model = randomise(new_model())
    objective(predict(model)[1]).backward()
    untouched = [n for n, g in gradients(model).items() if not g.abs().sum() > 0]
    assert untouched == []


def test_the_loss_of_an_untrained_model_reaches_every_parameter_too():
    """Although its task embeddings and its halting head start at zero."""
    model = new_model()
    objective(predict(model)[1]).backward()
    untouched = [n for n, g in gradients(model).items() if not g.abs().sum() > 0]
    assert untouched == []


def test_only_the_tasks_and_codes_of_the_batch_get_gradient():
    model = randomise(new_model())
    objective(predict(model, task=(0, 2), dihedral=(1, 5))[1]).backward()
    tasks = model.puzzle_emb.weights.grad.abs().sum(1) > 0
    turns = model.dihedral_emb.weights.grad.abs().sum(1) > 0
    assert tasks.tolist() == [True, False, True]
    assert turns.nonzero()[:, 0].tolist() == [1, 5]


def unrolled(model, detach):
    """The recursion written out; `detach` cuts the gradient before the last H cycle."""
    x, seq, tokens = prepare(model)
    weights = model.L_level.cast(torch.float32)
    z_H, z_L = model.initial_latents(len(x))
    for cycle in range(model.config.H_cycles):
        if detach and cycle == model.config.H_cycles - 1:
            z_H, z_L = z_H.detach(), z_L.detach()
        for _ in range(model.config.L_cycles):
            z_L = run_level(z_L, z_H + x, weights, seq, 2, model.config.qk_norm)
        z_H = run_level(z_H, z_L, weights, seq, 2, model.config.qk_norm)
    return Latents(z_H, z_L), model.read_out(z_H, tokens.first)


def gradients_of(model, prediction):
    model.zero_grad()
    objective(prediction).backward()
    return torch.cat([g.flatten() for g in gradients(model).values()])


def test_only_the_last_H_cycle_has_a_gradient():
    model = randomise(new_model(H_cycles=3))
    latents, prediction = predict(model)
    got = gradients_of(model, prediction)
    expected_latents, expected = unrolled(model, detach=True)
    torch.testing.assert_close(prediction.logits, expected.logits)
    torch.testing.assert_close(latents.z_L, expected_latents.z_L.detach())
    torch.testing.assert_close(got, gradients_of(model, expected))
    through_all = gradients_of(model, unrolled(model, detach=False)[1])
    assert (got - through_all).abs().max() > 1e-3


def test_with_one_H_cycle_the_gradient_runs_through_all_of_it():
    model = randomise(new_model(H_cycles=1))
    got = gradients_of(model, predict(model)[1])
    torch.testing.assert_close(got, gradients_of(model, unrolled(model, detach=False)[1]))


def test_the_returned_latents_carry_no_graph():
    latents, prediction = predict(new_model())
    assert not latents.z_H.requires_grad
    assert not latents.z_L.requires_grad
    assert prediction.logits.requires_grad


def test_a_second_step_goes_on_from_the_first_ones_latents():
    model = randomise(new_model())
    x, seq, tokens = prepare(model)
    latents, first = model.supervision_step(model.initial_latents(len(x)), x, seq, tokens.first)
    _, second = model.supervision_step(latents, x, seq, tokens.first)
    assert (first.logits - second.logits).abs().max() > 1e-3


@pytest.mark.parametrize("condition_cells", [True, False])
@pytest.mark.parametrize(
    "other",
    [{"task": (2, 1)}, {"dihedral": (1, 3)}, {"flag": (0, 0)}, {"blank": True}],
    ids=lambda kind: next(iter(kind)),
)
def test_task_dihedral_flag_and_blanking_change_the_rows_logits(other, condition_cells):
    model = randomise(new_model(condition_cells=condition_cells))
    plain, changed = predict(model)[1].logits, predict(model, **other)[1].logits
    assert (plain[8:20] - changed[8:20]).abs().max() > 1e-3  # cells of row 0
    if "blank" not in other:
        torch.testing.assert_close(plain[28:], changed[28:])  # row 1 is as it was


def test_with_a_blank_embedding_all_tasks_are_the_same():
    model = randomise(new_model())
    logits = [predict(model, task=task, blank=True)[1].logits for task in ((0, 1), (2, 0))]
    assert torch.equal(*logits)


def test_per_view_embeddings_replace_the_dihedral_code_and_the_flag():
    model = randomise(new_model(task_embedding="per_view"))
    plain = predict(model)[1].logits
    turned = predict(model, dihedral=(5, 6), flag=(0, 1))[1].logits
    assert torch.equal(plain, turned)
    assert not torch.allclose(plain, predict(model, task=(2, 2))[1].logits)


def test_task_embeddings_start_at_zero_or_all_at_one_random_vector():
    assert not new_model(task_embedding_init="zero").puzzle_emb.weights.any()
    mean = new_model(task_embedding_init="mean").puzzle_emb.weights
    assert mean.shape == (TASKS, 16)
    assert (mean == mean[0]).all()
    assert mean[0].std() > 0.05


def test_inputs_are_scaled_by_the_root_of_the_width_and_lie_where_they_belong():
    model = randomise(new_model(condition_cells=False))
    x, _, tokens = prepare(model)
    cells = model.embed_tokens.embedding_weight
    assert torch.equal(x[20], model.puzzle_emb.weights[1] * 4)  # slot 0 of row 1
    assert torch.equal(x[21], model.dihedral_emb.weights[3] * 4)
    assert torch.equal(x[22], model.colour_flag_emb.weights[0] * 4)
    assert torch.equal(x[23:28], model.slots.weights * 4)
    torch.testing.assert_close(x[8:20], cells[torch.arange(8, 20) % 12] * 4)
    assert tokens.first.tolist() == [0, 20]


def test_the_reference_layout_puts_the_embedding_in_slot_0_and_pads_the_rest():
    model = randomise(new_model(layout="reference", condition_cells=False))
    rows = torch.tensor([2, 0])
    prefix, condition = model.prefix(rows, rows, rows)
    assert torch.equal(prefix[:, 0], model.puzzle_emb.weights[rows])
    assert not prefix[:, 1:].any()
    assert not condition.any()


def test_fresh_latents_are_the_learned_starts_on_every_token():
    model = new_model()
    latents = model.initial_latents(7)
    assert torch.equal(latents.z_H, model.H_init.expand(7, 16))
    assert torch.equal(latents.z_L, model.L_init.expand(7, 16))
    assert not torch.equal(model.H_init, model.L_init)


def test_an_untrained_model_says_not_done():
    assert (predict(new_model())[1].q_halt == Q_HEAD_BIAS).all()


def test_half_precision_arithmetic_keeps_float32_parameters_and_outputs():
    model = randomise(new_model())
    exact = predict(model)[1].logits
    model.dtype = torch.bfloat16
    latents, prediction = predict(model)
    assert latents.z_H.dtype == torch.bfloat16
    assert prediction.logits.dtype == prediction.q_halt.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (exact - prediction.logits).abs().mean() < 0.1


def test_parameters_are_counted_apart_from_task_embeddings():
    model = new_model()
    sizes = count_parameters(model)
    assert sizes["task_embeddings"] == TASKS * 16
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
