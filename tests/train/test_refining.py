"""First answers: how much is hidden and wrong, what a draft shows, and that no label leaks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arctrm.config import DataConfig, TRMConfig, TrunkConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.task import Pair
from arctrm.data.views import View
from arctrm.model.layout import HIDDEN, ROW_END, pair_tokens
from arctrm.model.trunk import Trunk
from arctrm.train import sequences as s
from arctrm.train.losses import IGNORE
from arctrm.train.refining import RIGHT_DRAFTS, questions, start
from arctrm.train.source import OUTPUT, PairSource
from helpers import random_grid, random_task

CPU = torch.device("cpu")
TOKENS = 4096


def square(count=40, side=12):
    """A base set of large square grids, one task a pair: many cells, and every draft fits."""
    rng = np.random.default_rng(0)
    tasks = [random_task(rng, f"{i:03}", pairs=1, side=side) for i in range(count)]
    return base_set_from_tasks({"a": [replace(task, test=()) for task in tasks]}, None, 0)


def sequences_of(base, **data):
    source = PairSource(base, DataConfig(num_aug=50, **data), 0, CPU)
    return s.Sequences(source, torch.float32, whole=True)


def drawn(base, tokens=TOKENS, seed=0, **data):
    torch.manual_seed(seed)
    sequences = sequences_of(base, **data)
    return sequences, sequences.next_batch(sequences.draw(64), tokens)


def with_drafts(sequences, grids, right=False):
    """Drafts of all pairs behind the pairs of the source."""
    source = sequences.source
    num_pairs, begin = len(source.pairs), len(source.cells)
    rows = source.pairs.clone()
    for row, grid in zip(rows, grids, strict=True):
        row[OUTPUT] = torch.tensor([begin, *grid.shape])
        begin += grid.size
    source.cells = torch.cat((source.cells, *(torch.from_numpy(g).ravel() for g in grids)))
    source.pairs = torch.cat((source.pairs, rows))
    there = torch.ones(num_pairs, dtype=torch.bool)
    return SimpleNamespace(num_pairs=num_pairs, there=there, right=there & right)


def test_labels_are_the_colours_of_all_answer_cells_and_nothing_else(base):
    sequences, batch = drawn(base)
    asked = questions(batch, sequences, TRMConfig())
    for index, row in enumerate(batch.rows):
        if not row[s.LENGTH]:
            continue
        own = batch.row == index
        view = View(int(row[s.DIHEDRAL]), tuple(row[s.COLOURS].tolist()))
        pair = base.pair(int(row[s.PAIR]))
        answer = view.apply(pair.output)
        labels = asked.labels[own]
        assert torch.equal(labels[labels != IGNORE], torch.from_numpy(answer.ravel()).long())
        shown = asked.rows.tokens[own].numpy()
        prompt = pair_tokens(Pair(view.apply(pair.input)))[0]
        assert asked.prompts[index] == len(prompt)
        np.testing.assert_array_equal(shown[: len(prompt)], prompt)
        size = (len(answer), -1)
        assert (shown[len(prompt) : -1].reshape(size)[:, -1] == ROW_END).all()
    assert torch.equal(asked.rows.cells, asked.labels != IGNORE)
    assert not asked.rows.cells[batch.row >= len(batch.rows)].any()
    assert torch.equal(asked.rows.condition, batch.condition)


def test_a_share_of_the_cells_is_hidden_uniform_over_rows_and_all_of_some_rows():
    base = square()
    shares = []
    for seed in range(12):
        sequences, batch = drawn(base, 4 * TOKENS, seed)
        asked = questions(batch, sequences, TRMConfig(hidden_whole=0.25, noise=0.0))
        for index in range(int((batch.rows[:, s.LENGTH] > 0).sum())):
            cells = asked.rows.cells & (batch.row == index)
            shown = asked.rows.tokens[cells]
            shares.append((shown == HIDDEN).float().mean().item())
            there = shown != HIDDEN
            assert torch.equal(shown[there], asked.labels[cells][there])
    shares = np.array(shares)
    assert (shares == 1).mean() == pytest.approx(0.25, abs=0.06)
    own = shares[shares < 1]
    for quarter in (0.25, 0.5, 0.75):
        assert (own < quarter).mean() == pytest.approx(quarter, abs=0.08)


def test_a_share_of_the_shown_cells_is_wrong_in_every_other_row():
    sequences, batch = drawn(square(), 8 * TOKENS)
    asked = questions(batch, sequences, TRMConfig(hidden_whole=0.0, noise=0.3))
    shown = asked.rows.cells & (asked.rows.tokens != HIDDEN)
    wrong = asked.rows.tokens != asked.labels
    even = batch.row % 2 == 0
    assert not wrong[shown & ~even].any()
    assert wrong[shown & even].float().mean() == pytest.approx(0.3 * 0.9, abs=0.03)
    assert (asked.rows.tokens[shown] < 10).all()


def test_a_drafted_row_shows_the_whole_draft_under_its_view_and_asks_for_the_true_answer():
    base = square(side=7)
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    sequences = sequences_of(base)
    grids = [random_grid(rng, 7, 7) for _ in range(base.num_pairs)]
    drafts = with_drafts(sequences, grids)
    batch = sequences.next_batch(sequences.draw(64), TOKENS)
    config = TRMConfig(draft_share=1.0, hidden_whole=1.0)
    asked = questions(batch, sequences, config, drafts)
    plain = questions(batch, sequences, TRMConfig(hidden_whole=1.0), drafts)
    assert torch.equal(asked.labels, plain.labels)
    assert not plain.drafted.any()
    for index, row in enumerate(batch.rows[batch.rows[:, s.LENGTH] > 0]):
        assert asked.drafted[index]
        view = View(int(row[s.DIHEDRAL]), tuple(row[s.COLOURS].tolist()))
        expected = view.apply(grids[int(row[s.PAIR])])
        shown = asked.rows.tokens[asked.rows.cells & (batch.row == index)]
        assert torch.equal(shown, torch.from_numpy(expected.ravel()).long())


def test_drafts_of_another_size_are_not_shown_and_right_ones_seldom():
    base = square(side=5)
    rng = np.random.default_rng(1)
    config = TRMConfig(draft_share=0.8)
    for shape, right, expected in (
        ((5, 5), False, 0.8),
        ((5, 5), True, 0.8 * RIGHT_DRAFTS),
        ((5, 6), False, 0.0),
    ):
        torch.manual_seed(0)
        sequences = sequences_of(base)
        grids = [random_grid(rng, *shape) for _ in range(base.num_pairs)]
        drafts = with_drafts(sequences, grids, right)
        batch = sequences.next_batch(sequences.draw(400), 400 * 64)
        share = questions(batch, sequences, config, drafts).drafted.float().mean()
        assert share == pytest.approx(expected, abs=0.07)
        drafts.there[:] = False
        assert not questions(batch, sequences, config, drafts).drafted.any()


def test_a_changed_answer_changes_only_the_cells_that_are_shown(base):
    """The whole output is changed in the data set itself; the same rows are drawn."""
    sequences, batch = drawn(base)
    pair = int(batch.rows[1, s.PAIR])
    offset, height, width = base.pairs[pair, OUTPUT]
    cells = base.cells.copy()
    cells[offset : offset + height * width] = (cells[offset : offset + height * width] + 1) % 10
    twins, twin = drawn(replace(base, cells=cells))
    assert torch.equal(twin.rows, batch.rows)
    found = []
    for of, own in ((sequences, batch), (twins, twin)):
        torch.manual_seed(5)
        found.append(questions(own, of, TRMConfig(hidden_whole=0.5)))
    one, other = found
    changed = one.rows.tokens != other.rows.tokens
    assert (one.labels != other.labels).any()
    assert (one.rows.cells & (one.rows.tokens != HIDDEN))[changed].all()
    assert (one.labels != other.labels)[changed].all()
    for name in ("positions", "row", "cells", "condition"):
        assert torch.equal(getattr(one.rows, name), getattr(other.rows, name))
    whole = TRMConfig(hidden_whole=1.0)
    assert torch.equal(*(questions(own, sequences, whole).rows.tokens for own in (batch, twin)))


def test_only_drafted_rows_begin_with_the_readers_states():
    base = square(side=6)
    rng = np.random.default_rng(2)
    torch.manual_seed(0)
    sequences = sequences_of(base)
    drafts = with_drafts(sequences, [random_grid(rng, 6, 6) for _ in range(base.num_pairs)])
    batch = sequences.next_batch(sequences.draw(24), TOKENS)
    asked = questions(batch, sequences, TRMConfig(draft_share=0.5), drafts)
    assert 0 < asked.drafted.sum() < 24
    trunk = Trunk(TrunkConfig(hidden_size=32, num_heads=2, num_layers=2), base.num_tasks)
    assert not start(trunk, asked, aligned=False).z.any()
    z = start(trunk, asked, aligned=True).z
    of_draft = asked.drafted[batch.own_row] & (batch.row < len(batch.rows))
    assert not z[~of_draft].any()
    assert (z[of_draft].abs().sum(1) > 0).all()
