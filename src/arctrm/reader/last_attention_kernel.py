"""The kernel behind `last_attention`; importing this needs Triton.

One program for each row and head goes through the row's places in blocks, with running maxima and
sums as in online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Every slot of a block has
a maximum and sums of its own, which meet only behind the last block: until then no thread waits for
another warp's. A query meets its keys by multiplying and adding: a matrix unit would have one row
in sixteen to work on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, MOST_SLOTS = 4096, 128
"""Numbers of a block of keys, and places at most: 64 places of a head of 64."""
LOWEST = tl.constexpr(-1e30)
"""Below all scores, and finite: a slot that has seen no place must not become not-a-number."""


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
    SLOTS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // num_heads, program % num_heads
    lane, slot = tl.arange(0, LANES), tl.arange(0, SLOTS)
    inside = lane < width
    own = program * width + lane
    within = slot[:, None] * (num_heads * width) + lane[None, :]
    asked = tl.load(query + own, mask=inside, other=0.0).to(tl.float32) * scale
    first = tl.load(begin + row)
    count = tl.load(filled + row).to(tl.int32)
    top = tl.full([SLOTS], LOWEST, tl.float32)
    total = tl.zeros([SLOTS], dtype=tl.float32)
    mixed = tl.zeros([SLOTS, LANES], dtype=tl.float32)
    for start in range(0, count, SLOTS):
        there = slot < count - start
        where = ((first + start) * num_heads + head) * width + within
        mask = there[:, None] & inside[None, :]
        key = tl.load(keys + where, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + where, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(key * asked[None, :], axis=1), LOWEST)
        higher = tl.maximum(top, score)
        faded = tl.exp(top - higher)
        weight = tl.where(there, tl.exp(score - higher), 0.0)
        mixed = mixed * faded[:, None] + weight[:, None] * value
        total = total * faded + weight
        top = higher
    share = tl.exp(top - tl.max(top, axis=0))
    whole = tl.sum(total * share, axis=0)
    found = tl.sum(mixed * share[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    tl.store(result + own, found.to(result.dtype.element_ty), mask=inside)


def launch(
    query_RAK: Tensor, keys_PAK: Tensor, values_PAK: Tensor, begin_R: Tensor, filled_R: Tensor
) -> Tensor:
    """`last_attention` on a GPU."""
    num_rows, num_heads, width = query_RAK.shape
    query_RAK = query_RAK.contiguous()
    result = torch.empty_like(query_RAK)
    assert keys_PAK.is_contiguous()
    assert values_PAK.is_contiguous()
    lanes = triton.next_power_of_2(width)
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
        LANES=lanes,
        SLOTS=min(MOST_SLOTS, TILE // lanes),
        num_warps=4,
    )
    return result
