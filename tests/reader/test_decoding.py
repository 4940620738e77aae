"""What is written is what the model itself would write, whatever is beside it and however."""

import itertools

import numpy as np
import pytest
import torch
from plain_reader import (
    CONFIGS,
    PlainReader,
    new_prompts,
    new_trunk,
    plain_greedy,
    plain_log_p,
    spelled,
)

from arctrm.errors import ResourceError
from arctrm.model import layout
from arctrm.reader import decoding
from arctrm.reader.decoding import decode
from arctrm.reader.scoring import score
from arctrm.reader.tiny import TinyReader

SIDE = 5
BOUNDS = [6 + i % 26 for i in range(24)]


def readers(trunk=None):
    """The same trunk behind every store, with enough places and with few."""
    trunk = trunk or new_trunk()
    return {
        "plain": PlainReader(trunk),
        "rows": TinyReader(trunk),
        "packed": TinyReader(trunk, packed=True, max_places=10**5),
        "crowded": TinyReader(trunk, packed=True, max_places=150),
    }


WAYS = list(readers())


class Counted(TinyReader):
    """Keeps the tokens of each pass through the layers."""

    def __init__(self, trunk, **options):
        super().__init__(trunk, **options)
        self.passes = []

    def store(self, prompts, room):
        made = super().store(prompts, room)
        read, append = made.read, made.append

        def counted_read():
            self.passes.append(sum(len(prompt.tokens) for prompt in prompts))
            return read()

        def counted_append(rows, *given):
            self.passes.append(len(rows))
            return append(rows, *given)

        made.read, made.append = counted_read, counted_append
        return made


def same(found, expected, tolerance=2e-4):
    for one, other in zip(found, expected, strict=True):
        assert one.choices == other.choices
        assert (one.grid is None) == (other.grid is None)
        assert one.grid is None or np.array_equal(one.grid, other.grid)
        assert one.log_probability == pytest.approx(other.log_probability, abs=tolerance)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_greedy_decoding_is_that_of_the_model_without_a_cache(config):
    trunk, asked = new_trunk(config), new_prompts(6)
    expected = [plain_greedy(trunk, prompt, SIDE, bound=25) for prompt in asked]
    assert any(len(choices) < 25 for choices in expected)
    for way, reader in readers(trunk).items():
        if way != "plain":
            found = decode(reader, asked, max_side=SIDE, max_output_tokens=25)
            for prompt, choices, one in zip(asked, expected, found, strict=True):
                assert list(one.choices) == choices
                assert one.num_tokens == len(choices)
                log_p = plain_log_p(trunk, prompt, choices, SIDE)
                assert one.log_probability == pytest.approx(log_p, abs=2e-4)
                assert one.grid is None or spelled(one.grid) == choices


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_every_store_writes_the_same_whatever_the_batch(mode):
    asked, made = new_prompts(24), readers()
    given = {"mode": mode, "temperature": 0.8, "seed": 5, "max_side": SIDE}
    given["max_output_tokens"] = BOUNDS
    expected = decode(made["rows"], asked, **given)
    assert 2 < sum(one.grid is None for one in expected) < 22
    for way in ("rows", "packed", "crowded"):
        for batch_size in (None, 7):
            same(decode(made[way], asked, batch_size=batch_size, **given), expected)
    few = {**given, "max_output_tokens": BOUNDS[:6]}
    same(decode(made["plain"], asked[:6], **few), expected[:6])
    for i in range(0, 24, 5):
        alone = {**given, "max_output_tokens": BOUNDS[i]}
        same(decode(made["rows"], [asked[i]], streams=[i], **alone), [expected[i]])


def test_samples_follow_the_probabilities_of_the_model():
    trunk = new_trunk(sharp=0.5)
    reader, prompt = TinyReader(trunk), new_prompts(1)[0]
    found = decode(reader, [prompt] * 2000, mode="sampled", max_side=1, batch_size=2000)
    counts = np.bincount([one.grid[0, 0] for one in found], minlength=10) / 2000
    expected = np.exp([plain_log_p(trunk, prompt, [c, 10, 11], 1) for c in range(10)])
    np.testing.assert_allclose(counts, expected, atol=0.04)
    assert np.isclose(expected.sum(), 1)


