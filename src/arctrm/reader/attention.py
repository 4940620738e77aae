"""Packed causal attention behind transformers' attention interface.

A model whose configuration names `PACKED` runs on one flat axis of tokens when a `Packing` travels
with the call (training: no padding), and as transformers' own scaled-dot-product attention when
none does (decoding with a cache). The weights load into any LLaMA implementation either way.

Legend: T tokens of a packed batch, N sequences in it, A heads, K head width.
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED = "arctrm_packed"


class Packing(NamedTuple):
    """Where the sequences of a packed batch lie."""

    offsets: Tensor
    """int32 [N + 1]: sequence n is tokens offsets[n] : offsets[n + 1]."""
    max_len: int
    """Upper bound of a sequence's length in tokens."""
    lengths: tuple[int, ...] | None
    """Lengths of the sequences that exist, where the packed kernel is not available (CPU,
    float32)."""


def new_packing(offsets: Tensor, max_len: int, dtype: torch.dtype) -> Packing:
    """A packing for arithmetic in `dtype`; without the packed kernel it waits for the device."""
    packed_kernel = offsets.is_cuda and dtype in (torch.bfloat16, torch.float16)
    lengths = None if packed_kernel else tuple(n for n in offsets.diff().tolist() if n)
    return Packing(offsets, max_len, lengths)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for a transformers layer: [1, A, T, K] in, [1, T, A, K] out."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if packing.lengths is not None:
        return _one_by_one(query, key, value, packing.lengths), None
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    offsets, longest = packing.offsets, packing.max_len
    # A window that does not look ahead: causal.
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out[None], None


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    done = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
    return torch.cat(done, dim=2).transpose(1, 2)


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin_q: Tensor,
    begin_k: Tensor,
    max_q: int,
    max_k: int,
) -> Tensor:
    """Causal attention without gradient, [T, A, K], of queries that are the last of their sequence.

    Sequence n is queries begin_q[n] : begin_q[n + 1] over keys begin_k[n] : begin_k[n + 1] (int32
    [N + 1]); one without queries may have any keys. On a CPU (tests) one sequence after another.
    """
    if query.is_cuda:
        window = (-1, -1) if max_q == 1 else (-1, 0)  # aligned at the last query
        out = varlen_attn(query, key, value, begin_q, begin_k, max_q, max_k, window_size=window)
        assert isinstance(out, Tensor)
        return out
    result = torch.zeros_like(query)
    for (q0, q1), (k0, k1) in zip(_pairs(begin_q), _pairs(begin_k), strict=True):
        if q1 > q0:
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
            q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            done = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            result[q0:q1] = done.transpose(0, 1)
    return result


def _pairs(begins: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(begins.tolist()))


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
