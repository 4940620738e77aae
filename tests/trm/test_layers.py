"""Rotary positions, norms and attention are the textbook's, whichever path computes them."""

import math

import pytest
import torch

from arctrm.trm.layers import (
    BlockParameters,
    BlockWeights,
    Sequences,
    apply_rotary,
    attend,
    block,
    rms_norm,
    rotary_tables,
    truncated_normal,
)

HEADS, K = 2, 8
WIDTH = HEADS * K


def layout(lengths, *, uniform=False, positions=None):
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if positions is None:
        positions = torch.cat([torch.arange(n) for n in lengths])[:, None]
    cos, sin = rotary_tables(positions, K, 100.0)
    assert cos.shape == (total, 1, K)
    return Sequences(offsets, max(lengths), cos, sin, uniform, tuple(lengths))


def heads(total, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, HEADS, K, generator=generator) for _ in range(3)]


def textbook_rotary(vector, position, base):
    """Pair (x[i], x[i + K/2]) is a complex number turned by position x base^(-2i/K)."""
    half = len(vector) // 2
    out = [0.0] * len(vector)
    for i in range(half):
        angle = position * base ** (-2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize("base", [100.0, 10000.0])
def test_one_axis_is_the_textbook_rotary_embedding(base):
    positions = torch.tensor([[0], [1], [7], [915]])
    x = torch.randn(4, HEADS, K)
    got = apply_rotary(x, *rotary_tables(positions, K, base))
    expected = [
        [textbook_rotary(head, int(p), base) for head in token]
        for token, p in zip(x.tolist(), positions[:, 0], strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-4, rtol=0)


def test_two_axes_turn_half_of_the_frequencies_each():
    positions = torch.tensor([[3, 11], [0, 5], [29, 0]])
    cos, _ = rotary_tables(positions, K, 100.0)
    by_row, _ = rotary_tables(positions[:, :1], K // 2, 100.0)
    by_column, _ = rotary_tables(positions[:, 1:], K // 2, 100.0)
    quarter = K // 4
    expected = torch.cat((by_row[..., :quarter], by_column[..., :quarter]), -1).repeat(1, 1, 2)
    torch.testing.assert_close(cos, expected)


def test_attention_scores_depend_on_the_distance_only():
    q, k, _ = heads(1)
    scores = []
    for shift in (0, 4, 21):
        at = torch.tensor([[2 + shift, 5 + shift], [6 + shift, 3 + shift]])
        cos, sin = rotary_tables(at, K, 100.0)
        turned_q, turned_k = apply_rotary(q, cos[:1], sin[:1]), apply_rotary(k, cos[1:], sin[1:])
        scores.append((turned_q * turned_k).sum(-1))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores[0], scores[2], atol=1e-4, rtol=0)


def test_rms_norm_divides_by_the_root_mean_square_and_keeps_the_dtype():
    x = torch.tensor([[3.0, -4.0]])
    expected = x / math.sqrt((9 + 16) / 2 + 1e-5)
    torch.testing.assert_close(rms_norm(x), expected)
    assert rms_norm(x.bfloat16()).dtype == torch.bfloat16


def test_attention_is_softmax_inside_each_sequence():
    lengths = [3, 1, 5]
    q, k, v = heads(9)
    got = attend(q, k, v, layout(lengths))
    begin = 0
    for n in lengths:
        own = slice(begin, begin + n)
        scores = torch.einsum("qak,tak->aqt", q[own], k[own]) / math.sqrt(K)
        expected = torch.einsum("aqt,tak->qak", scores.softmax(-1), v[own])
        torch.testing.assert_close(got[own], expected, atol=1e-5, rtol=0)
        begin += n


def test_equally_long_sequences_give_the_same_on_both_paths():
    q, k, v = heads(12)
    batched = attend(q, k, v, layout([4, 4, 4], uniform=True))
    one_by_one = attend(q, k, v, layout([4, 4, 4]))
    torch.testing.assert_close(batched, one_by_one, atol=1e-5, rtol=0)


def test_a_sequence_does_not_see_its_neighbours():
    q, k, v = heads(9)
    before = attend(q, k, v, layout([3, 6]))
    k[3:], v[3:] = 5.0, -7.0
    after = attend(q, k, v, layout([3, 6]))
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3:], after[3:])


def weights(seed=0):
    torch.manual_seed(seed)
    return BlockParameters(WIDTH, 32).cast(torch.float32)


def test_qk_norm_makes_the_block_blind_to_the_scale_of_queries_and_keys():
    w, x, seq = weights(), torch.randn(6, WIDTH), layout([6])
    scale = torch.ones(3 * WIDTH, 1)
    scale[: 2 * WIDTH] = 3.0  # queries and keys, not values
    scaled = w._replace(qkv=w.qkv * scale)
    with_norm = [block(x, each, seq, HEADS, True) for each in (w, scaled)]
    without = [block(x, each, seq, HEADS, False) for each in (w, scaled)]
    torch.testing.assert_close(*with_norm, atol=1e-3, rtol=0)
    assert (without[0] - without[1]).abs().max() > 1e-2


def test_a_block_is_post_norm_attention_then_post_norm_swiglu():
    w, x, seq = weights(), torch.randn(5, WIDTH), layout([5])
    q, k, v = ((x @ part.T).view(5, HEADS, K) for part in w.qkv.chunk(3))
    q, k = (apply_rotary(each, seq.cos, seq.sin) for each in (q, k))
    x1 = rms_norm(x + attend(q, k, v, seq).flatten(1) @ w.out.T)
    gate, up = (x1 @ part.T for part in w.gate_up.chunk(2))
    expected = rms_norm(x1 + (gate * gate.sigmoid() * up) @ w.down.T)
    torch.testing.assert_close(block(x, w, seq, HEADS, False), expected, atol=1e-5, rtol=0)


def test_truncated_normal_has_the_deviation_asked_for_and_no_tail():
    torch.manual_seed(0)
    values = truncated_normal(200, 500, std=0.3)
    assert values.std().item() == pytest.approx(0.3, rel=0.01)
    assert values.abs().max().item() <= 2 * 0.3 / 0.8796 + 1e-6


def test_weights_are_cast_to_the_compute_dtype_and_stay_float32():
    parameters = BlockParameters(WIDTH, 32)
    cast = parameters.cast(torch.bfloat16)
    assert isinstance(cast, BlockWeights)
    assert {w.dtype for w in cast} == {torch.bfloat16}
    assert {p.dtype for p in parameters.parameters()} == {torch.float32}
