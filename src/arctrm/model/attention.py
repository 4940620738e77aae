"""What sees what on a packed axis of tokens, and attention over it.

Sequences lie one after another on one axis, without padding. The first tokens of a sequence (its
prompt) see each other whole; every later token sees the sequence up to itself. The reader's prompt
is the input; in the TRM voice the prompt is the whole sequence: everything sees everything. A query
therefore always sees one span of keys, from the beginning of its sequence to some end.

Four ways to the same result. Compiled training on a GPU: by the tiles of `kernels`, which is a
part of the block (`Block.forward`), or, where these were not measured, by torch's flex attention,
which visits only the blocks of a span. Other 16-bit arithmetic on a GPU: by torch's packed kernel,
one call for all prompts and one, causal, for the rest (a token is a query of one call and meets no
key in the other, which gives zeros: the sum is the answer). On a CPU and in float32: one by one.

Legend: T tokens of a packed batch, N sequences in it, A heads, K head width, M blocks or tiles.
"""

import functools
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from arctrm.system import PACKED, TILED, is_gpu

BLOCK = 128  # Tokens of a block of queries or keys
FORWARD_TILE, BACKWARD_TILE, TILED_HEAD = 128, 64, 64  # Tokens; width of the heads measured

FLEX_OPTIONS: dict[str, Any] = {
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
"""Small tiles, as a query block meets few blocks of keys: the fastest of twenty on an H100."""


Kernel = Literal["tiles", "flex"]  # of compiled code on a GPU


class Pieces(NamedTuple):
    """Piece p: queries begin_q[p] : begin_q[p + 1] over keys begin_k[p] : begin_k[p + 1], int32."""

    begin_q: Tensor
    begin_k: Tensor


class Prompts(NamedTuple):
    """The two calls of the packed kernel: every prompt over itself, the rest of each sequence over
    the whole sequence; `max_len` bounds the tokens of a prompt and of a rest.
    """

    prompts: Pieces
    rest: Pieces
    max_len: int


class Tiles(NamedTuple):
    """Tiles of each sequence, int32 [M, 4], long sequences first: the first token within the
    sequence; begin, length and prompt of the sequence. Length 0: no tile.
    """

    forward: Tensor
    backward: Tensor


class Spans(NamedTuple):
    """Where the sequences of a packed batch lie and what their tokens see."""

    offsets: Tensor  # int32 [N + 1]: sequence n is tokens offsets[n] : offsets[n + 1]
    max_len: int  # Upper bound of a sequence's length in tokens
    lengths: tuple[tuple[int, int], ...] | None = None
    """Lengths of the sequences that exist and of their prompts, without the packed kernel."""
    prompts: Prompts | None = None
    """Calls of the packed kernel; None: every sequence is one prompt, seen whole."""
    blocks: BlockMask | None = None
    """Blocks that meet, for compiled code on a GPU; says all that the other fields do."""
    tiles: Tiles | None = None
    """The same for the kernels of `kernels`; `attend` does not take them."""

    @property
    def kernel(self) -> Kernel | None:
        """Of compiled code on a GPU, None elsewhere."""
        if self.tiles is not None:
            return "tiles"
        return None if self.blocks is None else "flex"


# What new tokens see: spans of their batch, or a store: (layer, q, k, v), [T, A, K] each.
Seen = Spans | Callable[[int, Tensor, Tensor, Tensor], Tensor]


def attend(seen: Seen, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [T, A, K] of the queries in `layer` (counted over all loops)."""
    if not isinstance(seen, Spans):
        return seen(layer, query, key, value)
    if seen.blocks is not None:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return _span_attention(q, k, v, seen.blocks)[0].transpose(0, 1)
    if seen.lengths is not None:
        return _one_by_one(query, key, value, seen.lengths)
    q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
    offsets, longest, split = seen.offsets, seen.max_len, seen.prompts
    if split is None:
        return _varlen(q, k, v, Pieces(offsets, offsets), longest, longest, causal=False)
    out = _varlen(q, k, v, split.prompts, split.max_len, split.max_len, causal=False)
    return out + _varlen(q, k, v, split.rest, split.max_len, longest, causal=True)


def has_packed_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's packed kernel runs: in 16 bits on a GPU of compute capability 8 or more."""
    return dtype in (torch.bfloat16, torch.float16) and is_gpu(device, PACKED)


def has_tiles(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether attention by tiles was measured for heads of this width on such a device."""
    measured = width == TILED_HEAD and dtype == torch.bfloat16 and is_gpu(device, TILED)
    return measured and torch.version.hip is None and find_spec("triton") is not None


def spans(
    offsets: Tensor,
    max_len: int,
    dtype: torch.dtype,
    prompt_N: Tensor | None = None,
    max_part: int | None = None,
) -> Spans:
    """Spans for arithmetic in `dtype`; without the packed kernel this waits for the device.

    The first `prompt_N` (int [N]) tokens of each sequence see each other (None: all of them);
    `max_part` bounds these and the rest of a sequence (default: `max_len`).
    """
    if has_packed_kernel(offsets.device, dtype):
        prompts = None if prompt_N is None else _prompts(offsets, prompt_N, max_part or max_len)
        return Spans(offsets, max_len, prompts=prompts)
    lengths = offsets.diff().tolist()
    seen = lengths if prompt_N is None else prompt_N.tolist()
    existing = tuple((n, min(p, n)) for n, p in zip(lengths, seen, strict=True) if n)
    return Spans(offsets, max_len, existing)


def block_spans(
    offsets: Tensor,
    num_tokens: int,
    max_len: int,
    prompt_N: Tensor | None = None,
    *,
    kernel: Kernel = "flex",
) -> Spans:
    """Spans of `num_tokens`, which the sequences cover, for compiled code on a GPU, whose kernel
    wants blocks or tiles. Does not wait for the device.
    """
    if kernel == "tiles":
        prompts = offsets.diff() if prompt_N is None else prompt_N.to(torch.int32)
        sizes = FORWARD_TILE, BACKWARD_TILE
        tiles = Tiles(*(_tile_table(offsets, num_tokens, prompts, size) for size in sizes))
        return Spans(offsets, max_len, tiles=tiles)
    sequence = sequence_of(offsets, num_tokens)
    begin = offsets[sequence]
    if prompt_N is None:
        end = offsets[sequence + 1]
    else:
        end = torch.arange(1, num_tokens + 1, device=offsets.device, dtype=torch.int32)
        end = end.maximum(begin + prompt_N.to(torch.int32)[sequence])
    return Spans(offsets, max_len, blocks=_span_blocks(begin, end))


def sequence_of(offsets: Tensor, num_tokens: int) -> Tensor:
    """Sequence of each token, int64 [T]; `offsets` int32 [N + 1] cover the axis."""
    token = torch.arange(num_tokens, device=offsets.device, dtype=torch.int32)
    return torch.searchsorted(offsets, token, right=True) - 1


def prefix_mask(length: int, prompt: int, device: torch.device | str = "cpu") -> Tensor:
    """What each of `length` tokens sees, bool [length, length], the first `prompt` each other."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prompt, :prompt] = True
    return mask


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Pieces,
    max_q: int,
    max_k: int,
    causal: bool = True,
) -> Tensor:
    """Attention without gradient, [T, A, K], of queries that are the last of their sequence.

    A sequence without queries may have any keys. Without the packed kernel one after another.
    """
    if has_packed_kernel(query.device, query.dtype):
        return _varlen(query, key, value, pieces, max_q, max_k, causal=causal and max_q > 1)
    result = torch.zeros_like(query)
    both = (itertools.pairwise(begins.tolist()) for begins in pieces)
    for (q0, q1), (k0, k1) in zip(*both, strict=True):
        if q1 > q0:
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=query.device)
            if causal:
                seen = seen.tril(k1 - k0 - (q1 - q0))
            q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            done = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            result[q0:q1] = done.transpose(0, 1)
    return result


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


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, max_q: int, max_k: int, *, causal: bool
) -> Tensor:
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, pieces.begin_q, pieces.begin_k, max_q, max_k, window_size=window)
    assert isinstance(out, Tensor)
    return out


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[tuple[int, int], ...]
) -> Tensor:
    sizes = [length for length, _ in lengths]
    parts = (x.transpose(0, 1)[None].split(sizes, 2) for x in (query, key, value))
    done = []
    for q, k, v, (length, prompt) in zip(*parts, lengths, strict=True):
        mask = None if prompt == length else prefix_mask(length, prompt, q.device)
        done.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return torch.cat(done, dim=2)[0].transpose(0, 1)


