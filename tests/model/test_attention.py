"""Attention by spans is dense attention under the mask that says the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from arctrm.model.attention import (
    BACKWARD_TILE,
    BLOCK,
    FORWARD_TILE,
    Pieces,
    attend,
    block_spans,
    has_packed_kernel,
    has_tiles,
    prefix_mask,
    ragged_attention,
    sequence_of,
    spans,
)

LENGTHS = [11, 130, 9, 0, 7]
PROMPTS = [3, 60, 0, 0, 7]
"""The third sequence is causal, the fourth absent, the fifth all prompt."""


def offsets(lengths=LENGTHS, device="cpu"):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def inputs(device="cpu", total=sum(LENGTHS), heads=4, width=16):
    torch.manual_seed(0)
    return [torch.randn(total, heads, width).to(device) for _ in range(4)]


def dense(query, key, value, lengths=LENGTHS, prompts=None):
    """All pairs of tokens, with the mask spelled out."""
    mask = torch.zeros(len(query), len(query), dtype=torch.bool, device=query.device)
    begin = 0
    for index, length in enumerate(lengths):
        for place in range(length):
            end = length if prompts is None else max(place + 1, prompts[index])
            mask[begin + place, begin : begin + end] = True
        begin += length
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def with_gradient(call, dtype=torch.float32, device="cpu"):
    query, key, value, weight = inputs(device)
    given = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
    out = call(*given)
    (out * weight).float().sum().backward()
    return [out.float(), *(x.grad.float() for x in given)]


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["whole", "prefix"])
def test_spans_are_the_dense_mask_with_gradient(prompts):
    seen = None if prompts is None else torch.tensor(prompts)
    given = spans(offsets(), 130, torch.float32, seen)
    found = with_gradient(lambda *qkv: attend(given, 0, *qkv))
    exact = with_gradient(lambda *qkv: dense(*qkv, prompts=prompts))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_store_is_asked_with_the_number_of_the_pass():
    def seen(layer, query, key, value):
        return query * layer

    query, key, value, _ = inputs()
    assert torch.equal(attend(seen, 3, query, key, value), query * 3)


def test_no_16_bit_kernel_on_a_cpu_or_in_float32():
    assert not has_packed_kernel(torch.device("cpu"), torch.bfloat16)
    assert not has_packed_kernel(torch.device("cuda"), torch.float32)
    assert not has_tiles(torch.device("cpu"), torch.bfloat16, 64)
    assert not has_tiles(torch.device("cuda"), torch.float32, 64)
    assert not has_tiles(torch.device("cuda"), torch.bfloat16, 32)


def test_every_token_is_of_one_sequence():
    expected = np.repeat([0, 1, 2, 4], [11, 130, 9, 7])
    assert sequence_of(offsets(), sum(LENGTHS)).tolist() == expected.tolist()


def test_a_prefix_mask_shows_the_prompt_whole_and_the_rest_in_order():
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert prefix_mask(4, 2).int().tolist() == expected
    assert torch.equal(prefix_mask(3, 0), torch.ones(3, 3).tril().bool())


@pytest.mark.parametrize("causal", [True, False])
def test_new_tokens_are_the_last_of_what_they_see(causal):
    query, key, value, _ = inputs()
    pieces = Pieces(offsets([5, 0, 2]), torch.tensor([3, 23, 40, 42], dtype=torch.int32))
    found = ragged_attention(query[:7], key, value, pieces, 5, 20, causal)
    for begin, count, first, end in ((0, 5, 3, 23), (5, 2, 40, 42)):
        for place in range(count):
            last = end - (count - 1 - place) * causal
            k, v = (x[first:last].transpose(0, 1) for x in (key, value))
            q = query[begin + place, :, None]
            exact = F.scaled_dot_product_attention(q, k, v)[:, 0]
            torch.testing.assert_close(found[begin + place], exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["whole", "prefix"])
def test_blocks_meet_exactly_where_some_query_sees_some_key(prompts):
    """Listed for the queries (forward) and for the keys (backward)."""
    total, seen = sum(LENGTHS), None if prompts is None else torch.tensor(prompts)
    blocks = block_spans(offsets(), total, 130, seen).blocks
    parts = zip(LENGTHS, LENGTHS if prompts is None else prompts, strict=True)
    mask = torch.block_diag(*(prefix_mask(n, p).float() for n, p in parts)).bool()
    count = -(-total // BLOCK)
    padding = count * BLOCK - total
    meet = F.pad(mask, (0, padding, 0, padding)).view(count, BLOCK, count, BLOCK).any(3).any(1)
    for own, index, number in (
        (meet, blocks.kv_indices, blocks.kv_num_blocks),
        (meet.T, blocks.q_indices, blocks.q_num_blocks),
    ):
        for block in range(count):
            listed = index[0, 0, block, : number[0, 0, block]].tolist()
            assert listed == own[block].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["whole", "prefix"])
def test_tiles_cover_every_token_once_and_long_sequences_first(prompts):
    seen = None if prompts is None else torch.tensor(prompts)
    tables = block_spans(offsets(), sum(LENGTHS), 130, seen, kernel="tiles").tiles
    parts = zip(offsets().tolist()[:-1], LENGTHS, prompts or LENGTHS, strict=True)
    expected = [(begin, place, n, p) for begin, n, p in parts for place in range(n)]
    for table, size in zip(tables, (FORWARD_TILE, BACKWARD_TILE), strict=True):
        found = [
            (begin, place, length, prompt)
            for first, begin, length, prompt in table.tolist()
            for place in range(first, min(first + size, length))
        ]
        assert sorted(found) == expected
        assert table[:, 2].tolist() == sorted(table[:, 2].tolist(), reverse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["whole", "prefix"])
@pytest.mark.parametrize("by_blocks", [False, True], ids=["packed", "flex"])
def test_both_kernels_of_a_gpu_are_the_dense_mask_with_gradient(by_blocks, prompts):
    seen = None if prompts is None else torch.tensor(prompts, device="cuda")
    if by_blocks:
        given = block_spans(offsets(device="cuda"), sum(LENGTHS), 130, seen)
    else:
        given = spans(offsets(device="cuda"), 130, torch.bfloat16, seen, 130)
        assert given.lengths is None
    found = with_gradient(lambda *qkv: attend(given, 0, *qkv), torch.bfloat16, "cuda")
    exact = with_gradient(lambda *qkv: dense(*qkv, prompts=prompts), device="cuda")
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_blocks_cover_many_short_and_long_sequences():
    lengths = [1, 127, 128, 129, 300, 2, 513]
    total = sum(lengths)
    prompts = [1, 100, 0, 129, 5, 0, 400]
    query, key, value, _ = inputs("cuda", total)
    seen = block_spans(
        offsets(lengths, "cuda"), total, max(lengths), torch.tensor(prompts, device="cuda")
    )
    found = attend(seen, 0, *(x.bfloat16() for x in (query, key, value)))
    exact = dense(query, key, value, lengths, prompts)
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", [False, True], ids=["whole", "prefix"])
def test_tiles_are_the_dense_mask_of_turned_vectors_with_gradient(prefix):
    if not has_tiles(torch.device("cuda"), torch.bfloat16, 64):
        pytest.skip("not measured on this GPU, or no Triton")
    from arctrm.model.kernels import tiled_attention

    lengths = [1, 127, 128, 0, 129, 300, 2, 513]
    prompts, total, heads = [1, 100, 0, 0, 129, 5, 0, 400], sum(lengths), 3
    torch.manual_seed(0)
    joined, weight = torch.randn(total, 3 * heads, 64), torch.randn(total, heads, 64)
    angles = torch.rand(total, 1, 32).mul(6).repeat(1, 1, 2)
    given = [x.cuda().bfloat16() for x in (joined, weight, angles.cos(), angles.sin())]
    seen = torch.tensor(prompts, device="cuda") if prefix else None
    tiles = block_spans(offsets(lengths, "cuda"), total, 513, seen, kernel="tiles").tiles

    def exact(joined, cos, sin):
        turned, value = joined.split((2 * heads, heads), dim=1)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return dense(*turned.chunk(2, dim=1), value, lengths, prompts if prefix else None)

    results = []
    for dtype in (torch.bfloat16, torch.float32):
        joined, weight, cos, sin = (x.to(dtype, copy=True) for x in given)
        joined.requires_grad_()
        if dtype == torch.bfloat16:
            out = tiled_attention(joined, cos, sin, *tiles)[0]
        else:
            out = exact(joined, cos, sin)
        out.backward(weight)
        parts = (out.detach(), *joined.grad.split(heads, dim=1))
        results.append([own for part in parts for own in part.float().split(lengths)])
    for found, right in zip(*results, strict=True):
        assert (found - right).norm() <= 0.02 * right.norm() + 0.05
