"""Decoding equals the model's own probabilities, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from plain_reader import (
    ARCHITECTURES,
    IDS,
    TOKENS,
    PlainReader,
    continuations,
    plain_log_p,
    prompts,
    spelled,
)

from arctrm.errors import ResourceError
from arctrm.reader.decoding import decode

SIDE = 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reader(request):
    return PlainReader(request.param)


@pytest.fixture(scope="module")
def llama():
    return PlainReader()


def same(one, other, tolerance=1e-5):
    assert [d.tokens for d in one] == [d.tokens for d in other]
    log_p = [[d.log_probability for d in many] for many in (one, other)]
    np.testing.assert_allclose(*log_p, atol=tolerance)
    for a, b in zip(one, other, strict=True):
        assert (a.grid is None) == (b.grid is None)
        assert a.grid is None or np.array_equal(a.grid, b.grid)


def greedy_without_cache(reader, prompt, max_side):
    choices = []
    while not choices or choices[-1] != 11:
        logits = reader.plain_logits(prompt, [IDS[choice] for choice in choices])[-1]
        choices.append(max(continuations(choices, max_side), key=lambda choice: logits[choice]))
    return choices


def test_greedy_decoding_is_that_of_the_model_without_a_cache(reader):
    for prompt, found in zip(prompts(6), decode(reader, prompts(6), max_side=SIDE), strict=True):
        choices = greedy_without_cache(reader, prompt, SIDE)
        assert found.tokens == tuple(IDS[choice] for choice in choices)
        assert spelled(found.grid) == choices
        assert found.num_tokens == len(choices)
        assert found.log_probability == pytest.approx(
            plain_log_p(reader, prompt, choices, SIDE), abs=1e-5
        )


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_a_batch_of_one_and_a_batch_of_sixteen_give_the_same(reader, mode):
    asked = prompts(16, longest=70)
    given = {"mode": mode, "max_side": SIDE, "seed": 3}
    together = decode(reader, asked, batch_size=16, **given)
    same(decode(reader, asked, batch_size=1, **given), together)
    same(decode(reader, asked, batch_size=5, **given), together)
    alone = [decode(reader, [p], streams=[i], **given)[0] for i, p in enumerate(asked)]
    same(alone, together)


def test_results_come_in_the_order_of_the_prompts(llama):
    asked = prompts(9)
    found = decode(llama, asked, max_side=SIDE)
    same(decode(llama, asked[::-1], batch_size=4, max_side=SIDE)[::-1], found)


def test_samples_follow_the_probabilities_of_the_model(llama):
    prompt = prompts(1)[0]
    found = decode(llama, [prompt] * 2000, mode="sampled", max_side=1, batch_size=2000)
    counts = np.bincount([d.grid[0, 0] for d in found], minlength=10) / 2000
    expected = np.exp([plain_log_p(llama, prompt, [c, 10, 11], 1) for c in range(10)])
    np.testing.assert_allclose(counts, expected, atol=0.04)
    assert np.isclose(expected.sum(), 1)


def test_samples_of_one_prompt_differ_and_their_seed_brings_them_back(llama):
    asked = prompts(1) * 8
    first = decode(llama, asked, mode="sampled", max_side=SIDE, seed=1)
    assert len({d.tokens for d in first}) > 4
    same(decode(llama, asked, mode="sampled", max_side=SIDE, seed=1), first)
    other = decode(llama, asked, mode="sampled", max_side=SIDE, seed=2)
    assert [d.tokens for d in other] != [d.tokens for d in first]


def test_a_low_temperature_is_greedy_and_does_not_enter_the_log_probability(llama):
    asked = prompts(6)
    cold = decode(llama, asked, mode="sampled", temperature=1e-4, max_side=SIDE)
    same(cold, decode(llama, asked, max_side=SIDE))


def test_identical_prompts_are_read_once_per_batch(llama):
    one, other = prompts(2)
    llama.calls.clear()
    found = decode(llama, [one, other, one, one], max_side=SIDE)
    assert llama.calls[0][0] == 2
    same([found[0]] * 2, [found[2], found[3]], tolerance=0)


def test_finished_rows_are_dropped(llama):
    asked, bounds = prompts(8), [1, 60, 1, 1, 12, 1, 1, 1]
    llama.calls.clear()
    found = decode(llama, asked, max_output_tokens=bounds)
    steps = [rows for rows, length in llama.calls if length == 1]
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[10], steps[-1]) == (8, 2, 2)
    for i, bound in enumerate(bounds):
        same([found[i]], decode(llama, [asked[i]], max_output_tokens=bound))


def test_dropping_finished_rows_changes_no_sample():
    reader = PlainReader(rare=6)
    asked = prompts(16)
    given = {"mode": "sampled", "max_side": 8}
    found = decode(reader, asked, **given)
    steps = [rows for rows, length in reader.calls if length == 1]
    assert steps[-1] < 8
    same(decode(reader, asked, batch_size=1, **given), found)


def test_a_row_that_reaches_its_bound_gives_no_grid(llama):
    asked = prompts(6)
    full = decode(llama, asked, max_side=SIDE)
    bounds = [d.num_tokens - (i % 2) for i, d in enumerate(full)]
    found = decode(llama, asked, max_side=SIDE, max_output_tokens=bounds)
    assert [d.num_tokens for d in found] == bounds
    assert [d.grid is None for d in found] == [bool(i % 2) for i in range(6)]
    assert all(a.tokens == b.tokens[: a.num_tokens] for a, b in zip(found, full, strict=True))


def test_the_largest_grids_fit():
    """A reader that never ends of its own accord spells 30 x 30 cells."""
    reader = PlainReader()
    with torch.no_grad():
        for token in (TOKENS.row_end, TOKENS.end):
            reader.model.lm_head.weight[token] = 0
        reader.model.model.norm.weight[:] = 0  # all logits 0: the first choice allowed is taken
    found = decode(reader, prompts(2))
    assert [d.grid.shape for d in found] == [(30, 30)] * 2
    assert found[0].num_tokens == 931


def test_progress_counts_every_prompt(llama):
    done = []
    decode(llama, prompts(7), max_side=2, batch_size=3, advance=done.append)
    assert done == [3, 3, 1]


def test_no_prompts_give_no_results(llama):
    assert decode(llama, []) == []


class Starved(PlainReader):
    def logits(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("batch_size", "cure"), [(64, "--set reader.batch_size=32"), (1, "a smaller model")]
)
def test_out_of_memory_is_one_sentence_with_the_key(batch_size, cure):
    with pytest.raises(ResourceError, match=f"reader.batch_size = {batch_size}[;,] .*{cure}"):
        decode(Starved(), prompts(2), batch_size=batch_size)


def test_a_temperature_of_zero_is_refused(llama):
    with pytest.raises(ValueError, match="greedy"):
        decode(llama, prompts(1), mode="sampled", temperature=0)
