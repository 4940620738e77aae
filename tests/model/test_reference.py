"""Published TRM checkpoints compute what the reference implementation computes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from arctrm.data.views import IDENTITY, View
from arctrm.errors import CheckpointError
from arctrm.model import layout
from arctrm.model.reference import (
    COLOUR,
    EOS,
    PAD,
    ReferenceRefiner,
    decode,
    encode,
    load_reference,
    read_off,
    read_reference_file,
    reference_views,
)
from arctrm.model.trm import Asked
from helpers import random_grid

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trm_reference_small.safetensors"
IGNORE = -100


@pytest.fixture(scope="module")
def fixture():
    with safe_open(FIXTURE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights")}
    batch = {name: tensors[name] for name in ("inputs", "puzzle_identifiers")}
    return config, weights, batch, tensors


@pytest.fixture(scope="module")
def model(fixture):
    config, weights, _, _ = fixture
    return load_reference(weights, config)


def total_loss(outputs, labels):
    """Stablemax cross entropy per row, and half the binary cross entropy of the halting logit."""
    x, valid = outputs["logits"].double(), labels != IGNORE
    weight = torch.where(x < 0, 1 / (1 - x), x + 1)
    log_p = (weight / weight.sum(-1, keepdim=True)).log()
    own = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * valid
    exact = ((x.argmax(-1) == labels) | ~valid).all(1).float()
    halt = F.binary_cross_entropy_with_logits(outputs["q_halt_logits"], exact, reduction="sum")
    return (own.sum(1) / valid.sum(1)).sum() + 0.5 * halt


@pytest.mark.parametrize("num_steps", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_supervision_steps_match_the_reference(fixture, model, num_steps):
    _, _, batch, tensors = fixture
    state = None
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            state, outputs = model(batch, state)
        for name in ("logits", "q_halt_logits"):
            expected = tensors[f"step{step}.{name}"]
            torch.testing.assert_close(outputs[name], expected, atol=1e-4, rtol=0)
        loss = total_loss(outputs, tensors["labels"])
        assert loss.item() == pytest.approx(tensors[f"step{step}.loss_sum"].item(), abs=1e-4)


@pytest.mark.slow
def test_a_training_step_has_the_references_loss_and_gradient_norms(fixture):
    config, weights, batch, tensors = fixture
    model = load_reference(weights, config).train()
    _, outputs = model(batch)
    loss = total_loss(outputs, tensors["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(tensors["train_step1.loss_sum"].item(), abs=1e-4)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected = {k: v.item() for k, v in tensors.items() if k.startswith("grad_norm.")}
    assert len(expected) == 12
    for key, norm in expected.items():
        got = gradients[key.removeprefix("grad_norm.model.inner.")].norm().item()
        assert got == pytest.approx(norm, rel=1e-3), key


def test_every_size_round_trips_on_the_canvas():
    rng = np.random.default_rng(0)
    for height in range(1, 31):
        for width in (1, height, 31 - height, 30):
            grid = random_grid(rng, height, width)
            assert np.array_equal(decode(encode(grid)), grid)
    codes = encode(np.array([[0, 9]], np.uint8))
    assert codes[:2, :4].tolist() == [[COLOUR, COLOUR + 9, EOS, PAD], [EOS, EOS, PAD, PAD]]
    for hole in ((0, 0), (1, 1)):
        codes = encode(np.ones((2, 2), np.uint8))
        codes[hole] = PAD
        assert decode(codes) is None


def test_where_the_canvas_holds_no_grid_the_asked_size_is_read():
    logits = torch.full((30, 30, 12), -5.0)
    logits[..., PAD], logits[..., COLOUR + 3] = 4.0, 2.0
    grid, log_p = read_off(logits, (2, 3))
    assert grid.tolist() == [[3] * 3] * 2
    assert log_p == pytest.approx(6 * np.log(3 / (8 + 10 / 6)), abs=1e-4)


@pytest.mark.slow
def test_the_refiner_answers_as_the_model_in_any_batches(fixture, model):
    rng = np.random.default_rng(1)
    asked = []
    for row in range(2):
        grid = random_grid(rng, 3, 2 + row)
        condition = layout.Condition(task=row)
        asked.append(Asked(grid, layout.prompt(grid, condition), (3, 3)))
    refiner, done = ReferenceRefiner(model), []
    one = refiner.refine(asked, 2, tokens_per_batch=1, keep_history=True, advance=done.append)
    many = refiner.refine(asked, 2, tokens_per_batch=10**6)
    assert done == [1] * 2
    for a, b in zip(one, many, strict=True):
        assert np.array_equal(a.grid, b.grid)
        assert (a.q, a.log_p) == pytest.approx((b.q, b.log_p), abs=1e-3)
        assert (a.steps, len(a.history), b.history) == (2, 2, ())
        assert np.array_equal(a.grid, a.history[-1])
    moved = replace(asked[0], prompt=layout.prompt(asked[0].query, layout.Condition(task=1)))
    assert refiner.refine([moved], 2)[0].q != pytest.approx(one[0].q, abs=1e-6)


def test_files_load_by_either_format_and_with_the_compile_wrappers_prefix(fixture, tmp_path):
    config, weights, _, _ = fixture
    torch.save({"_orig_mod." + key: value for key, value in weights.items()}, tmp_path / "step_1")
    metadata = {"config": json.dumps(config)}
    save_file(weights, tmp_path / "a.safetensors", metadata)
    one, other = map(read_reference_file, (tmp_path / "step_1", tmp_path / "a.safetensors"))
    assert (one.config.num_heads, other.config.num_heads) == (1, 2)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def changed(weights, **more):
    return {**weights, **{f"model.inner.{key}": value for key, value in more.items()}}


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda w: {k: v for k, v in w.items() if "lm_head" not in k}, {}, r"Missing.*lm_head"),
        (lambda w: changed(w, other_head=torch.zeros(1)), {}, "other_head"),
        (lambda w: w, {"hidden_size": 128}, r"hidden_size = 128.*64"),
        (lambda w: w, {"mlp_t": True}, "mlp_t = True"),
        (lambda w: w, {"num_heads": 5}, "5 heads"),
        (lambda w: w, {"puzzle_emb_len": 10**9}, "puzzle_emb_len = 1000000000"),
        (lambda w: changed(w, H_init=torch.zeros(65)), {}, r"H_init.*\[65\].*\[64\]"),
        (lambda w: changed(w, **{"puzzle_emb.weights": torch.zeros(())}), {}, "no TRM weights"),
        (lambda w: {}, {}, "no TRM weights"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fixture, change, more, words):
    config, weights, _, _ = fixture
    with pytest.raises(CheckpointError, match=words):
        load_reference(change(weights), {**config, **more})


def test_files_that_are_no_plain_tensors_are_refused_in_one_sentence(fixture, tmp_path):
    huge = torch.zeros(1).expand(10**7, 10**5)
    contents = ({"weights": Path("not a tensor")}, changed(fixture[1], big=huge), [1])
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"step_{number}")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for name in (*(f"step_{number}" for number in range(3)), "a.safetensors", "missing"):
        with pytest.raises(CheckpointError, match="not a state dict of plain tensors") as caught:
            read_reference_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_identifiers_say_which_view_a_vector_belongs_to(tmp_path):
    file = tmp_path / "step_1"
    with pytest.raises(CheckpointError, match=r"identifiers\.json"):
        reference_views(file, 3)
    (tmp_path / "identifiers.json").write_text('["<blank>", "a", "a|||t3|||0213456789"]')
    views = reference_views(file, 3)
    assert views["a"] == [(IDENTITY, 1), (View(3, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)), 2)]
    with pytest.raises(CheckpointError, match="lists 3 vectors"):
        reference_views(file, 4)
    (tmp_path / "identifiers.json").write_text('["a|||t9|||0123456789"]')
    with pytest.raises(CheckpointError, match="permutation of ten"):
        reference_views(file, 1)
