"""Scores equal the model's own probabilities and those that the decoder counts."""

import itertools

import numpy as np
import pytest
from plain_reader import ARCHITECTURES, PlainReader, plain_log_p, prompts, spelled

from arctrm.reader.decoding import decode
from arctrm.reader.scoring import product_of_experts, score

SIDE = 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reader(request):
    return PlainReader(request.param)


@pytest.fixture(scope="module")
def llama():
    return PlainReader()


def grids(count, largest=6, seed=0):
    rng = np.random.default_rng(seed)
    sides = [(1, 1), (1, largest), (largest, 1), *rng.integers(1, largest + 1, size=(count, 2))]
    return [rng.integers(10, size=side).astype(np.uint8) for side in sides[:count]]


def test_cached_and_uncached_scores_agree(reader):
    asked, candidates = prompts(4), [grids(5, seed=seed) for seed in range(4)]
    scores = score(reader, asked, candidates)
    for prompt, own, values in zip(asked, candidates, scores, strict=True):
        plain = [plain_log_p(reader, prompt, spelled(grid), 30) for grid in own]
        np.testing.assert_allclose(values, plain, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_scoring_what_was_decoded_gives_the_decoders_log_probability(reader, mode):
    asked = prompts(8)
    found = decode(reader, asked, mode=mode, max_side=SIDE)
    scores = score(reader, asked, [[d.grid] for d in found], max_side=SIDE)
    np.testing.assert_allclose(
        np.ravel(scores), [d.log_probability for d in found], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_do_not_depend_on_the_batch(reader, batch_size):
    asked, candidates = prompts(5), [grids(n, seed=n) for n in (4, 0, 1, 7, 2)]
    scores = score(reader, asked, candidates, batch_size=batch_size)
    assert [len(own) for own in scores] == [4, 0, 1, 7, 2]
    for prompt, own, values in zip(asked, candidates, scores, strict=True):
        alone = [score(reader, [prompt], [[grid]])[0][0] for grid in own]
        np.testing.assert_allclose(values, alone, atol=1e-5, rtol=1e-6)


def test_a_prompt_is_read_once_for_all_its_candidates(llama):
    one, other = prompts(2, longest=30)
    llama.calls.clear()
    score(llama, [one, other, one], [grids(3), grids(2), grids(4)])
    read, continued = llama.calls
    assert read == (2, max(len(one.tokens), len(other.tokens)))
    assert continued[0] == 9


def test_the_probabilities_of_all_grids_sum_to_one(llama):
    every = [
        np.array(cells, dtype=np.uint8).reshape(side)
        for side in ((1, 1), (1, 2), (2, 1), (2, 2))
        for cells in itertools.product(range(10), repeat=side[0] * side[1])
    ]
    scores = score(llama, prompts(1), [every], max_side=2, batch_size=2048)
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)


def test_no_candidates_ask_nothing_of_the_reader(llama):
    llama.calls.clear()
    done = []
    assert score(llama, prompts(3), [[], [], []], advance=done.append) == [[], [], []]
    assert llama.calls == []
    assert sum(done) == 3


def test_a_product_of_experts_sums_log_probabilities_over_views():
    assert product_of_experts([[-1.0, -2.0], [-0.5, -4.0], [-3.0, -0.25]]) == [-4.5, -6.25]


def test_views_that_score_different_numbers_of_candidates_are_refused():
    with pytest.raises(ValueError):
        product_of_experts([[-1.0, -2.0], [-0.5]])
