"""Scoring that reads once what candidates share gives what transformers' cache gives."""

import numpy as np
import pytest
import torch
from test_packed import CONFIG, FULL, INJECTED, LOOPED, SIDE, new_prompts, new_reader

from arctrm.reader import scoring
from arctrm.reader.grammar import num_tokens
from arctrm.reader.lean import Lean
from arctrm.reader.scoring import reads_shared_once, score

BATCHES = (1, 3, 16)


def near_copies(rng, count):
    """A grid, others that differ from it in a cell or in size, a copy, and one of its own."""
    first = rng.integers(0, 10, (5, 4)).astype(np.uint8)
    found = [first, first[:3].copy(), np.pad(first, ((0, 1), (0, 0))), first.copy(), first[:, :2]]
    while len(found) < count - 1:
        other = first.copy()
        other[tuple(rng.integers(0, side) for side in first.shape)] = rng.integers(0, 10)
        found.append(other)
    found.append(rng.integers(0, 10, (2, 6)).astype(np.uint8))
    return [found[i] for i in rng.permutation(len(found))]


def candidates():
    """Of ten prompts: many, one, none."""
    rng = np.random.default_rng(0)
    return [near_copies(rng, 9) if i % 3 else near_copies(rng, 7)[: i % 2] for i in range(10)]


def through_cache(monkeypatch, *given, **options):
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "reads_shared_once", lambda reader: False)
        return score(*given, **options)


@pytest.mark.parametrize(
    "config", [CONFIG, FULL, LOOPED, INJECTED], ids=["causal", "full", "looped", "injected"]
)
@pytest.mark.parametrize("batch_size", BATCHES)
def test_scores_are_those_of_the_cache_whatever_is_shared(config, batch_size, monkeypatch):
    reader, asked, grids = new_reader(config=config), new_prompts(10), candidates()
    assert reads_shared_once(reader)
    given = {"max_side": SIDE + 2, "batch_size": batch_size}
    expected = through_cache(monkeypatch, reader, asked, grids, **given)
    found = score(reader, asked, grids, **given)
    assert [len(own) for own in found] == [len(own) for own in grids]
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, atol=2e-4, rtol=1e-6)


def test_equal_grids_have_equal_scores_wherever_they_stand():
    reader, asked = new_reader(), new_prompts(2)[:1]
    grids = near_copies(np.random.default_rng(3), 12)
    (found,) = score(reader, asked, [grids])
    for grid, value in zip(grids, found, strict=True):
        same = [v for g, v in zip(grids, found, strict=True) if np.array_equal(g, grid)]
        assert set(same) == {value}


def test_what_is_shared_is_read_once(monkeypatch):
    reader, asked = new_reader(), new_prompts(3)[:2]
    first = np.zeros((6, 6), np.uint8)
    last_row = [first.copy() for _ in range(10)]
    for colour, grid in enumerate(last_row):
        grid[5, 5] = colour
    read = []
    hidden = Lean.hidden

    def counted(self, tokens, *given):
        read.append(len(tokens))
        return hidden(self, tokens, *given)

    monkeypatch.setattr(Lean, "hidden", counted)
    score(reader, asked, [last_row, [first]])
    whole, rest = num_tokens(first) - 1, 2  # the last cell and the last row's end
    prompts = sum(len(prompt.tokens) for prompt in asked)
    assert sum(read) == prompts + 2 * whole + 9 * rest
    assert len(read) == 1 + 10


def test_no_candidates_at_all_read_nothing(monkeypatch):
    reader = new_reader()
    monkeypatch.setattr(Lean, "hidden", None)
    assert score(reader, new_prompts(3), [[], [], []]) == [[], [], []]


def test_in_bfloat16_scores_are_near_those_of_the_cache(monkeypatch):
    reader, asked, grids = new_reader(), new_prompts(10), candidates()
    reader.to(torch.bfloat16).dtype = torch.bfloat16
    expected = through_cache(monkeypatch, reader, asked, grids)
    for own, other in zip(score(reader, asked, grids), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=0.03)