def test_samples_of_one_prompt_differ_and_their_seed_brings_them_back():
    reader, asked = TinyReader(new_trunk(sharp=1)), new_prompts(1) * 8
    first = decode(reader, asked, mode="sampled", max_side=SIDE, seed=1)
    assert len({one.choices for one in first}) > 4
    same(decode(reader, asked, mode="sampled", max_side=SIDE, seed=1), first)
    other = decode(reader, asked, mode="sampled", max_side=SIDE, seed=2)
    assert [one.choices for one in other] != [one.choices for one in first]


@pytest.mark.parametrize("way", WAYS)
def test_a_low_temperature_is_greedy_and_does_not_enter_the_log_probability(way):
    reader, asked = readers()[way], new_prompts(6)
    given = {"max_side": 3}
    cold = decode(reader, asked, mode="sampled", temperature=1e-4, **given)
    same(cold, decode(reader, asked, **given))


@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_reaches_its_bound_gives_no_grid(way):
    reader, asked = readers()[way], new_prompts(8)
    full = [one for one in decode(reader, asked, max_side=3, max_output_tokens=20)]
    bounds = [one.num_tokens - (i % 2) for i, one in enumerate(full)]
    found = decode(reader, asked, max_side=3, max_output_tokens=bounds)
    assert [one.num_tokens for one in found] == bounds
    ended = [one.grid is not None for one in full]
    assert any(ended)
    assert [one.grid is not None for one in found] == [
        there and not i % 2 for i, there in enumerate(ended)
    ]
    for one, other in zip(found, full, strict=True):
        assert one.choices == other.choices[: one.num_tokens]


@pytest.mark.parametrize("way", ["rows", "packed"])
def test_the_largest_grids_fit(way):
    """A reader whose choices are all alike takes the first that is allowed: 30 x 30 cells."""
    trunk = new_trunk(CONFIGS["once"])
    trunk.norm.zero_()
    reader = TinyReader(trunk, packed=way == "packed", max_places=10**4)
    found = decode(reader, new_prompts(2))
    assert [one.grid.shape for one in found] == [(30, 30)] * 2
    assert found[0].num_tokens == 931


@pytest.mark.parametrize("way", WAYS)
def test_progress_counts_every_prompt_and_no_prompts_give_no_results(way):
    done, reader = [], readers()[way]
    decode(reader, new_prompts(7), max_side=2, batch_size=3, advance=done.append)
    assert sum(done) == 7
    assert max(done) <= 3
    assert decode(reader, []) == []


# -- drafts


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


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("way", ["rows", "packed"])
def test_what_comes_out_is_the_same_whatever_the_drafts(way, mode):
    reader, asked = readers()[way], new_prompts(24)
    given = {"mode": mode, "seed": 1, "max_side": SIDE, "max_output_tokens": BOUNDS}
    expected = decode(reader, asked, **given)
    for seed in range(2 if way == "rows" else 1):
        drafts = drafts_of(expected, np.random.default_rng(seed))
        same(decode(reader, asked, drafts=drafts, **given), expected)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_window_changes_nothing(window, monkeypatch):
    for name in ("FIRST_WINDOW", "LEAST_WINDOW", "MOST_WINDOW"):
        monkeypatch.setattr(decoding, name, window)
    reader, asked = TinyReader(new_trunk()), new_prompts(24)
    expected = decode(reader, asked, max_side=SIDE, max_output_tokens=BOUNDS)
    drafts = drafts_of(expected, np.random.default_rng(0))
    given = {"max_side": SIDE, "max_output_tokens": BOUNDS}
    same(decode(reader, asked, drafts=drafts, **given), expected)


def long_grid(reader):
    """A prompt, and a grid of some length that the reader writes after it."""
    for seed in range(50):
        query = np.random.default_rng(seed).integers(0, 10, (4, 4)).astype(np.uint8)
        asked = layout.prompt(query)
        (one,) = decode(TinyReader(reader.trunk), [asked], max_side=SIDE)
        if one.grid is not None and one.num_tokens > 20:
            return asked, one
    raise AssertionError("no prompt with a long answer")


