"""The TRM voice: a step by hand, what passes between steps, where gradients go, and answering."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arctrm.config import TrunkConfig
from arctrm.model import layout
from arctrm.model.layout import Condition, output_tokens
from arctrm.model.trm import (
    Asked,
    State,
    TrunkRefiner,
    batches,
    first_state,
    lay_out,
    reader_states,
    supervision_step,
    supervision_steps,
)
from arctrm.model.trunk import EPS, Trunk
from helpers import random_grid

CONFIG = TrunkConfig(hidden_size=32, num_layers=2, num_heads=2, loops=2)
CPU = torch.device("cpu")


@pytest.fixture
def trunk():
    """Weights that say something, halting neither at once nor never."""
    torch.manual_seed(0)
    trunk = Trunk(CONFIG, 5)
    with torch.no_grad():
        for parameter in trunk.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
        trunk.voice_emb.normal_(std=0.3)
        trunk.halt_head.bias.zero_()
    return trunk


def questions(count=4, drafted=False, seed=0):
    """Of all sizes and conditions; answers of other sizes than the inputs."""
    rng = np.random.default_rng(seed)
    asked = []
    for number in range(count):
        query, shape = (
            random_grid(rng, 1 + number % 3, 2 + number % 2),
            (2 + number % 2, 1 + number % 4),
        )
        condition = Condition(number % 5, number % 8, number % 2)
        draft = random_grid(rng, *shape) if drafted else None
        asked.append(Asked(query, layout.prompt(query, condition), shape, draft))
    return asked


def prepared(trunk, asked):
    rows, prompts = lay_out(asked, CPU, torch.float32)
    return rows, prompts, first_state(trunk, rows)


def dense(layer, query, key, value):
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def step_by_hand(trunk, one, y, z):
    """One supervision step of one question, every token seeing every other."""
    _, places = output_tokens(one.shape, one.draft)
    positions = torch.from_numpy(np.append(one.prompt.positions, places))
    condition = trunk.condition(torch.tensor([one.prompt.condition])) + trunk.voice_emb
    condition = condition + trunk.own_task_emb[one.prompt.condition.task]
    back = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()
    x = y @ trunk.embed_tokens + condition + back @ trunk.feedback.layers[0].weight.T
    hidden = trunk.hidden(x, positions, dense)
    return hidden, hidden @ trunk.own_head.weight.T, trunk.halt_head(hidden)[:, 0]


def test_a_step_is_a_dense_forward_of_question_and_answer_by_hand(trunk):
    asked = questions()
    rows, _, state = prepared(trunk, asked)
    first = supervision_step(trunk, rows, state)
    second = supervision_step(trunk, rows, first.state)
    for number, one in enumerate(asked):
        own, cells = rows.row == number, rows.cells[rows.row == number]
        assert int(cells.sum()) == one.shape[0] * one.shape[1]
        y, z = state.y[own], torch.zeros(int(own.sum()), 32)
        for found in (first, second):
            z, logits, halting = step_by_hand(trunk, one, y, z)
            torch.testing.assert_close(found.logits[own], logits, atol=2e-5, rtol=2e-5)
            q = halting[cells].mean()
            torch.testing.assert_close(found.q_halt[number], q, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(found.state.z[own], z, atol=2e-5, rtol=2e-5)
            y = y.clone()
            y[cells] = F.pad(logits[cells].softmax(-1), (0, 6))
            torch.testing.assert_close(found.state.y[own], y, atol=2e-5, rtol=2e-5)


def test_without_feedback_the_states_before_change_nothing(trunk):
    with torch.no_grad():
        trunk.feedback.layers[0].weight.zero_()
    rows, _, state = prepared(trunk, questions())
    other = first_state(trunk, rows, torch.randn_like(state.z))
    found = [supervision_step(trunk, rows, one).logits for one in (state, other)]
    assert torch.equal(*found)


def test_the_states_of_a_draft_are_those_of_the_reader_writing_it(trunk):
    """No token of the draft sees what comes after it."""
    asked = questions(3, drafted=True)
    rows, prompts, _ = prepared(trunk, asked)
    before = reader_states(trunk, rows, prompts)
    last = (rows.cells & (rows.row == 1)).nonzero()[-1, 0]
    tokens = rows.tokens.clone()
    tokens[last] = (tokens[last] + 1) % 10
    after = reader_states(trunk, rows._replace(tokens=tokens), prompts)
    changed = (after - before).abs().amax(1) > 1e-6
    expected = (rows.row == 1) & (torch.arange(len(tokens)) >= last)
    assert torch.equal(changed, expected)


def test_rows_show_the_draft_or_hidden_cells(trunk):
    for drafted in (False, True):
        asked = questions(drafted=drafted)
        rows, prompts, state = prepared(trunk, asked)
        shown = rows.tokens[rows.cells].tolist()
        if drafted:
            assert shown == [cell for one in asked for cell in one.draft.ravel().tolist()]
        else:
            assert set(shown) == {layout.HIDDEN}
        assert prompts.tolist() == [len(one.prompt.tokens) for one in asked]
        assert torch.equal(state.y.argmax(-1), rows.tokens)


# -- answering


@pytest.mark.parametrize("drafted", [False, True], ids=["hidden", "drafts"])
def test_answers_are_those_of_the_steps_one_question_at_a_time(trunk, drafted):
    asked = questions(7, drafted)
    found = TrunkRefiner(trunk, 8).refine(asked, 3, keep_history=True)
    for one, answer in zip(asked, found, strict=True):
        rows, prompts, _ = prepared(trunk, [one])
        z = reader_states(trunk, rows, prompts) if drafted else None
        steps = supervision_steps(trunk, rows, first_state(trunk, rows, z), 3)
        told = [p.logits[rows.cells].log_softmax(-1) for p in steps]
        grids = [own.argmax(-1).view(one.shape).numpy() for own in told]
        assert answer.grid.shape == one.shape
        assert answer.grid.dtype == np.uint8
        assert answer.steps == len(answer.history) == 3
        assert all(np.array_equal(a, b) for a, b in zip(answer.history, grids, strict=True))
        assert np.array_equal(answer.grid, grids[-1])
        assert answer.log_p == pytest.approx(float(told[-1].detach().amax(-1).sum()), abs=1e-4)


def test_batches_of_any_composition_give_the_same_answers(trunk):
    asked = [x for pair in zip(questions(6), questions(6, True, 1), strict=True) for x in pair]
    refiner, done = TrunkRefiner(trunk, 4), []
    expected = refiner.refine(asked, 2)
    for tokens in (1, 40, 10**6):
        found = refiner.refine(asked, 2, tokens_per_batch=tokens, advance=done.append)
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.grid, other.grid)
            assert (one.q, one.log_p) == pytest.approx((other.q, other.log_p), abs=1e-4)
    assert sum(done) == 3 * len(asked)
    found = refiner.refine(asked[::-1], 2)[::-1]
    assert all(np.array_equal(a.grid, b.grid) for a, b in zip(found, expected, strict=True))
    assert refiner.refine([]) == []


def test_an_answer_takes_all_steps_and_its_history_has_each(trunk):
    """Also where the halting logit is positive at once, as in the evaluation of the TRM paper."""
    with torch.no_grad():
        trunk.halt_head.bias.fill_(100.0)
    asked, refiner = questions(8), TrunkRefiner(trunk, 4)
    every = [refiner.refine(asked, steps) for steps in range(1, 5)]
    for number, one in enumerate(refiner.refine(asked, keep_history=True)):
        assert one.steps == len(one.history) == 4
        for step, grid in enumerate(one.history):
            assert np.array_equal(grid, every[step][number].grid)
        assert one.q == pytest.approx(every[3][number].q, abs=1e-4)
        assert one.log_p == pytest.approx(every[3][number].log_p, abs=1e-4)
    assert len({one.q for answers in every for one in answers}) > 8


def test_where_z_does_not_pass_every_step_hears_the_first(trunk):
    asked = questions(3, drafted=True)
    rows, prompts, _ = prepared(trunk, asked)
    z = reader_states(trunk, rows, prompts)
    state, trunk.passes_z = first_state(trunk, rows, z), False
    for answer in supervision_steps(trunk, rows, state, 3):
        expected = supervision_step(trunk, rows, state)
        torch.testing.assert_close(answer.logits, expected.logits)
        state = State(expected.state.y, z)
    other = trunk.cast(torch.float32)
    other.passes_z = True
    answers = [TrunkRefiner(one, 3).refine(asked) for one in (other, trunk.cast(torch.float32))]
    assert all(one.log_p != other.log_p for one, other in zip(*answers, strict=True))
    cells = rows.cells & (rows.row == 0)
    log_p = float(answer.logits[cells].log_softmax(-1).detach().amax(-1).sum())
    assert answers[1][0].log_p == pytest.approx(log_p, abs=1e-4)


def test_a_task_has_a_vector_that_only_trm_hears(trunk):
    rows, prompts, state = prepared(trunk, questions(3))
    said = lambda: (
        supervision_step(trunk, rows, state).logits,
        reader_states(trunk, rows, prompts),
    )
    before = said()
    with torch.no_grad():
        trunk.own_task_emb += torch.randn_like(trunk.own_task_emb)
    after = said()
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.equal(before[1], after[1])


def test_aligned_states_of_a_draft_change_the_answer(trunk):
    asked = questions(6, drafted=True)
    q = [
        [one.q for one in TrunkRefiner(trunk, 4, aligned=aligned).refine(asked, 1)]
        for aligned in (True, False)
    ]
    assert np.abs(np.subtract(*q)).min() > 1e-4


def test_questions_of_about_one_length_go_together_and_drafts_apart():
    asked = [*questions(6), *questions(6, True)]
    found = list(batches(asked, 40))
    assert sorted(itertools.chain(*found)) == list(range(12))
    assert all(len({asked[i].draft is None for i in batch}) == 1 for batch in found)
    assert [len(batch) for batch in batches(asked, 1)] == [1] * 12
