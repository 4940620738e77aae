"""The reference layout computes what the reference implementation computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from arctrm.errors import CheckpointError
from arctrm.training.losses import row_losses
from arctrm.trm import load_reference
from arctrm.trm.reference import read_reference_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trm_reference_small.safetensors"


@pytest.fixture(scope="module")
def fixture():
    with safe_open(FIXTURE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights")}
    batch = {name: tensors[name] for name in ("inputs", "labels", "puzzle_identifiers")}
    return config, weights, batch, tensors


def total_loss(outputs, labels):
    rows = labels.shape[0]
    losses = row_losses(
        outputs["logits"].flatten(0, 1),
        outputs["q_halt_logits"],
        labels.flatten(),
        torch.arange(rows).repeat_interleave(900),
        stablemax=True,
    )
    return losses.cells.sum() + 0.5 * losses.halt.sum()


def test_four_supervision_steps_match_the_reference(fixture):
    config, weights, batch, tensors = fixture
    model = load_reference(weights, config).eval()
    carry = model.initial_carry(batch)
    for step in range(1, 5):
        with torch.no_grad():
            carry, outputs = model(carry, batch)
        torch.testing.assert_close(
            outputs["logits"], tensors[f"step{step}.logits"], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            outputs["q_halt_logits"], tensors[f"step{step}.q_halt_logits"], atol=1e-4, rtol=0
        )
        loss = total_loss(outputs, batch["labels"])
        assert loss.item() == pytest.approx(tensors[f"step{step}.loss_sum"].item(), abs=1e-4)


def test_a_training_step_has_the_references_loss_and_gradient_norms(fixture):
    config, weights, batch, tensors = fixture
    model = load_reference(weights, config).train()
    _, outputs = model(model.initial_carry(batch), batch)
    loss = total_loss(outputs, batch["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(tensors["train_step1.loss_sum"].item(), abs=1e-4)
    gradients = {name: p.grad for name, p in model.trm.named_parameters()}
    expected = {k: v.item() for k, v in tensors.items() if k.startswith("grad_norm.")}
    assert len(expected) == 12
    for key, norm in expected.items():
        got = gradients[key.removeprefix("grad_norm.model.inner.")].norm().item()
        assert got == pytest.approx(norm, rel=1e-3), key


def test_keys_load_with_the_compile_wrappers_prefix(fixture):
    config, weights, _, _ = fixture
    wrapped = {"_orig_mod." + key: value for key, value in weights.items()}
    model, plain = load_reference(wrapped, config), load_reference(weights, config)
    same = zip(model.state_dict().items(), plain.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in same)


def test_a_missing_tensor_is_refused_by_name(fixture):
    config, weights, _, _ = fixture
    cut = {k: v for k, v in weights.items() if not k.endswith("lm_head.weight")}
    with pytest.raises(CheckpointError, match=r"1 tensors missing, first 'lm_head\.weight'"):
        load_reference(cut, config)


def test_an_unexpected_tensor_is_refused_by_name(fixture):
    config, weights, _, _ = fixture
    with pytest.raises(CheckpointError, match="other_head"):
        load_reference({**weights, "model.inner.other_head": torch.zeros(1)}, config)


def test_another_width_is_refused_with_both_shapes(fixture):
    config, weights, _, _ = fixture
    with pytest.raises(CheckpointError, match=r"\(64,\).*\(128,\)"):
        load_reference(weights, {**config, "hidden_size": 128})


def test_the_mlp_variant_is_refused(fixture):
    config, weights, _, _ = fixture
    with pytest.raises(CheckpointError, match="mlp_t = True"):
        load_reference(weights, {**config, "mlp_t": True})


def test_a_pytorch_file_is_read_without_unpickling_objects(fixture, tmp_path):
    _, weights, _, _ = fixture
    torch.save(weights, tmp_path / "step_1")
    model = read_reference_file(tmp_path / "step_1")
    assert model.trm.config.hidden_size == 64
    torch.save({"weights": Path("not a tensor")}, tmp_path / "evil")
    with pytest.raises(CheckpointError, match="state dict"):
        read_reference_file(tmp_path / "evil")
