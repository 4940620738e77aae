"""Packed attention behind transformers' attention interface.

A model whose configuration names `PACKED` runs on one flat axis of tokens when a `Packing` travels
with the call (training: no padding), and as transformers' own scaled-dot-product attention when
none does (decoding with a cache). The weights load into any LLaMA implementation either way.

Attention is causal, except that the tokens of a sequence's prompt may all see each other (a prefix
language model). Compiled training goes by blocks (`arctrm.span_attention`), everything else on a
GPU through torch's packed kernel. That knows no such mask; two calls of it make one: all prompts
without a mask, and what follows them with a causal one. Each token is a query of one of the two,
and meets no key in the other, which gives zeros: the sum is the answer.

Legend: T tokens of a packed batch, N sequences in it, A heads, K head width.
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from arctrm.span_attention import sequence_of, span_attention, span_blocks
from arctrm.trm.packing import has_packed_kernel

PACKED = "arctrm_packed"


class Pieces(NamedTuple):
    """Queries and keys of one call of the packed kernel.

    Piece p is queries begin_q[p] : begin_q[p + 1] over keys begin_k[p] : begin_k[p + 1] (int32).
    """

    begin_q: Tensor
    begin_k: Tensor


class Prompts(NamedTuple):
    """The prompts of a packed batch, whose tokens all see each other."""

    prompts: Pieces
    """Every prompt over itself; what follows has no keys."""
    rest: Pieces
    """What follows each prompt, over its whole sequence; the prompts have no keys."""
    max_len: int
    """Upper bound of the tokens of a prompt, and of what follows one."""


class Packing(NamedTuple):
    """Where the sequences of a packed batch lie."""

    offsets: Tensor
    """int32 [N + 1]: sequence n is tokens offsets[n] : offsets[n + 1]."""
    max_len: int
    """Upper bound of a sequence's length in tokens."""
    lengths: tuple[tuple[int, int], ...] | None
    """Lengths of the sequences that exist and of their prompts, where the packed kernel is not
    available (CPU, float32)."""
    prompts: Prompts | None = None
    """None: attention is causal everywhere."""
    blocks: BlockMask | None = None
    """What is computed, if by blocks; says all that the other fields do."""


def new_packing(
    offsets: Tensor,
    max_len: int,
    dtype: torch.dtype,
    prompt_N: Tensor | None = None,
    max_part: int | None = None,
) -> Packing:
    """A packing for arithmetic in `dtype`; without the packed kernel it waits for the device.

    The first `prompt_N` (int [N]) tokens of each sequence see each other; `max_part` bounds these
    and what follows them (default: `max_len`).
    """
    if has_packed_kernel(offsets.device, dtype):
        prompts = None if prompt_N is None else _prompts(offsets, prompt_N, max_part or max_len)
        return Packing(offsets, max_len, None, prompts)
    lengths = offsets.diff().tolist()
    seen = [0] * len(lengths) if prompt_N is None else prompt_N.tolist()
    existing = tuple((n, p) for n, p in zip(lengths, seen, strict=True) if n)
    return Packing(offsets, max_len, existing)


def block_packing(
    offsets: Tensor, num_tokens: int, max_len: int, prompt_N: Tensor | None = None
) -> Packing:
    """A packing of `num_tokens` for compiled code on a GPU; the sequences cover all of them."""
    sequence = sequence_of(offsets, num_tokens)
    begin = offsets[sequence]
    end = torch.arange(1, num_tokens + 1, device=offsets.device, dtype=torch.int32)
    if prompt_N is not None:
        end = end.maximum(begin + prompt_N.to(torch.int32)[sequence])
    return Packing(offsets, max_len, None, blocks=span_blocks(begin, end))


def _prompts(offsets: Tensor, prompt_N: Tensor, max_part: int) -> Prompts:
    begin, end = offsets[:-1], offsets[1:]
    middle = begin + prompt_N.to(torch.int32)

    def pieces(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> Pieces:
        both = (torch.cat((torch.stack(x, 1).flatten(), offsets[-1:])) for x in (queries, keys))
        return Pieces(*both)

    # Pieces of both axes must follow each other without a gap, so what is skipped on one of them
    # is a piece that is empty on the other.
    prompts = pieces((begin, middle, middle), (begin, middle, end))
    return Prompts(prompts, pieces((begin, middle), (begin, begin)), max_part)


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
    if packing.blocks is not None:
        return span_attention(query, key, value, packing.blocks).transpose(1, 2), None
    if packing.lengths is not None:
        return _one_by_one(query, key, value, packing.lengths), None
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    offsets, longest, split = packing.offsets, packing.max_len, packing.prompts
    if split is None:
        return _varlen(q, k, v, Pieces(offsets, offsets), longest, longest, causal=True)[None], None
    out = _varlen(q, k, v, split.prompts, split.max_len, split.max_len, causal=False)
    out = out + _varlen(q, k, v, split.rest, split.max_len, longest, causal=True)
    return out[None], None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, max_q: int, max_k: int, *, causal: bool
) -> Tensor:
    """One call of the packed kernel, [T, A, K]; `causal` aligns a piece's last query and key."""
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, pieces.begin_q, pieces.begin_k, max_q, max_k, window_size=window)
    assert isinstance(out, Tensor)
    return out


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[tuple[int, int], ...]
) -> Tensor:
    parts = (x.split([n for n, _ in lengths], 2) for x in (query, key, value))
    done = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if prompt == 0
        else F.scaled_dot_product_attention(
            q, k, v, attn_mask=prefix_mask(length, prompt, q.device)
        )
        for q, k, v, (length, prompt) in zip(*parts, lengths, strict=True)
    ]
    return torch.cat(done, dim=2).transpose(1, 2)


def prefix_mask(length: int, prompt: int, device: torch.device | str = "cpu") -> Tensor:
    """What each of `length` tokens sees, bool [length, length], the first `prompt` each other."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prompt, :prompt] = True
    return mask


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin_q: Tensor,
    begin_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool = True,
) -> Tensor:
    """Attention without gradient, [T, A, K], of queries that are the last of their sequence.

    Sequence n is queries begin_q[n] : begin_q[n + 1] over keys begin_k[n] : begin_k[n + 1] (int32
    [N + 1]); one without queries may have any keys. On a CPU (tests) one sequence after another.
    """
    if query.is_cuda:
        pieces = Pieces(begin_q, begin_k)
        return _varlen(query, key, value, pieces, max_q, max_k, causal=causal and max_q > 1)
    result = torch.zeros_like(query)
    for (q0, q1), (k0, k1) in zip(_pairs(begin_q), _pairs(begin_k), strict=True):
        if q1 > q0:
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            if causal:
                seen = seen.tril(k1 - k0 - (q1 - q0))
            q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            done = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            result[q0:q1] = done.transpose(0, 1)
    return result


def _pairs(begins: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(begins.tolist()))


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
