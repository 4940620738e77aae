"""Stored batches of the older code: the reader's loss, gradient and steps are as they were."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arctrm.config import OptimiserConfig, TrunkConfig
from arctrm.model.attention import spans
from arctrm.model.trunk import TRM_PARTS, Trunk
from arctrm.train import sequences as s
from arctrm.train.losses import IGNORE, row_counts
from arctrm.train.optim import EMA, FlatGradients, Optimisers, Update, trained_parameters
from arctrm.train.sequences import Batch
from arctrm.train.steps import read
from arctrm.version_1 import new_tensors

GOLDEN = Path(__file__).parents[1] / "golden"


def by_new_names(stored):
    """Tensors of the older code, or numbers, by the names of a trunk's parameters."""
    own = {name: torch.as_tensor(value) for name, value in stored.items()}
    own = {name: t if t.ndim else t.view(1) for name, t in own.items()}
    found = new_tensors({"config": {}}, own).items()
    return {name.removeprefix("trunk."): tensor for name, tensor in found}


def golden_trunk(tensors):
    """With the stored weights."""
    trunk = Trunk(TrunkConfig(hidden_size=32, num_heads=2, num_layers=2, loops=2), 8, 7)
    stored = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    trunk.load_state_dict(by_new_names(stored))
    return trunk


def assert_norms(found, expected, rel):
    """The norms of tensors `found` by name are those `expected` by the old names."""
    of_reader = {
        n: t for n, t in by_new_names(expected).items() if n.split(".")[0] not in TRM_PARTS
    }
    norms = {name: tensor.norm().item() for name, tensor in of_reader.items()}
    assert {name: found[name].norm().item() for name in norms} == pytest.approx(norms, rel=rel)


def golden_batch(tensors, number=0):
    stored = {
        name.partition(".")[2]: t.long()
        for name, t in tensors.items()
        if name.startswith(f"batch{number}.")
    }
    lengths, conditions = stored["lengths"], stored["conditions"]
    num_rows, num_tokens = len(lengths), len(stored["tokens"])
    rows = torch.zeros(num_rows, s.NUM_COLUMNS, dtype=torch.long)
    rows[:, s.TASK], rows[:, s.DIHEDRAL], flag, rows[:, s.SCALE] = conditions.unbind(1)
    rows[:, s.KEEPS_COLOURS], rows[:, s.INVERSE] = flag % 2, flag // 2
    used = int(lengths.sum())
    all_lengths = torch.cat((lengths, torch.tensor([num_tokens - used])))
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), all_lengths.cumsum(0))).int()
    prompts = torch.cat((stored["prompts"], torch.zeros(1, dtype=torch.long)))
    return Batch(
        rows,
        stored["tokens"],
        stored["positions"],
        torch.where(stored["labels"] < 0, IGNORE, stored["labels"]),
        torch.where(stored["row"] < 0, num_rows, stored["row"]),
        torch.zeros(num_tokens, dtype=torch.long),
        prompts,
        spans(offsets, num_tokens, torch.float32, prompts),
        num_rows,
    )


def test_loss_logits_and_gradients_of_a_stored_batch_are_those_of_the_older_code():
    tensors = load_file(GOLDEN / "losses.safetensors")
    golden = json.loads((GOLDEN / "losses.json").read_text())["fixed_batch"]
    trunk, batch = golden_trunk(tensors), golden_batch(tensors)
    logits = trunk.logits(read(trunk, batch))
    losses = row_counts(logits, batch.labels, batch.row, len(batch.rows))
    assert losses.mean.item() == pytest.approx(golden["loss"], abs=1e-5)
    assert losses.num_labels == golden["num_labels"]
    assert losses.loss.tolist() == pytest.approx(golden["rows"]["cell_loss"], abs=1e-5)
    assert losses.cell_accuracy.tolist() == pytest.approx(golden["rows"]["cell_accuracy"])
    for name in ("exact", "shape"):
        assert getattr(losses, name).tolist() == golden["rows"][name]
    stored = torch.tensor(golden["logits"])
    torch.testing.assert_close(logits[golden["logits_at"]], stored, atol=1e-4, rtol=1e-4)
    losses.mean.backward()
    gradients = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
    expected = {name: norm for name, (norm, _) in golden["gradient_norm_and_sum"].items()}
    assert_norms(gradients, expected, rel=1e-4)


def test_five_stored_steps_end_where_the_older_code_ended():
    """Losses, weights and averages over five stored batches; in the reader voice."""
    tensors = load_file(GOLDEN / "losses.safetensors")
    golden = json.loads((GOLDEN / "losses.json").read_text())["replayed_steps"]
    trunk = golden_trunk(tensors)
    trained = trained_parameters(trunk)
    gradients = FlatGradients(trained)
    config = OptimiserConfig(muon_lr=0.007, adamw_lr=1e-3, weight_decay=0.025)
    ema = EMA(trained, 0.999)
    update = Update(gradients, Optimisers(trained, config), ema, 0.0)
    losses = []
    for number, factor in enumerate(golden["lr_factors"]):
        batch = golden_batch(tensors, number)
        gradients.zero()
        logits = trunk.logits(read(trunk, batch))
        loss = row_counts(logits, batch.labels, batch.row, len(batch.rows)).mean
        loss.backward()
        losses.append(loss.item())
        update(factor, number + 1)
    assert losses == pytest.approx(golden["losses"], abs=1e-3)  # rounding of bfloat16 adds up
    for key, found in (("weights", trained), ("ema", ema.state())):
        expected = {name: norm for name, (norm, _) in golden[f"{key}_norm_and_sum"].items()}
        assert_norms(found, expected, rel=2e-4)
