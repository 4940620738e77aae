"""Attention of one new token in each row over the places that its row fills.

Decoding reads every key and value once for a token and computes next to nothing with it, so it can
be no faster than the memory. The packed kernel is far from that: it works on tiles of 64 queries or
more, of which one is there. On a GPU a kernel of our own takes its place (`last_attention_kernel`).

Legend: R rows, P places, A heads, K head width.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor


def has_kernel() -> bool:
    """Whether the kernel's compiler is installed; torch brings it with CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None


def last_attention(
    query_RAK: Tensor, keys_PAK: Tensor, values_PAK: Tensor, begin_R: Tensor, filled_R: Tensor
) -> Tensor:
    """[R, A, K]: row r's query over places begin_R[r] : begin_R[r] + filled_R[r]; 0 without any.

    `begin_R` and `filled_R` are int64 [R] on the device of the rest and are read there, so a CUDA
    graph can hold the call. On a CPU (tests) one row after another.
    """
    if query_RAK.is_cuda:
        from arctrm.reader.last_attention_kernel import launch

        return launch(query_RAK, keys_PAK, values_PAK, begin_R, filled_R)
    result = torch.zeros_like(query_RAK)
    for row, (begin, filled) in enumerate(zip(begin_R.tolist(), filled_R.tolist(), strict=True)):
        if filled:
            seen = slice(begin, begin + filled)
            key, value = (held[seen].transpose(0, 1) for held in (keys_PAK, values_PAK))
            query = query_RAK[row, :, None]
            result[row] = F.scaled_dot_product_attention(query, key, value)[:, 0]
    return result
