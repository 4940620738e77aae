"""Joint training with a hub reader: what TRM hears, where gradients go, what is counted."""

import math

import numpy as np
import pytest
import torch

from arctrm.config import JointConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.errors import ConfigError
from arctrm.model.hybrid import HybridModel
from arctrm.model.layout import prompt
from arctrm.model.trm import Asked
from arctrm.model.trunk import Trunk
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.train import sequences as s
from arctrm.train.drafts import questions_of
from arctrm.train.joint_hub import hub_metrics, hub_steps
from arctrm.train.losses import IGNORE
from arctrm.train.steps import COUNTS, READER, TRM
from helpers import random_grid, random_task


@pytest.fixture
def new(hub_model):
    """Model and step: `new(mode, max_attempts=, trm={...}, **coupling)`."""

    def make(mode="lora", max_attempts=2, trm=None, hub=None, **coupling):
        rng = np.random.default_rng(0)
        base = base_set_from_tasks({"a": [random_task(rng, n, side=3) for n in "xyz"]}, None, 8)
        paths = {"num_context_slots": 4, "num_back_vectors": 3, "adapter_heads": 2}
        config = JointConfig(
            llama_model=str(hub_model),
            llama_frozen=mode == "frozen",
            max_attempts=max_attempts,
            trunk={"hidden_size": 16, "num_layers": 1, "num_heads": 2},
            trm=trm or {},
            hub={"mode": mode, "lora_rank": 4, "max_pairs": 3, "max_tokens": 256, **(hub or {})},
            coupling={**paths, "back": True, "reader_tokens_per_batch": 640, **coupling},
        )
        torch.manual_seed(0)
        reader = load_hub_reader(config.hub)
        hybrid = HybridModel(reader, Trunk(config.trunk, base.num_tasks), config.coupling)
        for name, parameter in hybrid.named_parameters():
            if name.endswith(("halt_head.weight", "feedback.layers.0.weight")) or "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        (step,) = hub_steps(config, hybrid, base)
        return hybrid, step

    return make


def with_random_drafts(step, share=1.0):
    """All pairs have a draft of the right size."""
    pool, rng = step.drafts, np.random.default_rng(1)
    for pair in range(pool.num_pairs):
        pool.write(pair, random_grid(rng, 3, 3))


@pytest.mark.parametrize("drafted", [False, True])
def test_trm_hears_in_training_what_it_hears_in_answering(new, drafted):
    """The last pairs, by the functions that answer questions; no other row hears its own output."""
    hybrid, step = new("frozen", trm={"draft_share": 1.0} if drafted else {})
    if drafted:
        with_random_drafts(step)
    batch = step.draw()
    assert batch.asked.drafted.any() == drafted
    hidden = hybrid.reader.run_packed(batch.read.tokens, batch.read.seen.offsets)
    heard = step.heard(batch, hidden)
    rows, per = batch.asked.rows, step.sequences.num_pairs
    silent = rows.cells & ~batch.asked.drafted[rows.row]
    assert (heard.state[silent] == -1).all()
    for row in (batch.at % per == per - 1).nonzero()[:, 0].tolist():
        of_row = rows.row == row
        (one,) = questions_of(
            step.sequences.source.base, batch.read.rows[batch.at[row] - per + 1 :][:per][None]
        )
        shown = rows.tokens[of_row & rows.cells].view(one.answer.shape).numpy()
        draft = shown.astype(np.uint8) if drafted else None
        asked = Asked(
            one.query, prompt(one.query, one.condition), one.answer.shape, draft, one.pairs
        )
        alone = hybrid.listen([asked], int(of_row.sum()))
        own = heard.state[of_row]
        assert torch.equal(own >= 0, alone.state >= 0)
        found, expected = hidden[own[own >= 0]], alone.hidden[alone.state[own >= 0]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        context = hidden[heard.begin[row] :][: heard.visible[row]]
        torch.testing.assert_close(context, alone.hidden, atol=1e-5, rtol=1e-4)


def test_no_label_of_the_reader_stands_where_a_draft_is_shown(new):
    _, step = new(trm={"draft_share": 1.0})
    with_random_drafts(step)
    batch = step.draw()
    drafted = torch.zeros(len(batch.read.rows), dtype=torch.bool)
    drafted[batch.at] = batch.asked.drafted
    assert drafted.any()
    labelled = batch.read.labels != IGNORE
    assert labelled.any()
    assert not (labelled & drafted[batch.read.own_row]).any()
    assert torch.equal(batch.asked.labels != IGNORE, batch.asked.rows.cells)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_gradients_reach_every_part_from_end_to_end(new, mode):
    hybrid, step = new(mode, trm={"supervision_steps": 2})
    step.prepare()
    step()
    parts = hybrid.parts()
    assert bool(parts["reader"]) == (mode != "frozen")
    for name, parameters in parts.items():
        if name != "trunk":
            assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters), name
            assert sum(p.grad.abs().sum() for p in parameters) > 0 or not parameters, name
    untouched = {
        n for n, p in hybrid.trunk.named_parameters() if p.grad is None or not p.grad.any()
    }
    assert untouched <= {"inverse_emb", "scale_emb", "head.weight"}


def test_trms_loss_alone_trains_the_reader_and_the_readers_writing_trains_trm(new):
    hybrid, step = new(reader_weight=0.0, back=False)
    step()
    assert sum(p.grad.abs().sum() for p in hybrid.reader.parameters()) > 0
    hybrid, step = new("frozen", trm_weight=0.0)
    step()
    assert hybrid.trunk.own_head.weight.grad.abs().sum() > 0


def test_what_is_logged_covers_reader_and_trm(new):
    _, step = new(max_attempts=3, trm={"supervision_steps": 2})
    step()
    metrics = hub_metrics(step.counts)
    assert metrics["avg_attempts"] == 3
    assert metrics["avg_trm_steps"] == 4  # two rounds of two steps, none of which halts
    assert 0 < metrics["written_loss"] < 3 * math.log(12)
    assert 0 < metrics["reader_loss"] < 3 * math.log(12)
    rows = step.counts[:, COUNTS.index("rows")]
    assert rows[READER] == rows[TRM] > 3
    _, alone = new("frozen", back=False, context=False, aligned=False)
    alone()
    assert hub_metrics(alone.counts)["avg_attempts"] == 1
    assert not alone.counts[READER].any()


def test_sequences_fit_into_the_model_with_its_own_words_for_marks(new):
    hybrid, step = new()
    spelt = hybrid.reader.spelling.spelt
    for rows in step.sequences.draw(30):
        tokens = step.sequences.pack(rows, 1, int(rows[:, s.LENGTH].sum())).tokens.numpy()
        assert len(spelt(tokens, [0])[0]) <= 256
    with pytest.raises(ConfigError, match=r"hub\.max_tokens .* holds 1024"):
        new(hub={"max_tokens": 1023}, reader_tokens_per_batch=2048)