def test_a_right_draft_is_read_in_few_passes():
    reader = Counted(new_trunk())
    asked, one = long_grid(reader)
    decode(reader, [asked], max_side=SIDE)
    assert reader.passes == [len(asked.tokens)] + [1] * (one.num_tokens - 1)
    reader.passes.clear()
    same(decode(reader, [asked], max_side=SIDE, drafts=[one.grid]), [one])
    # The first choice, then the rest of the draft without its end, which follows from it.
    assert reader.passes == [len(asked.tokens), one.num_tokens - 1]


def test_a_wrong_cell_costs_one_more_pass():
    reader = Counted(new_trunk())
    asked, one = long_grid(reader)
    wrong = one.grid.copy()
    wrong[-1, 0] = (wrong[-1, 0] + 1) % 10
    same(decode(reader, [asked], max_side=SIDE, drafts=[wrong]), [one])
    assert len(reader.passes) == 3


def test_a_draft_of_another_size_is_dropped_where_it_differs():
    reader = Counted(new_trunk())
    asked, one = long_grid(reader)
    height, width = one.grid.shape
    if height < SIDE:
        taller = np.pad(one.grid, ((0, 1), (0, 0)))
        same(decode(reader, [asked], max_side=SIDE, drafts=[taller]), [one])
        assert len(reader.passes) == 2
        reader.passes.clear()
    narrow = one.grid[:, : width - 1]
    same(decode(reader, [asked], max_side=SIDE, drafts=[narrow]), [one])
    assert len(reader.passes) > one.num_tokens - width - 2


def test_a_hopeless_draft_is_dropped():
    """Read in vain again and again it would cost more than writing."""
    reader = Counted(new_trunk())
    asked, one = long_grid(reader)
    wrong = ((one.grid + 1) % 10).astype(np.uint8)
    same(decode(reader, [asked], max_side=SIDE, drafts=[wrong]), [one])
    assert reader.passes[-1] == 1
    assert sum(reader.passes[1:]) < 3 * one.num_tokens + 32


def test_rows_that_have_ended_cost_nothing():
    reader, asked = Counted(new_trunk()), new_prompts(8)
    bounds = [1, 20, 1, 1, 5, 1, 1, 1]
    ends = [one.num_tokens for one in decode(reader, asked, max_side=5, max_output_tokens=bounds)]
    assert reader.passes[1:] == [sum(end > i for end in ends) for i in range(1, max(ends))]


def test_rows_that_have_ended_are_released():
    reader = PlainReader(new_trunk())
    decode(reader, new_prompts(4), max_output_tokens=[1, 3, 1, 2])
    assert len(set(reader.released)) == 3  # nothing follows the last


def test_packed_rows_that_have_ended_are_dropped_and_change_nothing(monkeypatch):
    monkeypatch.setattr(decoding, "FEWEST_ROWS", 4)
    asked, made = new_prompts(24), readers()
    bounds = [31 if i % 9 == 0 else 2 for i in range(24)]
    for mode in ("greedy", "sampled"):
        given = {"mode": mode, "max_side": SIDE, "max_output_tokens": bounds}
        same(decode(made["packed"], asked, **given), decode(made["rows"], asked, **given))


# -- deadlines, arithmetic, refusals


@pytest.mark.parametrize("way", ["rows", "packed"])
def test_rows_that_have_not_ended_at_the_deadline_give_no_grid(way, monkeypatch):
    reader, asked = readers()[way], new_prompts(40)
    expected = decode(reader, asked, max_side=SIDE, max_output_tokens=31, batch_size=40)
    ticks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    written = 16  # packed rows look at the clock at every eighth token
    deadline = 0.5 if way == "packed" else written - 1.5
    given = {"max_side": SIDE, "max_output_tokens": 31, "batch_size": 40}
    found = decode(reader, asked, deadline=deadline, **given)
    late = [one.num_tokens > written for one in expected]
    assert any(one.grid is not None and gone for one, gone in zip(expected, late, strict=True))
    for one, other, gone in zip(found, expected, late, strict=True):
        assert one.choices == other.choices[:written]
        assert (one.grid is None) == (other.grid is None or gone)


