"""Decoding that follows drafts gives what transformers' cache gives, in fewer passes."""

import itertools

import numpy as np
import pytest
import torch
from test_packed import CONFIG, FULL, INJECTED, LOOPED, SIDE, new_prompts, new_reader

from arctrm.reader import decoding
from arctrm.reader.decoding import Sampling, _CachedDecoder, _results, decode, follows_drafts
from arctrm.reader.drafted_decoding import DraftedDecoder
from arctrm.reader.grammar import choice_ids
from arctrm.reader.lean import Lean
from arctrm.reader.packed_decoding import PackedDecoder
from arctrm.reader.tokens import prompt

BOUNDS = [6 + i % 26 for i in range(40)]


def cached(reader, prompts, bounds):
    """Decoded through the cache of transformers."""
    spelled = _CachedDecoder(reader, Sampling(), SIDE).decode(prompts, bounds, None, ())
    return _results(*spelled, bounds, choice_ids(reader.grid_tokens))


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert (one.grid is None) == (other.grid is None)
        assert one.log_probability == pytest.approx(other.log_probability, abs=2e-4)


def drafts_of(expected, rng):
    """Right, right but for some cells, of another size, too large, none, in turn."""
    drafts = []
    for index, one in enumerate(expected):
        grid = one.grid
        if grid is None or index % 5 == 4:
            grid = rng.integers(0, 10, (3, 3)).astype(np.uint8)
        elif index % 5 == 1:
            grid = np.where(rng.random(grid.shape) < 0.3, (grid + 1) % 10, grid).astype(np.uint8)
        elif index % 5 == 2:
            grid = np.pad(grid, ((0, 1), (0, 0)))
        elif index % 5 == 3:
            grid = np.zeros((SIDE + 1, 2), np.uint8)
        drafts.append(None if index % 7 == 6 else grid)
    return drafts


@pytest.mark.parametrize(
    "config", [CONFIG, FULL, LOOPED, INJECTED], ids=["causal", "full", "looped", "injected"]
)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_what_comes_out_is_cached_decoding_whatever_the_drafts(config, batch_size):
    reader, asked = new_reader(config=config), new_prompts(40)
    assert follows_drafts(reader)
    expected = cached(reader, asked, BOUNDS)
    assert 2 <= sum(one.grid is not None for one in expected) < 35
    given = {"max_side": SIDE, "max_output_tokens": BOUNDS, "batch_size": batch_size}
    same(decode(reader, asked, **given), expected)
    for seed in range(3):
        drafts = drafts_of(expected, np.random.default_rng(seed))
        same(decode(reader, asked, drafts=drafts, **given), expected)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_window_changes_nothing(window, monkeypatch):
    for name in ("FIRST_WINDOW", "LEAST_WINDOW", "MOST_WINDOW"):
        monkeypatch.setattr(f"arctrm.reader.drafted_decoding.{name}", window)
    reader, asked = new_reader(), new_prompts(40)
    expected = cached(reader, asked, BOUNDS)
    drafts = drafts_of(expected, np.random.default_rng(0))
    given = {"max_side": SIDE, "max_output_tokens": BOUNDS}
    same(decode(reader, asked, drafts=drafts, **given), expected)


@pytest.fixture
def passes(monkeypatch):
    """The tokens of each pass through the layers."""
    made = []
    hidden = Lean.hidden

    def counted(self, tokens, *rest):
        made.append(len(tokens))
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(Lean, "hidden", counted)
    return made


def long_grid(reader):
    """A prompt, and a grid of the largest size that the reader writes after it."""
    for seed in range(50):
        query = np.random.default_rng(seed).integers(0, 10, (4, 4)).astype(np.uint8)
        asked = prompt((), query, (0, 0, 0))
        (one,) = cached(reader, [asked], [400])
        if one.grid is not None and one.num_tokens > 20:
            return asked, one
    raise AssertionError("no prompt with a long answer")


def test_a_right_draft_is_read_in_few_passes(passes):
    reader = new_reader()
    asked, one = long_grid(reader)
    decode(reader, [asked], max_side=SIDE)
    assert passes == [len(asked.tokens)] + [1] * (one.num_tokens - 1)
    passes.clear()
    same(decode(reader, [asked], max_side=SIDE, drafts=[one.grid]), [one])
    # The first choice, then the rest of the draft without its end, which follows from it.
    assert passes == [len(asked.tokens), one.num_tokens - 1]


