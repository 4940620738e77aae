"""Attention by blocks: which blocks meet, and the same result as with a mask of single tokens."""

import pytest
import torch
import torch.nn.functional as F

from arctrm.reader.attention import Packing, block_packing, packed_attention, prefix_mask
from arctrm.span_attention import BLOCK, sequence_of, span_attention

LENGTHS = (11, 130, 0, 9, 300, 77, 1, 256)
"""The third sequence is absent."""
PROMPTS = (3, 60, 0, 0, 200, 77, 0, 128)
"""The sixth sequence is all prompt, the fourth and the seventh have none."""
TOKENS = sum(LENGTHS)


def offsets(device="cpu"):
    ends = torch.tensor(LENGTHS, device=device).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32)


def dense(parts):
    """What each token sees, bool [T, T], from the masks of the sequences."""
    return torch.block_diag(*(part.float() for part in parts)).bool()


def causal():
    return dense([prefix_mask(n, 0) for n in LENGTHS])


def prefix():
    return dense([prefix_mask(n, p) for n, p in zip(LENGTHS, PROMPTS, strict=True)])


def blocks_of(kind, device="cpu"):
    begins = offsets(device)
    prompts = torch.tensor(PROMPTS, device=device) if kind == "prefix" else None
    blocks = block_packing(begins, TOKENS, 300, prompts).blocks
    assert blocks is not None
    return blocks


KINDS = {"causal": causal, "prefix": prefix}


def test_each_token_belongs_to_the_sequence_that_holds_it():
    expected = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    assert sequence_of(offsets(), TOKENS).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_meet_exactly_where_some_query_sees_some_key(kind):
    """Listed for the queries (forward) and for the keys (backward)."""
    blocks, seen = blocks_of(kind), KINDS[kind]()
    count = -(-TOKENS // BLOCK)
    padding = count * BLOCK - TOKENS
    padded = F.pad(seen, (0, padding, 0, padding)).view(count, BLOCK, count, BLOCK)
    meet = padded.any(3).any(1)
    for own, index, number in (
        (meet, blocks.kv_indices, blocks.kv_num_blocks),
        (meet.T, blocks.q_indices, blocks.q_num_blocks),
    ):
        for block in range(count):
            listed = index[0, 0, block, : number[0, 0, block]].tolist()
            assert listed == own[block].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_by_blocks_is_attention_with_a_mask(kind):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, TOKENS, 16) for _ in range(3))
    found = span_attention(query, key, value, blocks_of(kind))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=KINDS[kind]())
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_blocks_give_what_one_sequence_after_another_gives_gradients_too(kind):
    torch.manual_seed(0)
    shape = (1, 4, TOKENS, 64)
    query, key, value, weight = (torch.randn(shape, device="cuda") for _ in range(4))
    prompts = PROMPTS if kind == "prefix" else [0] * len(LENGTHS)
    lengths = tuple((n, p) for n, p in zip(LENGTHS, prompts, strict=True) if n)
    begins = offsets("cuda")
    results = []
    for dtype, packing in (
        (torch.float32, Packing(begins, 300, lengths)),
        (torch.bfloat16, Packing(begins, 300, None, blocks=blocks_of(kind, "cuda"))),
    ):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
        out, _ = packed_attention(torch.nn.Identity(), *inputs, None, packing)
        (out.transpose(1, 2) * weight).float().sum().backward()
        results.append([out.float(), *(x.grad.float() for x in inputs)])
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)
