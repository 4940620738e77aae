"""The kernel behind `last_attention`; importing this needs Triton.

One program for each row and head: it goes through the row's places in blocks with a running
maximum and sum, as online softmax does (Milakov and Gimelshein 2018, arXiv 1805.02867). A query
meets its keys by multiplying and adding: a matrix unit would have one row in sixteen to work on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES_AT_ONCE = 64
"""Of a block. A maximum and sums for each slot of it, merged at the end, were slower (LOG.md)."""


@triton.jit
def _attend(
    query,
    keys,
    values,
    begin,
    filled,
    result,
    scale,
    num_heads: tl.constexpr,
    width: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // num_heads, program % num_heads
    lane = tl.arange(0, LANES)
    inside = lane < width
    own = program * width + lane
    asked = tl.load(query + own, mask=inside, other=0.0).to(tl.float32) * scale
    first = tl.load(begin + row)
    count = tl.load(filled + row).to(tl.int32)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mixed = tl.zeros([LANES], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < count
        at = ((first + place) * num_heads + head) * width
        where = at[:, None] + lane[None, :]
        mask = there[:, None] & inside[None, :]
        key = tl.load(keys + where, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + where, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(key * asked[None, :], axis=1), -float("inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        faded = tl.exp(top - higher)
        weight = tl.exp(score - higher)
        mixed = mixed * faded + tl.sum(weight[:, None] * value, axis=0)
        total = total * faded + tl.sum(weight, axis=0)
        top = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)
    tl.store(result + own, mixed.to(result.dtype.element_ty), mask=inside)


def launch(
    query_RAK: Tensor, keys_PAK: Tensor, values_PAK: Tensor, begin_R: Tensor, filled_R: Tensor
) -> Tensor:
    """`last_attention` on a GPU."""
    num_rows, num_heads, width = query_RAK.shape
    query_RAK = query_RAK.contiguous()
    result = torch.empty_like(query_RAK)
    assert keys_PAK.is_contiguous()
    assert values_PAK.is_contiguous()
    _attend[(num_rows * num_heads,)](
        query_RAK,
        keys_PAK,
        values_PAK,
        begin_R,
        filled_R,
        result,
        width**-0.5,
        num_heads=num_heads,
        width=width,
        LANES=triton.next_power_of_2(width),
        BLOCK=PLACES_AT_ONCE,
        num_warps=4,
    )
    return result
