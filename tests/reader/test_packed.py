"""Packed places and transformers' cache give the same grids and the same scores."""

import numpy as np
import pytest
import torch

from arctrm.config import ReaderConfig
from arctrm.data.task import Pair
from arctrm.reader import grammar
from arctrm.reader.attention import new_packing, packed_attention
from arctrm.reader.decoding import Sampling, _noise, decode
from arctrm.reader.lean import Lean
from arctrm.reader.packed_decoding import PackedDecoder, _num_rows
from arctrm.reader.packed_scoring import PackedScorer, _spell, row_size
from arctrm.reader.places import Places, groups, ranges
from arctrm.reader.scoring import score
from arctrm.reader.search import threshold_search
from arctrm.reader.tiny import TinyReader
from arctrm.reader.tokens import END, ROW_END, prompt

SIDE = 5
CONFIG = ReaderConfig(hidden_size=64, num_layers=2, num_heads=4)
FULL = CONFIG.model_copy(update={"input_attention": "full"})
LOOPED = FULL.model_copy(update={"loops": 2})
INJECTED = LOOPED.model_copy(update={"injection": True})


def new_reader(device="cpu", dtype=torch.float32, config=CONFIG):
    """Random, with logits far apart, that ends rows and grids now and then."""
    torch.manual_seed(0)
    reader = TinyReader(config, 3)
    with torch.no_grad():
        for parameter in reader.llama.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        reader.llama.lm_head.weight.mul_(3)
        if reader.injection is not None:
            for matrix in reader.injection.parameters():
                matrix.normal_(std=0.02)
    reader = reader.to(device).eval().requires_grad_(False)
    reader.to(dtype).dtype = dtype
    return reader


def grid(rng, largest=6):
    return rng.integers(0, 10, rng.integers(1, largest + 1, 2)).astype(np.uint8)


def new_prompts(count, seed=0, largest=6):
    """Of different lengths, some after other pairs, one of them twice."""
    rng = np.random.default_rng(seed)
    made = [
        prompt(
            [Pair(grid(rng, largest), grid(rng, largest)) for _ in range(i % 3)],
            grid(rng, largest),
            (i % 3, i % 8, i % 2),
        )
        for i in range(count - 1)
    ]
    return [*made, made[0]]


def packed(reader, prompts, bounds, *, sampling=Sampling(), batch_size=512, max_places=10**4):
    """Choices up to the bound and log-probability of each prompt, decoded on packed places."""
    sizes = [len(p.tokens) + bound for p, bound in zip(prompts, bounds, strict=True)]
    decoder = PackedDecoder(reader, sizes, sampling.power, SIDE, max_places)
    found = {}
    for batch in decoder.batches(range(len(prompts)), batch_size):
        own = [bounds[i] for i in batch]
        noise = _noise(batch, max(own), sampling)
        choices, log_p = decoder.decode([prompts[i] for i in batch], own, noise)
        for i, row, value in zip(batch, choices, log_p, strict=True):
            found[i] = row[: bounds[i]], value
    return [found[i] for i in range(len(prompts))]


def same(found, expected, reader, tolerance=2e-4):
    ids = np.array([*reader.grid_tokens.colours, ROW_END, END])
    for (choices, log_p), one in zip(found, expected, strict=True):
        own = ids[choices]
        assert tuple(own[: one.num_tokens]) == one.tokens
        assert (own[one.num_tokens :] == END).all()
        assert log_p == pytest.approx(one.log_probability, abs=tolerance)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize(("batch_size", "max_places"), [(512, 10**5), (7, 10**5), (512, 300)])
def test_packed_decoding_is_cached_decoding(mode, batch_size, max_places):
    reader, asked = new_reader(), new_prompts(80)
    bounds = [6 + i % 26 for i in range(80)]
    sampling = Sampling(mode, 0.8, 5)
    expected = decode(
        reader, asked, mode=mode, temperature=0.8, seed=5, max_side=SIDE, max_output_tokens=bounds
    )
    assert 10 < sum(one.grid is None for one in expected) < 70
    found = packed(
        reader, asked, bounds, sampling=sampling, batch_size=batch_size, max_places=max_places
    )
    same(found, expected, reader)


