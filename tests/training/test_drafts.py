"""Drafts are what the reader writes, greedily, under a view that is turned back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from joint_parts import FORMS, make, small_base, small_tasks

from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.task import Pair
from arctrm.reader.decoding import Decoded, decode
from arctrm.reader.tokens import END, ROW_END, grid_length, prompt
from arctrm.training import drafts
from arctrm.training.source import IS_TEST, OUTPUT

BOTH = pytest.mark.parametrize("form", FORMS)


def writer(form="pair", **changes):
    """A random reader that likes to end its rows and grids, and the pool it writes into."""
    hybrid, step = make({**changes, "coupling.drafted_pairs": 100}, form=form)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in hybrid.reader.named_parameters():
            parameter.normal_(std=0.25 if "llama" in name else 0.5)
        head = hybrid.reader.llama.lm_head.weight
        head[[*range(9)]] *= 0.3
        head[[ROW_END, END]] *= 2
    return hybrid, step, step.stream.drafts


def stored(pool, pair):
    offset, height, width = pool.source.pairs[pool.num_pairs + pair, OUTPUT].tolist()
    return pool.source.cells[offset : offset + height * width].view(height, width).numpy()


@BOTH
def test_a_draft_is_the_greedy_grid_under_the_view_turned_back(form):
    hybrid, step, pool = writer(form)
    torch.manual_seed(11)
    chosen = torch.randperm(pool.num_pairs)
    asked = pool.questions(chosen)
    torch.manual_seed(11)
    share, length = pool.refresh(step.reader, 100, batch_size=4)
    num_there, tokens = 0, []
    for pair, question in zip(chosen.tolist(), asked, strict=True):
        height, width = question.view.apply(question.answer).shape
        alone = decode(
            hybrid.reader,
            [prompt(question.pairs, question.query, question.condition)],
            max_output_tokens=grid_length(height + 2, width + 2) + 1,
        )[0]
        tokens.append(alone.num_tokens)
        assert pool.there[pair] == (alone.grid is not None)
        if alone.grid is not None:
            num_there += 1
            turned = question.view.apply(stored(pool, pair))
            assert np.array_equal(turned, alone.grid)
    assert num_there > 3
    assert share == 0
    assert length == pytest.approx(np.mean(tokens))


@BOTH
def test_the_reader_is_asked_about_the_pair_as_it_is_trained(form):
    _, _, pool = writer(form)
    chosen = torch.arange(pool.num_pairs)
    tasks = small_tasks()
    own = [(task, pair) for task in tasks for pair in task.demonstrations]
    sizes = set()
    for (task, pair), question in zip(own, pool.questions(chosen), strict=True):
        view = question.view
        assert np.array_equal(question.query, view.apply(pair.input))
        assert np.array_equal(question.answer, pair.output)
        assert question.condition[:2] == (int(task.id[-1]), view.dihedral)
        others = [
            Pair(view.apply(p.input), view.apply(p.output))
            for p in task.demonstrations
            if p is not pair
        ]
        for shown in question.pairs:
            assert any(
                np.array_equal(shown.input, p.input) and np.array_equal(shown.output, p.output)
                for p in others
            )
        sizes.add(len(question.pairs))
    assert sizes == {0 if form == "pair" else 2}


def test_a_right_draft_is_counted_as_right_under_any_view(monkeypatch):
    _, step, pool = writer()
    torch.manual_seed(11)
    asked = pool.questions(torch.randperm(pool.num_pairs))
    answers = [question.view.apply(question.answer) for question in asked]

    def spell(reader, prompts, *, max_output_tokens, **how):
        assert all(
            grid_length(*g.shape) < n for g, n in zip(answers, max_output_tokens, strict=True)
        )
        return [Decoded(grid, 0.0, (END,)) for grid in answers]

    monkeypatch.setattr(drafts, "decode", spell)
    torch.manual_seed(11)
    assert pool.refresh(step.reader, 100, batch_size=4) == (1, 1)
    assert pool.right.all()
    for pair in range(pool.num_pairs):
        offset, height, width = pool.source.pairs[pair, OUTPUT].tolist()
        answer = pool.source.cells[offset : offset + height * width].view(height, width)
        assert np.array_equal(stored(pool, pair), answer.numpy())


@pytest.mark.parametrize(("temperature", "same"), [(0.0, True), (2.0, False)])
def test_sampled_drafts_differ_from_round_to_round_and_greedy_ones_do_not(temperature, same):
    _, step, pool = writer()
    torch.manual_seed(11)
    asked = pool.questions(torch.arange(pool.num_pairs))
    pool.questions = lambda chosen: [asked[i] for i in chosen.tolist()]
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pool.refresh(step.reader, 100, batch_size=4, temperature=temperature)
        made.append(pool.source.pairs[pool.num_pairs :, OUTPUT].clone())
    assert torch.equal(*made) == same


def test_where_test_pairs_alone_are_heard_only_they_are_drafted():
    changes = {"coupling.heard_pairs": "test", "coupling.drafted_pairs": 100}
    _, step = make(changes, base=small_base(num_tests=2))
    step.prepare()
    pool = step.stream.drafts
    is_test = pool.source.pairs[: pool.num_pairs, IS_TEST].bool()
    assert not pool.there[~is_test].any()
    asked, questions = [], pool.questions
    pool.questions = lambda chosen: asked.extend(chosen.tolist()) or questions(chosen)
    pool.refresh(step.reader, 100, batch_size=4)
    assert sorted(asked) == is_test.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("heard", ["all", "test"])
def test_pairs_without_weight_are_not_drafted(heard):
    """They are never drawn, so nobody would see their drafts."""
    shown, unseen = small_tasks(num_tests=1), small_tasks(num_tasks=3, seed=1, num_tests=1)
    unseen = [replace(task, id=f"unseen_{task.id}") for task in unseen]
    base = base_set_from_tasks({"training": shown, "unseen": unseen}, None, 50)
    changes = {"data.subsets": ["training", "unseen"], "data.weights": {"unseen": 0.0}}
    changes |= {"coupling.heard_pairs": heard, "coupling.drafted_pairs": 100}
    _, step = make(changes, base=base)
    pool = step.stream.drafts
    asked, questions = [], pool.questions
    pool.questions = lambda chosen: asked.extend(chosen.tolist()) or questions(chosen)
    step.prepare()
    per_task = 1 if heard == "test" else 6
    assert len(asked) == per_task * len(shown)
    tasks = pool.source.pairs[asked, 0].tolist()
    assert {base.meta.task_ids[task] for task in tasks} == {task.id for task in shown}


def test_true_pairs_are_never_overwritten_nor_drawn_as_drafts():
    _, step, pool = writer()
    source = pool.source
    cells, pairs = source.cells[: pool.begin].clone(), source.pairs[: pool.num_pairs].clone()
    for pair in range(pool.num_pairs):
        pool.write(pair, np.full((30, 30), pair % 10, np.uint8))
    pool.write(0, None)
    assert torch.equal(source.cells[: pool.begin], cells)
    assert torch.equal(source.pairs[: pool.num_pairs], pairs)
    assert not pool.there[0]
    assert pool.there[1:].all()
    assert stored(pool, 4).shape == (30, 30)
    uniform = torch.tensor([0.0, 0.5, 1.0 - 1e-17, 1.0], dtype=torch.float64)
    assert source.draw_pairs(uniform).max() < pool.num_pairs
    assert step.stream.reader.by_task.max() < pool.num_pairs


def test_drafting_goes_on_where_the_random_state_and_the_carry_stand():
    def refreshed(step, pool, count):
        pool.refresh(step.reader, count, batch_size=4)
        return {name: tensor.clone() for name, tensor in pool.carry().items()}

    _, step, pool = writer()
    torch.manual_seed(5)
    saved, state = refreshed(step, pool, 4), torch.get_rng_state()
    whole = refreshed(step, pool, 6)
    _, step, pool = writer()
    for name, tensor in pool.carry().items():
        tensor.copy_(saved[name])
    torch.set_rng_state(state)
    for name, tensor in refreshed(step, pool, 6).items():
        assert torch.equal(tensor, whole[name]), name
    assert 0 < whole["drafts.there"].sum() <= 10