def test_a_wrong_cell_costs_one_more_pass(passes):
    reader = new_reader()
    asked, one = long_grid(reader)
    wrong = one.grid.copy()
    wrong[-1, 0] = (wrong[-1, 0] + 1) % 10
    same(decode(reader, [asked], max_side=SIDE, drafts=[wrong]), [one])
    assert len(passes) == 3


def test_a_draft_of_another_size_is_dropped_where_it_differs(passes):
    reader = new_reader()
    asked, one = long_grid(reader)
    height, width = one.grid.shape
    taller = np.zeros((height + 1, width), np.uint8)
    taller[:height] = one.grid
    if height < SIDE:
        same(decode(reader, [asked], max_side=SIDE, drafts=[taller]), [one])
        assert len(passes) == 2
        passes.clear()
    narrow = one.grid[:, : width - 1] if width > 1 else np.tile(one.grid, (1, 2))
    same(decode(reader, [asked], max_side=SIDE, drafts=[narrow]), [one])
    assert len(passes) > one.num_tokens - width - 2


def test_a_hopeless_draft_is_dropped(passes):
    """Read in vain again and again it would cost more than writing."""
    reader = new_reader()
    asked, one = long_grid(reader)
    wrong = ((one.grid + 1) % 10).astype(np.uint8)
    same(decode(reader, [asked], max_side=SIDE, drafts=[wrong]), [one])
    assert passes[-1] == 1
    assert sum(passes[1:]) < 3 * one.num_tokens + 32


def test_samples_are_drawn_as_ever(monkeypatch):
    reader, asked = new_reader(), new_prompts(6)
    given = {"mode": "sampled", "seed": 1, "max_side": SIDE}
    expected = decode(reader, asked, **given)
    monkeypatch.setattr(decoding, "DraftedDecoder", None)
    same(decode(reader, asked, drafts=[one.grid for one in expected], **given), expected)


def test_rows_that_have_ended_cost_nothing(passes):
    reader, asked = new_reader(), new_prompts(8)
    bounds = [1, 20, 1, 1, 5, 1, 1, 1]
    decode(reader, asked, max_side=SIDE, max_output_tokens=bounds)
    ends = [one.num_tokens for one in cached(reader, asked, bounds)]
    assert passes[1:] == [sum(end > count for end in ends) for count in range(1, max(ends))]


def test_bfloat16_computes_in_bfloat16():
    reader = new_reader(dtype=torch.bfloat16)
    decoder = DraftedDecoder(reader, SIDE)
    row = decoder._row(new_prompts(2)[0], 5, None)
    assert row.held.dtype == torch.bfloat16
    (one,) = decode(reader, new_prompts(2)[:1], max_side=SIDE)
    assert one.num_tokens > 0


@pytest.mark.parametrize("way", ["drafted", "cached", "packed"])
def test_rows_that_have_not_ended_at_the_deadline_give_no_grid(way, monkeypatch):
    reader, asked = new_reader(), new_prompts(40)
    expected = cached(reader, asked, BOUNDS)
    ticks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    given = [asked, BOUNDS, None, [None] * len(asked)]
    if way == "packed":  # looks at the clock at every eighth token
        sizes = [len(p.tokens) + bound for p, bound in zip(asked, BOUNDS, strict=True)]
        decoder = PackedDecoder(reader, sizes, None, SIDE, 10**4, deadline=0.5)
    elif way == "cached":
        decoder = _CachedDecoder(reader, Sampling(), SIDE, deadline=14.5)
    else:
        decoder = DraftedDecoder(reader, SIDE, deadline=14.5)
    found = _results(*decoder.decode(*given), BOUNDS, choice_ids(reader.grid_tokens))
    written = 16
    given_up = [one.grid is not None and one.num_tokens > written for one in expected]
    assert any(given_up)
    assert any(one.grid is not None for one in found)
    for one, other, late in zip(found, expected, given_up, strict=True):
        assert one.tokens == other.tokens[:written]
        assert (one.grid is None) == (other.grid is None or late)


def test_a_deadline_that_has_passed_costs_a_token_at_most(passes):
    reader, asked = new_reader(), new_prompts(5)
    found = decode(reader, asked, max_side=SIDE, deadline=0.0)
    assert all(one.grid is None and one.num_tokens == 1 for one in found)
    assert len(passes) == 1