def test_a_deadline_that_has_passed_costs_a_token_at_most():
    reader, asked = Counted(new_trunk()), new_prompts(5)
    found = decode(reader, asked, max_side=SIDE, deadline=0.0)
    assert all(one.grid is None and one.num_tokens == 1 for one in found)
    assert len(reader.passes) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_in_bfloat16_scores_of_what_was_written_are_its_log_probabilities(packed):
    reader = TinyReader(new_trunk(dtype=torch.bfloat16), packed=packed, max_places=10**4)
    asked = new_prompts(12)
    written = decode(reader, asked, max_side=SIDE)
    found = [one for one in written if one.grid is not None]
    kept = [p for p, one in zip(asked, written, strict=True) if one.grid is not None]
    scores = score(reader, kept, [[one.grid] for one in found], max_side=SIDE)
    decoded = [one.log_probability for one in found]
    assert len(found) > 4
    np.testing.assert_allclose(np.ravel(scores), decoded, rtol=0.05, atol=0.3)


@pytest.mark.parametrize(
    ("batch_size", "cure"), [(64, "--set judge.batch_size=32"), (1, "a smaller model")]
)
def test_out_of_memory_is_one_sentence_with_the_key(batch_size, cure, monkeypatch):
    class Starved(PlainReader):
        def store(self, prompts, room):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceError, match=f"judge.batch_size = {batch_size}[;,] .*{cure}"):
        decode(Starved(new_trunk()), new_prompts(2), batch_size=batch_size)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="greedy"):
        decode(TinyReader(new_trunk()), new_prompts(1), mode="sampled", temperature=0)


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_the_captured_step_writes_what_the_uncaptured_one_does(mode, monkeypatch):
    """With rows that end and move to smaller steps, and several batches."""
    reader = TinyReader(new_trunk(device="cuda", dtype=torch.bfloat16))
    asked, bounds = new_prompts(600), [40 if i % 5 == 0 else 8 for i in range(600)]
    given = {"mode": mode, "seed": 5, "max_side": SIDE, "max_output_tokens": bounds}
    found = decode(reader, asked, batch_size=240, **given)
    monkeypatch.setattr("arctrm.reader.store.Step._captured", lambda self: None)
    same(found, decode(reader, asked, batch_size=240, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_decoding_on_a_gpu_is_decoding_on_a_cpu_but_for_rounding(weights):
    """Also with the float32 weights of training."""
    reader = TinyReader(new_trunk(device="cuda", dtype=torch.bfloat16, weights=weights))
    asked = new_prompts(200)
    found = decode(reader, asked, max_side=SIDE)
    given = [[one.grid] for one in found]
    on_gpu = np.ravel(score(reader, asked, given, max_side=SIDE))
    decoded = np.array([one.log_probability for one in found])
    tokens = np.mean([one.num_tokens for one in found])
    assert np.abs(decoded - on_gpu).mean() < 0.02 * tokens
    plain = TinyReader(new_trunk())
    exact = np.ravel(score(plain, asked, given, max_side=SIDE))
    assert np.abs(decoded - exact).mean() < 0.03 * tokens
    expected = decode(plain, asked, max_side=SIDE)
    assert np.mean([a.choices == b.choices for a, b in zip(found, expected, strict=True)]) > 0.6


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_float32_on_a_gpu_writes_what_a_cpu_writes(packed):
    asked, trunk = new_prompts(24), new_trunk(device="cuda")
    given = {"max_side": SIDE, "max_output_tokens": BOUNDS}
    expected = decode(TinyReader(new_trunk()), asked, **given)
    same(decode(TinyReader(trunk, packed=packed), asked, **given), expected, tolerance=1e-2)


@pytest.mark.gpu
def test_decoding_and_scoring_compile_nothing():
    trunk, asked = new_trunk(device="cuda", dtype=torch.bfloat16), new_prompts(20)
    trunk.compile_blocks()
    torch._dynamo.utils.counters.clear()
    found = decode(TinyReader(trunk), asked, max_side=SIDE)
    score(TinyReader(trunk), asked, [[one.grid] for one in found], max_side=SIDE)
    assert not torch._dynamo.utils.counters["frames"]
