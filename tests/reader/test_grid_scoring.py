"""Scores equal the model's own probabilities and those that the decoder counts."""

import itertools

import numpy as np
import pytest
import torch
from plain_reader import (
    CONFIGS,
    PlainReader,
    grid,
    new_prompts,
    new_trunk,
    plain_log_p,
    spelled,
)
from test_decoding import Counted, readers

from arctrm.errors import ResourceError
from arctrm.reader.decoding import decode
from arctrm.reader.grammar import num_tokens
from arctrm.reader.scoring import score
from arctrm.reader.tiny import TinyReader

SIDE = 7
WAYS = ("plain", "rows", "packed", "crowded")


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
    """Of seven prompts: many, one, none."""
    rng = np.random.default_rng(0)
    return [near_copies(rng, 9) if i % 3 else near_copies(rng, 7)[: i % 2] for i in range(7)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scores_are_those_of_the_model_without_a_cache(config):
    trunk, asked, grids = new_trunk(config), new_prompts(7), candidates()
    exact = [
        [plain_log_p(trunk, prompt, spelled(one), SIDE) for one in own]
        for prompt, own in zip(asked, grids, strict=True)
    ]
    for reader in readers(trunk).values():
        for batch_size in (1, 3, None):
            found = score(reader, asked, grids, max_side=SIDE, batch_size=batch_size)
            for own, other in zip(found, exact, strict=True):
                np.testing.assert_allclose(own, other, atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("way", WAYS)
def test_scoring_what_was_decoded_gives_the_decoders_log_probability(way, mode):
    reader, asked = readers()[way], new_prompts(8)
    given = {"mode": mode, "max_side": 3, "max_output_tokens": 40}
    found = decode(reader, asked, **given)
    kept = [i for i, one in enumerate(found) if one.grid is not None]
    assert len(kept) > 3
    scores = score(reader, [asked[i] for i in kept], [[found[i].grid] for i in kept], max_side=3)
    expected = [found[i].log_probability for i in kept]
    np.testing.assert_allclose(np.ravel(scores), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_probabilities_of_all_grids_sum_to_one(way):
    """Of all of one cell, and of all that are wider: what is left is the end of the first row."""
    reader, asked = readers(new_trunk(sharp=1))[way], new_prompts(1)
    narrow = [np.array([[c]], np.uint8) for c in range(10)]
    wide = [np.array([pair], np.uint8) for pair in itertools.product(range(10), repeat=2)]
    (scores,) = score(reader, asked, [narrow], max_side=1)
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-4)
    (two,) = score(reader, asked, [wide], max_side=2)
    (one,) = score(reader, asked, [narrow], max_side=2)
    assert np.exp(one).sum() + np.exp(two).sum() < 1  # grids of two rows have the rest


def test_equal_grids_have_equal_scores_wherever_they_stand():
    reader, asked = TinyReader(new_trunk()), new_prompts(1)
    grids = near_copies(np.random.default_rng(3), 12)
    (found,) = score(reader, asked, [grids])
    for one, value in zip(grids, found, strict=True):
        alike = [v for g, v in zip(grids, found, strict=True) if np.array_equal(g, one)]
        np.testing.assert_allclose(alike, value, atol=1e-6)


def test_what_is_shared_is_read_once():
    reader, asked = Counted(new_trunk()), new_prompts(3)[:2]
    first = np.zeros((6, 6), np.uint8)
    last_row = [first.copy() for _ in range(10)]
    for colour, one in enumerate(last_row):
        one[5, 5] = colour
    score(reader, asked, [last_row, [first]])
    whole, rest = num_tokens(first) - 1, 2  # the last cell and the last row's end
    prompts = sum(len(prompt.tokens) for prompt in asked)
    assert sum(reader.passes) == prompts + 2 * whole + 9 * rest
    assert len(reader.passes) == 1 + 10


def test_packed_candidates_go_side_by_side():
    reader, asked = Counted(new_trunk(), packed=True, max_places=10**4), new_prompts(2)[:1]
    grids = near_copies(np.random.default_rng(0), 8)
    score(reader, asked, [grids])
    assert len(reader.passes) == 2
    assert reader.passes[1] == sum(num_tokens(one) - 1 for one in grids)


@pytest.mark.parametrize("way", WAYS)
def test_no_candidates_at_all_read_nothing(way):
    done, reader = [], readers()[way]
    assert score(reader, new_prompts(3), [[], [], []], advance=done.append) == [[], [], []]
    assert sum(done) == 3
    assert score(reader, [], []) == []


@pytest.mark.parametrize("way", WAYS)
def test_progress_counts_every_prompt(way):
    done, rng = [], np.random.default_rng(0)
    grids = [[grid(rng, 3) for _ in range(n)] for n in (4, 0, 1, 5, 2)]
    score(readers()[way], new_prompts(5), grids, batch_size=3, advance=done.append)
    assert sum(done) == 5
    assert len(done) > 1


def test_in_bfloat16_scores_are_near_those_of_float32():
    asked, grids = new_prompts(7), candidates()
    exact = score(TinyReader(new_trunk()), asked, grids)
    reader = TinyReader(new_trunk(dtype=torch.bfloat16))
    for own, other in zip(score(reader, asked, grids), exact, strict=True):
        np.testing.assert_allclose(own, other, rtol=0.05)


def test_out_of_memory_is_one_sentence_with_the_key():
    class Starved(PlainReader):
        def opened(self, sizes):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceError, match=r"judge\.batch_size = 8; lower it"):
        score(Starved(new_trunk()), new_prompts(1), [[np.zeros((1, 1), np.uint8)]])


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_a_cpu_but_for_rounding():
    asked, grids = new_prompts(7), candidates()
    exact = np.concatenate(score(TinyReader(new_trunk()), asked, grids))
    reader = TinyReader(new_trunk(device="cuda", dtype=torch.bfloat16))
    found = np.concatenate(score(reader, asked, grids))
    np.testing.assert_allclose(found, exact, rtol=0.05)
