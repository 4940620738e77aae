"""Attention of one new token in each row over the places that its row fills.

Writing a token reads every key and value of its row once and computes next to nothing with it, so
it can be no faster than the memory. The packed kernel of torch is far from that: it works on tiles
of 64 queries or more, of which one is there. On a GPU a kernel of our own takes its place: one
program for each row and head goes through the row's places in blocks with a running maximum and
sum, as online softmax does (Milakov and Gimelshein 2018, arXiv 1805.02867). A query meets its keys
by multiplying and adding: a matrix unit would have one row in sixteen to work on.

Legend: R rows, P places, A heads, K head width.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.system import COMPILED, is_gpu

PLACES_AT_ONCE = 64
"""Keys of a block. A maximum and sums for each slot, merged at the end, are slower (dev/LOG.md)."""


def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs there: on a GPU that Triton, which torch brings on Linux, knows."""
    return is_gpu(device, COMPILED) and importlib.util.find_spec("triton") is not None


def last_token_attention(
    query_RAK: Tensor, keys_PAK: Tensor, values_PAK: Tensor, begin_R: Tensor, filled_R: Tensor
) -> Tensor:
    """[R, A, K]: row r's query over places begin_R[r] : begin_R[r] + filled_R[r]; 0 without any.

    `begin_R` and `filled_R` are int64 [R] on the device of the rest and are read there, so a CUDA
    graph can hold the call. On a CPU (tests) one row after another.
    """
    if query_RAK.is_cuda:
        return _launch(query_RAK, keys_PAK, values_PAK, begin_R, filled_R)
    result = torch.zeros_like(query_RAK)
    for row, (begin, filled) in enumerate(zip(begin_R.tolist(), filled_R.tolist(), strict=True)):
        if filled:
            seen = slice(begin, begin + filled)
            key, value = (held[seen].transpose(0, 1) for held in (keys_PAK, values_PAK))
            query = query_RAK[row, :, None]
            result[row] = F.scaled_dot_product_attention(query, key, value)[:, 0]
    return result


if torch.cuda.is_available() and has_kernel(torch.device("cuda")):
    import triton
    import triton.language as tl

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


def _launch(
    query_RAK: Tensor, keys_PAK: Tensor, values_PAK: Tensor, begin_R: Tensor, filled_R: Tensor
) -> Tensor:
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