def _span_blocks(begin_T: Tensor, end_T: Tensor) -> BlockMask:
    """Which blocks meet where query t sees keys begin_T[t] : end_T[t], which never fall along the
    axis. Does not wait for the device.
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


def _tile_table(offsets: Tensor, num_tokens: int, prompt_N: Tensor, size: int) -> Tensor:
    """Tiles of `size` tokens, as in `Tiles`; as many rows as the sequences could ever need."""
    sequences = torch.stack((offsets[:-1], offsets.diff(), prompt_N.minimum(offsets.diff())), 1)
    sequences = sequences[sequences[:, 1].argsort(descending=True, stable=True)]
    counts = (sequences[:, 1] + size - 1) // size
    ends = counts.cumsum(0)
    tile = torch.arange(num_tokens // size + len(counts), device=offsets.device)
    own = torch.searchsorted(ends, tile, right=True).clamp(max=len(counts) - 1)
    first = (tile - ends[own] + counts[own]) * size
    table = torch.cat((first[:, None], sequences[own]), 1)
    return torch.where((tile < ends[-1])[:, None], table, 0).to(torch.int32)


def _neighbours(first_M: Tensor, end_M: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks first_M[m] : end_M[m] and their list, int32 [1, 1, M] and [1, 1, M, M]."""
    number = torch.arange(first_M.shape[0], device=first_M.device)
    blocks = (first_M[:, None] + number).clamp(max=first_M.shape[0] - 1)
    return (end_M - first_M).int()[None, None], blocks.int()[None, None]


def _span_attention(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask) -> Tensor:
    alone = query.is_cuda and not torch.compiler.is_compiling()
    call: Any = _compiled() if alone else flex_attention
    out = call(query, key, value, block_mask=blocks, kernel_options=FLEX_OPTIONS)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _compiled() -> Any:
    """For code that is not compiled itself: without, every pair of tokens would be computed."""
    return torch.compile(flex_attention, dynamic=False)
