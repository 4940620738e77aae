"""The core that joint, eval and solve share: where the reader's say enters TRM."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "training"))

from joint_parts import drawn, fill_drafts, make, small_base

from arctrm.hybrid import refine, visible_states

PATHS = [
    {"coupling.context": context, "coupling.draft": draft, "coupling.back": back}
    for context in (True, False)
    for draft in (True, False)
    for back in (True, False)
]


def read(step, batch):
    return step._read(batch, None)


@pytest.mark.parametrize("paths", PATHS, ids=lambda paths: str(list(paths.values())))
def test_each_path_is_an_adapter_that_can_be_left_out(paths):
    hybrid, step = make({**paths, "training.schedule.max_steps": 1})
    wanted = {key.partition(".")[2] for key, on in paths.items() if on}
    assert set(hybrid.adapters) == wanted
    assert set(hybrid.parts()) == {"reader", "trm", *wanted}
    slots = 3 if "context" in wanted else 0
    assert hybrid.trm.config.num_context_slots == slots
    fill_drafts(step)
    total, counts = step.loss(drawn(step))
    total.backward()
    assert torch.isfinite(total)
    assert ("context_variance" in counts) == ("context" in wanted)
    for name in wanted & {"context", "draft"}:
        assert all(p.grad.norm() > 0 for p in hybrid.adapters[name].parameters())


def test_without_states_nothing_is_added():
    hybrid, step = make()
    batch = drawn(step)
    start = hybrid.start(None, batch.rows.tokens, 128)
    assert start.context is None
    for tensor in start[1:]:
        assert not tensor.any()
    with torch.no_grad():
        joined = list(hybrid.refine(batch.rows, start, 2))
        alone = list(refine(hybrid.trm, batch.rows, None, 2))
    for (_, said), (_, expected) in zip(joined, alone, strict=True):
        assert torch.equal(said.logits, expected.logits)


@torch.no_grad()
def test_latents_start_from_the_learned_ones_plus_what_the_adapters_say():
    """A carry that was reset at first would throw the adapters' part away."""
    hybrid, step = make({"trm.H_cycles": 1})
    fill_drafts(step)
    batch = drawn(step)
    start = hybrid.start(read(step, batch), batch.rows.tokens, 128)
    began = []
    original = hybrid.trm.supervision_step
    hybrid.trm.supervision_step = lambda latents, *rest: (
        began.append((latents, rest[0])) or (original(latents, *rest))
    )
    list(hybrid.refine(batch.rows, start, 2))
    fresh = hybrid.trm.initial_latents(len(batch.labels))
    assert torch.equal(began[0][0].z_H, fresh.z_H + start.z_H)
    assert torch.equal(began[0][0].z_L, fresh.z_L + start.z_L)
    cells = batch.rows.tokens.slot >= hybrid.trm.config.num_slots
    real = cells & (batch.rows.tokens.row < len(batch.rows.embedding))
    assert (start.z_H[real].abs().sum(1) > 0).all()
    assert not start.z_H[~real].any()
    assert torch.equal(began[0][1], began[1][1])  # the input is fed again at every step


@torch.no_grad()
def test_the_context_is_attended_at_every_supervision_step():
    hybrid, step = make({"coupling.draft": False})
    batch = drawn(step)
    start = hybrid.start(read(step, batch), batch.rows.tokens, 128)
    none = torch.zeros_like
    only_context = start._replace(
        z_H=none(start.z_H), z_L=none(start.z_L), injection=none(start.injection)
    )
    blank = only_context._replace(context=none(start.context))
    said = [list(hybrid.refine(batch.rows, s, 2)) for s in (only_context, blank)]
    for (_, one), (_, other) in zip(*said, strict=True):
        assert not torch.equal(one.logits, other.logits)


@torch.no_grad()
def test_a_blank_task_embedding_changes_what_trm_says():
    hybrid, step = make()
    hybrid.trm.puzzle_emb.weights.normal_()
    batch = drawn(step)
    start = hybrid.start(read(step, batch), batch.rows.tokens, 128)
    said = [next(hybrid.refine(batch.rows, start, 1, blank))[1] for blank in (False, True)]
    assert not torch.equal(said[0].logits, said[1].logits)


@torch.no_grad()
def test_the_soft_prefix_of_a_row_comes_from_its_own_latents():
    hybrid, step = make()
    batch = drawn(step)
    start = hybrid.start(read(step, batch), batch.rows.tokens, 128)
    (latents, _), *_ = hybrid.refine(batch.rows, start, 1)
    num_rows, tokens = len(batch.rows.embedding), batch.rows.tokens
    before = hybrid.soft_prefix(latents, tokens, num_rows)
    assert before.shape == (num_rows, 4, 32)
    other = latents._replace(z_H=latents.z_H + (tokens.row == 3)[:, None].float())
    changed = (hybrid.soft_prefix(other, tokens, num_rows) != before).flatten(1).any(1)
    assert changed.tolist() == [row == 3 for row in range(num_rows)]


@torch.no_grad()
def test_only_as_many_states_are_visible_as_the_row_may_see():
    _, step = make()
    states = read(step, drawn(step))
    seen, mask = visible_states(states, int(states.visible.max()))
    for row, (begin, visible) in enumerate(zip(states.begin, states.visible, strict=True)):
        assert mask[row].sum() == visible
        assert torch.equal(seen[row][mask[row]], states.hidden[begin : begin + visible])


def test_the_task_embeddings_of_a_hybrid_are_those_of_trm():
    hybrid, _ = make(base=small_base(num_tasks=3))
    assert hybrid.puzzle_emb is hybrid.trm.puzzle_emb
    assert hybrid.puzzle_emb.weights.shape == (3, 32)
    assert hybrid.tiny is hybrid.reader
