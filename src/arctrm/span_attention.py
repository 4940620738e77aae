"""Attention on a packed axis where every query sees one span of keys, by torch's flex attention.

A query of a packed batch sees its sequence up to itself, or up to the end of its prompt: always
keys without a gap between them. Neither end of the span goes back along the axis, so the blocks of
keys that a block of queries meets are neighbours, and only those are visited: nothing is launched
for sequences that are not there, nor for the longest one that could be.

For compiled code on a GPU and shapes that stay: elsewhere flex attention computes every pair of
tokens, and compiles anew for every shape.

Legend: T tokens of a packed batch, N sequences in it, A heads, K head width, M blocks.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens of a block of queries or keys."""

OPTIONS: dict[str, Any] = {
    "BLOCKS_ARE_CONTIGUOUS": True,
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_warps": 4,
    "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_warps": 4,
    "bwd_num_stages": 3,
}
"""Small tiles: a query block meets three or four blocks of keys, and all of them need the mask. The
fastest of twenty tried on an H100 (LOG.md, 2026-11-25): forward four times torch's default."""


def span_blocks(begin_T: Tensor, end_T: Tensor) -> BlockMask:
    """Which blocks meet where query t sees the keys begin_T[t] : end_T[t] (int, none empty).

    Neither begins nor ends may fall along the axis. Does not wait for the device.
    """

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= begin_T[query]) & (key < end_T[query])

    num_tokens = begin_T.shape[0]
    number = torch.arange(-(-num_tokens // BLOCK), device=begin_T.device)
    last = (number * BLOCK + BLOCK - 1).clamp(max=num_tokens - 1)
    first_key = torch.div(begin_T[number * BLOCK], BLOCK, rounding_mode="floor")
    keys_end = torch.div(end_T[last] - 1, BLOCK, rounding_mode="floor") + 1
    first_query = torch.searchsorted(keys_end, number, right=True)
    queries_end = torch.searchsorted(first_key, number, right=True)
    kv_num_blocks, kv_indices = _neighbours(first_key, keys_end)
    q_num_blocks, q_indices = _neighbours(first_query, queries_end)
    return BlockMask(
        seq_lengths=(num_tokens, num_tokens),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=seen,
    )


def _neighbours(first_M: Tensor, end_M: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks first_M[m] : end_M[m] and their list, int32 [1, 1, M] and [1, 1, M, M]."""
    number = torch.arange(first_M.shape[0], device=first_M.device)
    blocks = (first_M[:, None] + number).clamp(max=first_M.shape[0] - 1)
    return (end_M - first_M).int()[None, None], blocks.int()[None, None]


def sequence_of(offsets: Tensor, num_tokens: int) -> Tensor:
    """Sequence of each token, int64 [T]; `offsets` int32 [N + 1] cover the axis."""
    token = torch.arange(num_tokens, device=offsets.device, dtype=torch.int32)
    return torch.searchsorted(offsets, token, right=True) - 1


def span_attention(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask) -> Tensor:
    """Attention [1, A, T, K] of the queries over the spans that they see."""
    alone = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled() if alone else flex_attention
    out = attend(query, key, value, block_mask=blocks, kernel_options=OPTIONS)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _compiled() -> Any:
    """For code that is not compiled itself: without, every pair of tokens would be computed."""
    return torch.compile(flex_attention, dynamic=False)