def test_rows_that_have_ended_are_dropped_and_change_nothing(monkeypatch):
    monkeypatch.setattr("arctrm.reader.packed_decoding.FEWEST_ROWS", 4)
    reader, asked = new_reader(), new_prompts(40)
    bounds = [31 if i % 9 == 0 else 2 for i in range(40)]
    expected = decode(reader, asked, max_side=SIDE, max_output_tokens=bounds)
    sizes = [len(p.tokens) + bound for p, bound in zip(asked, bounds, strict=True)]
    decoder = PackedDecoder(reader, sizes, None, SIDE, 10**4)
    choices, log_p = decoder.decode(asked, bounds, None)
    assert sorted(decoder.steps)[0] <= 8 < sorted(decoder.steps)[-1]
    found = [(row[:bound], value) for row, value, bound in zip(choices, log_p, bounds, strict=True)]
    same(found, expected, reader)


@pytest.mark.parametrize(("batch_size", "max_places"), [(512, 10**5), (3, 10**5), (512, 150)])
def test_packed_scores_are_cached_scores(batch_size, max_places):
    reader, asked = new_reader(), new_prompts(9)
    rng = np.random.default_rng(1)
    candidates = [[grid(rng) for _ in range(1 + i % 4)] for i in range(9)]
    expected = score(reader, asked, candidates)
    pairs = [(p, own) for p, several in zip(asked, candidates, strict=True) for own in several]
    sizes = [row_size(*pair) for pair in pairs]
    found = PackedScorer(reader, sizes, 30, max_places).scores(pairs, batch_size)
    np.testing.assert_allclose(found, np.concatenate(expected), atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("config", [FULL, LOOPED, INJECTED], ids=["once", "looped", "injected"])
def test_inputs_that_are_seen_whole_are_read_alike_by_either_way(config):
    reader = new_reader(config=config)
    rng = np.random.default_rng(2)
    asked = [prompt([], grid(rng), (i % 3, i % 8, i % 2)) for i in range(20)]
    bounds = [31] * 20
    expected = decode(reader, asked, max_side=SIDE, max_output_tokens=bounds)
    same(packed(reader, asked, bounds), expected, reader)
    causal = new_reader()  # the same weights
    assert decode(causal, asked, max_side=SIDE, max_output_tokens=bounds) != expected
    candidates = [[grid(rng) for _ in range(1 + i % 3)] for i in range(20)]
    pairs = [(p, own) for p, several in zip(asked, candidates, strict=True) for own in several]
    scorer = PackedScorer(reader, [row_size(*pair) for pair in pairs], 30, 10**4)
    known = np.concatenate(score(reader, asked, candidates))
    np.testing.assert_allclose(scorer.scores(pairs, 7), known, atol=5e-4, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prompts", [None, [3, 0, 5, 7, 0]])
def test_the_packed_kernel_gives_what_one_sequence_after_another_gives(prompts):
    """With gradients; the fourth sequence is all prompt, the fifth is absent."""
    torch.manual_seed(0)
    lengths = [11, 130, 9, 7, 0]
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    seen = None if prompts is None else torch.tensor(prompts, device="cuda")
    shape = (1, 4, sum(lengths), 16)
    query, key, value, weight = (torch.randn(shape, device="cuda") for _ in range(4))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
        packing = new_packing(offsets, 130, dtype, seen, 130)
        assert (packing.lengths is None) == (dtype == torch.bfloat16)
        out, _ = packed_attention(torch.nn.Identity(), *inputs, None, packing)
        (out.transpose(1, 2) * weight).float().sum().backward()
        results.append([out.float(), *(x.grad.float() for x in inputs)])
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_the_captured_step_decodes_what_the_uncaptured_one_does(mode):
    """On the same device, with rows that end and move to smaller steps and several batches."""
    reader, asked = new_reader("cuda", torch.bfloat16), new_prompts(600)
    bounds = [40 if i % 5 == 0 else 8 for i in range(600)]
    given = {"mode": mode, "seed": 5, "max_side": SIDE, "max_output_tokens": bounds}
    found = decode(reader, asked, batch_size=400, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arctrm.reader.packed_decoding._Step._captured", lambda self: None)
        expected = decode(reader, asked, batch_size=400, **given)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    log_p = [[one.log_probability for one in many] for many in (found, expected)]
    np.testing.assert_allclose(*log_p, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_decoding_on_a_gpu_is_decoding_on_a_cpu_but_for_rounding(weights):
    """Also with the float32 weights of training."""
    reader, asked = new_reader("cuda", torch.bfloat16), new_prompts(200)
    reader.to(weights)
    found = decode(reader, asked, max_side=SIDE)
    spelled = [[one.grid] for one in found]
    on_gpu = np.ravel(score(reader, asked, spelled, max_side=SIDE))
    decoded = np.array([one.log_probability for one in found])
    tokens = np.array([one.num_tokens for one in found])
    assert np.abs(decoded - on_gpu).mean() < 0.02 * tokens.mean()
    plain = new_reader()
    exact = np.ravel(score(plain, asked, spelled, max_side=SIDE))
    assert np.abs(decoded - exact).mean() < 0.03 * tokens.mean()
    expected = decode(plain, asked, max_side=SIDE)
    same = np.mean([a.tokens == b.tokens for a, b in zip(found, expected, strict=True)])
    assert same > 0.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_and_scoring_compile_nothing():
    reader, asked = new_reader("cuda", torch.bfloat16), new_prompts(20)
    reader.compile_layers()
    torch._dynamo.utils.counters.clear()
    found = decode(reader, asked, max_side=SIDE)
    score(reader, asked, [[one.grid] for one in found], max_side=SIDE)
    threshold_search(reader, asked, 0.2, max_side=SIDE)
    assert not torch._dynamo.utils.counters["frames"]


def test_decode_and_score_give_the_same_by_either_way(monkeypatch):
    reader, asked, done = new_reader(), new_prompts(12), []
    reader.llama.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 16), requires_grad=False)
    given = {"batch_size": 5, "max_side": SIDE}
    expected = decode(reader, asked, **given)
    spelled = [[one.grid] * (i % 3) for i, one in enumerate(expected)]
    scores = score(reader, asked, spelled, **given)
    for module in ("decoding", "scoring"):
        monkeypatch.setattr(f"arctrm.reader.{module}.is_packed", lambda reader: True)
        monkeypatch.setattr(f"arctrm.reader.packed_{module}.affordable_places", lambda reader: 500)
    found = decode(reader, asked, **given, advance=done.append)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert sum(done) == 12
    again = score(reader, asked, spelled, **given)
    assert [len(own) for own in again] == [i % 3 for i in range(12)]
    np.testing.assert_allclose(np.concatenate(again), np.concatenate(scores), atol=5e-4)
    assert decode(reader, [], **given) == []
    assert score(reader, asked, [[]] * 12, **given) == [[]] * 12


def test_grids_are_spelled_as_the_grammar_spells_them():
    rng = np.random.default_rng(0)
    grids = [np.array([[7]], np.uint8), *(grid(rng) for _ in range(5))]
    found = _spell(grids, Places(Lean(new_reader()), 0))
    expected = [grammar.encode_choices(one) for one in grids]
    assert found.choice_N.tolist() == [c for choices, _ in expected for c in choices]
    for name in ("y", "x", "width", "finished"):
        columns = torch.cat([getattr(state, name) for _, state in expected])
        assert torch.equal(getattr(found.state_N, name), columns)
    assert found.first_R[found.row_N].unique().tolist() == found.first_R.tolist()


def test_groups_hold_what_fits_and_at_least_one():
    assert [range(6)[s] for s in groups([1, 2, 3, 9, 1, 1], 2, 4)] == [
        range(0, 2),
        range(2, 3),
        range(3, 4),
        range(4, 6),
    ]
    assert list(groups([], 2, 4)) == []


def test_ranges_are_laid_end_to_end():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []


def test_steps_have_few_sizes_with_little_room_left():
    sizes = {_num_rows(n) for n in range(1, 4097)}
    assert len(sizes) <= 32
    assert all(n <= _num_rows(n) < n + max(64, n / 4) for n in range(1, 4097))
