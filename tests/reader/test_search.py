"""The threshold search finds exactly the grids above the threshold: compared with brute force."""

import itertools
import math

import numpy as np
import pytest
from plain_reader import ARCHITECTURES, IDS, PlainReader, depth_first, prompts

from arctrm.reader.decoding import decode
from arctrm.reader.scoring import score
from arctrm.reader.search import threshold_search


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reader(request):
    return PlainReader(request.param, rare=6)


@pytest.fixture(scope="module")
def llama():
    return PlainReader(rare=6)


def without_greedy(reader, prompt, found, min_probability, max_side):
    """What was found but the greedy grid, if that is below the threshold."""
    (greedy,) = decode(reader, [prompt], max_side=max_side)
    assert greedy.tokens in [d.tokens for d in found]
    likely = [d for d in found if d.log_probability >= math.log(min_probability)]
    assert {d.tokens for d in found} - {d.tokens for d in likely} <= {greedy.tokens}
    return likely


@pytest.mark.parametrize(("min_probability", "max_side"), [(0.1, 4), (0.02, 3), (0.05, 5)])
def test_the_search_finds_what_a_depth_first_search_without_a_cache_finds(
    reader, min_probability, max_side
):
    asked = prompts(6)
    found = threshold_search(
        reader, asked, min_probability, max_candidates=60, max_side=max_side, batch_size=200
    )
    counts = []
    for prompt, own in zip(asked, found, strict=True):
        expected = depth_first(reader, prompt, min_probability, max_side)
        likely = without_greedy(reader, prompt, own, min_probability, max_side)
        by_choices = {tuple(IDS.index(token) for token in d.tokens): d for d in likely}
        assert by_choices.keys() == expected.keys()
        for choices, log_p in expected.items():
            assert by_choices[choices].log_probability == pytest.approx(log_p, abs=1e-5)
        counts.append(len(expected))
    assert max(counts) > 1


def test_the_search_finds_what_scoring_every_grid_finds(llama):
    every = [
        np.array(cells, dtype=np.uint8).reshape(side)
        for side in ((1, 1), (1, 2), (2, 1), (2, 2))
        for cells in itertools.product(range(10), repeat=side[0] * side[1])
    ]
    prompt = prompts(3)[1]
    (scores,) = score(llama, [prompt], [every], max_side=2, batch_size=2048)
    (found,) = threshold_search(llama, [prompt], 0.005, max_candidates=200, max_side=2)
    likely = without_greedy(llama, prompt, found, 0.005, 2)
    above = {
        every[i].tobytes() + bytes(every[i].shape): scores[i]
        for i in np.flatnonzero(np.array(scores) >= math.log(0.005))
    }
    assert len(above) > 5
    got = {d.grid.tobytes() + bytes(d.grid.shape): d.log_probability for d in likely}
    assert got.keys() == above.keys()
    assert all(got[key] == pytest.approx(above[key], abs=1e-5) for key in above)


def test_a_batch_of_one_and_a_batch_of_many_find_the_same(reader):
    """Also where branches outgrow the batch and prompts are put off."""
    asked = prompts(16, longest=70)
    together = threshold_search(reader, asked, 0.03, max_side=3, batch_size=640)
    for batch_size in (1, 4, 12, 40):
        other = threshold_search(reader, asked, 0.03, max_side=3, batch_size=batch_size)
        for one, many in zip(other, together, strict=True):
            assert [d.tokens for d in one] == [d.tokens for d in many]
            np.testing.assert_allclose(
                [d.log_probability for d in one], [d.log_probability for d in many], atol=1e-5
            )


def test_rows_stay_within_the_batch_and_are_dropped_at_the_end(llama):
    asked = prompts(16)
    llama.calls.clear()
    found = threshold_search(llama, asked, 0.03, max_side=3, batch_size=20)
    assert max(len(own) for own in found) < 20
    assert max(rows for rows, _ in llama.calls) <= 20
    steps = [rows for rows, length in llama.calls if length == 1]
    assert min(steps) < 5


def test_candidates_are_distinct_and_the_most_probable_come_first(llama):
    for own in threshold_search(llama, prompts(8), 0.02, max_candidates=50, max_side=3):
        assert len({d.tokens for d in own}) == len(own)
        log_p = [d.log_probability for d in own]
        assert log_p == sorted(log_p, reverse=True)
        assert np.exp(log_p).sum() <= 1 + 1e-6


def test_the_greedy_grid_is_there_though_nothing_reaches_the_threshold(llama):
    asked = prompts(8)
    greedy = decode(llama, asked, max_side=4)
    found = threshold_search(llama, asked, 1.0, max_side=4)
    for own, best in zip(found, greedy, strict=True):
        assert [d.tokens for d in own] == [best.tokens]
        assert own[0].log_probability == pytest.approx(best.log_probability, abs=1e-5)


@pytest.mark.parametrize("max_candidates", [1, 2])
def test_no_more_than_max_candidates_the_greedy_one_among_them(llama, max_candidates):
    asked = prompts(60)
    greedy = decode(llama, asked, max_side=5)
    found = threshold_search(llama, asked, 0.002, max_candidates=max_candidates, max_side=5)
    outdone = 0
    for own, best in zip(found, greedy, strict=True):
        assert len(own) <= max_candidates
        assert best.tokens in [d.tokens for d in own]
        outdone += best.log_probability < own[0].log_probability - 1e-3
    assert max(map(len, found)) == max_candidates
    assert outdone > 0 or max_candidates == 1


def test_the_greedy_grid_outdone_by_all_others_is_kept(llama):
    asked = prompts(40)
    greedy = decode(llama, asked, max_side=3)
    every = threshold_search(llama, asked, 0.02, max_candidates=50, max_side=3)
    for best, ranked, prompt in zip(greedy, every, asked, strict=True):
        place = [d.tokens for d in ranked].index(best.tokens)
        for fewer in range(1, place + 1):
            (own,) = threshold_search(llama, [prompt], 0.02, max_candidates=fewer, max_side=3)
            assert best.tokens in [d.tokens for d in own]
    assert any(best.tokens != ranked[0].tokens for best, ranked in zip(greedy, every, strict=True))


def test_a_bound_on_tokens_leaves_the_greedy_row_without_a_grid(llama):
    asked = prompts(6)
    greedy = decode(llama, asked, max_side=4)
    bounds = [d.num_tokens - 1 for d in greedy]
    found = threshold_search(llama, asked, 0.05, max_side=4, max_output_tokens=bounds)
    for own, best in zip(found, greedy, strict=True):
        (cut,) = [d for d in own if d.grid is None]
        assert cut.tokens == best.tokens[:-1]
        assert all(d.num_tokens < best.num_tokens for d in own)


def test_identical_prompts_are_read_once_and_find_the_same(llama):
    one, other = prompts(2)
    llama.calls.clear()
    found = threshold_search(llama, [one, other, one], 0.05, max_side=3)
    assert llama.calls[0][0] == 2
    assert [d.tokens for d in found[0]] == [d.tokens for d in found[2]]


def test_progress_counts_every_prompt_once(llama):
    done = []
    threshold_search(llama, prompts(16), 0.03, max_side=3, batch_size=12, advance=done.append)
    assert sum(done) == 16
    assert threshold_search(llama, [], 0.1) == []


@pytest.mark.parametrize("min_probability", [0, 1.5, -0.1])
def test_a_threshold_that_is_no_probability_is_refused(llama, min_probability):
    with pytest.raises(ValueError, match="min_probability"):
        threshold_search(llama, prompts(1), min_probability)
