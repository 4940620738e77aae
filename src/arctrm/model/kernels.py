"""Attention over packed sequences in Triton: tiles that never leave a sequence.

A query of a sequence sees its first max(place + 1, prompt) keys. A program takes one tile of one
head, of a list made once for a batch (`attention.Tiles`), and visits the tokens that its tile
meets, as flash attention does (arXiv 2307.08691). The launch grid depends on the room of a batch
alone, so that a CUDA graph can replay it; programs without a tile end at once.

Queries and keys turn by the rotary angles first, in one pass over memory, and their gradients turn
back as they are stored. The gradient takes two passes, without atomics: queries, then keys and
values. Tiles, warps and stages are the fastest of those tried on one H200 (dev/speed.md).

Legend: T tokens, A heads (HEADS), K head width (WIDTH), M tiles; D = A x K. `joined` [T, 3A, K] are
queries, keys and values; `turned` [T, 2A, K] the queries and keys after they turned.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arctrm.model.attention import BACKWARD_TILE, FORWARD_TILE

FORWARD = {"BLOCK": FORWARD_TILE, "OTHER": 64, "num_warps": 8, "num_stages": 3}
QUERIES = {"BLOCK": BACKWARD_TILE, "OTHER": 32, "num_warps": 4, "num_stages": 3}
KEYS = {"BLOCK": BACKWARD_TILE, "OTHER": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 168}
"""Tokens of a program's tile and of the tiles that it visits."""
TURNED_ROWS = 128  # vectors of a program that turns them
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(tiles):
    """First token in its sequence, begin, length and prompt of the sequence."""
    tile = tiles + 4 * tl.program_id(1)
    return tl.load(tile), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def _load(x, places, length, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors of a head; zeros beyond the sequence."""
    at = places[:, None] * STRIDE + tl.arange(0, WIDTH)
    return tl.load(x + at, mask=places[:, None] < length, other=0.0)


@triton.jit
def _store(x, places, length, values, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    at = places[:, None] * STRIDE + tl.arange(0, WIDTH)
    tl.store(x + at, values.to(x.dtype.element_ty), mask=places[:, None] < length)


@triton.jit
def _store_turned_back(
    x, places, length, values, cos, sin, STRIDE: tl.constexpr, WIDTH: tl.constexpr
):
    """Store gradients of turned vectors as gradients of the vectors before they turned."""
    half: tl.constexpr = WIDTH // 2
    pairs = tl.trans(tl.reshape(values, (values.shape[0], 2, half)), (0, 2, 1))
    first, second = tl.split(pairs)
    c = _load(cos, places, length, WIDTH, half).to(tl.float32)
    s = _load(sin, places, length, WIDTH, half).to(tl.float32)
    _store(x, places, length, first * c + second * s, STRIDE, half)
    _store(x + half, places, length, second * c - first * s, STRIDE, half)


@triton.jit
def _turn_kernel(
    joined, cos, sin, turned, num_rows, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    half: tl.constexpr = WIDTH // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of the 2A vectors of each token
    token, head = row // (2 * HEADS), row % (2 * HEADS)
    there, cols = row[:, None] < num_rows, tl.arange(0, half)
    c = tl.load(cos + token[:, None] * WIDTH + cols, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + token[:, None] * WIDTH + cols, mask=there, other=0.0).to(tl.float32)
    x = joined + ((token.to(tl.int64) * 3 * HEADS + head) * WIDTH)[:, None] + cols
    first = tl.load(x, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=there, other=0.0).to(tl.float32)
    to = turned + row[:, None].to(tl.int64) * WIDTH + cols
    tl.store(to, (first * c - second * s).to(to.dtype.element_ty), mask=there)
    tl.store(to + half, (second * c + first * s).to(to.dtype.element_ty), mask=there)


@triton.jit
def _forward_kernel(
    turned, joined, tiles, out, lse, num_tokens,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries, and log2 of the sum of each one's weights."""
    D: tl.constexpr = HEADS * WIDTH
    scale: tl.constexpr = WIDTH**-0.5 * LOG2_E
    head = tl.program_id(0)
    first, begin, length, prompt = _tile(tiles)
    if length == 0:
        return
    rows = first + tl.arange(0, BLOCK)
    q = turned + begin * 2 * D + head * WIDTH
    k, v = q + D, joined + begin * 3 * D + 2 * D + head * WIDTH
    q_tile = _load(q, rows, length, 2 * D, WIDTH)
    limits = tl.maximum(rows + 1, prompt)
    whole = tl.maximum(first + 1, prompt) // OTHER * OTHER  # keys that every query sees
    stop = tl.minimum(tl.maximum(first + BLOCK, prompt), length)
    acc = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    most = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for masked in tl.static_range(2):
        for start in range(whole if masked else 0, stop if masked else whole, OTHER):
            places = start + tl.arange(0, OTHER)
            s = tl.dot(q_tile, tl.trans(_load(k, places, length, 2 * D, WIDTH)))
            if masked:
                s = tl.where(places[None, :] < limits[:, None], s, float("-inf"))
            new_most = tl.maximum(most, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            total = total * shrink + tl.sum(p, 1)
            v_tile = _load(v, places, length, 3 * D, WIDTH)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
            most = new_most
    _store(out + begin * D + head * WIDTH, rows, length, acc / total[:, None], D, WIDTH)
    tl.store(lse + head * num_tokens + begin + rows, most + tl.log2(total), mask=rows < length)


@triton.jit
def _queries_kernel(
    turned, joined, cos, sin, tiles, out, lse, d_out, d_joined, delta, num_tokens,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and delta = sum(out x d_out), which the other pass reads."""
    D: tl.constexpr = HEADS * WIDTH
    scale: tl.constexpr = WIDTH**-0.5
    head = tl.program_id(0)
    first, begin, length, prompt = _tile(tiles)
    if length == 0:
        return
    rows = first + tl.arange(0, BLOCK)
    q = turned + begin * 2 * D + head * WIDTH
    k, v = q + D, joined + begin * 3 * D + 2 * D + head * WIDTH
    q_tile = _load(q, rows, length, 2 * D, WIDTH)
    do_tile = _load(d_out + begin * D + head * WIDTH, rows, length, D, WIDTH)
    out_tile = _load(out + begin * D + head * WIDTH, rows, length, D, WIDTH)
    at, there = head * num_tokens + begin + rows, rows < length
    lse_tile = tl.load(lse + at, mask=there, other=float("inf"))
    delta_tile = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + at, delta_tile, mask=there)
    limits = tl.maximum(rows + 1, prompt)
    whole = tl.maximum(first + 1, prompt) // OTHER * OTHER
    stop = tl.minimum(tl.maximum(first + BLOCK, prompt), length)
    dq = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for masked in tl.static_range(2):
        for start in range(whole if masked else 0, stop if masked else whole, OTHER):
            places = start + tl.arange(0, OTHER)
            k_tile = _load(k, places, length, 2 * D, WIDTH)
            v_tile = _load(v, places, length, 3 * D, WIDTH)
            s = tl.dot(q_tile, tl.trans(k_tile)) * (scale * LOG2_E) - lse_tile[:, None]
            if masked:
                s = tl.where(places[None, :] < limits[:, None], s, float("-inf"))
            ds = tl.exp2(s) * (tl.dot(do_tile, tl.trans(v_tile)) - delta_tile[:, None])
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq)
    cos, sin = cos + begin * WIDTH, sin + begin * WIDTH
    to = d_joined + begin * 3 * D + head * WIDTH
    _store_turned_back(to, rows, length, dq * scale, cos, sin, 3 * D, WIDTH)


@triton.jit
def _keys_kernel(
    turned, joined, cos, sin, tiles, lse, d_out, delta, d_joined, num_tokens,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and their values."""
    D: tl.constexpr = HEADS * WIDTH
    scale: tl.constexpr = WIDTH**-0.5
    head = tl.program_id(0)
    first, begin, length, prompt = _tile(tiles)
    if length == 0:
        return
    places = first + tl.arange(0, BLOCK)
    q = turned + begin * 2 * D + head * WIDTH
    d_out += begin * D + head * WIDTH
    lse += head * num_tokens + begin
    delta += head * num_tokens + begin
    k_tile = _load(q + D, places, length, 2 * D, WIDTH)
    v_tile = _load(joined + begin * 3 * D + 2 * D + head * WIDTH, places, length, 3 * D, WIDTH)
    # Queries low : middle see a part of the keys, middle : length all of them.
    low = tl.where(first < prompt, 0, first)
    middle = low + tl.cdiv(first + BLOCK - 1 - low, OTHER) * OTHER
    middle = tl.where(tl.minimum(first + BLOCK, length) <= prompt, 0, middle)
    middle = tl.minimum(middle, tl.cdiv(length - low, OTHER) * OTHER + low)
    four = tl.zeros((1, 4), dtype=tl.int32)
    dk = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    dv = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    for whole in tl.static_range(2):
        begins = middle if whole else low
        # One number a query, loaded a tile ahead and four times: Triton would make a single load
        # for every thread that wants it, and wait.
        at = begins + tl.arange(0, OTHER)[:, None] + four
        next_lse = tl.load(lse + at, mask=at < length, other=float("inf"))
        next_delta = tl.load(delta + at, mask=at < length, other=0.0)
        for start in range(begins, length if whole else middle, OTHER):
            rows = start + tl.arange(0, OTHER)
            q_tile = _load(q, rows, length, 2 * D, WIDTH)
            do_tile = _load(d_out, rows, length, D, WIDTH)
            lse_tile, delta_tile = tl.max(next_lse, 1), tl.max(next_delta, 1)
            at = rows[:, None] + OTHER + four
            next_lse = tl.load(lse + at, mask=at < length, other=float("inf"))
            next_delta = tl.load(delta + at, mask=at < length, other=0.0)
            s = tl.dot(k_tile, tl.trans(q_tile)) * (scale * LOG2_E) - lse_tile[None, :]
            if not whole:
                limits = tl.maximum(rows + 1, prompt)
                s = tl.where(places[:, None] < limits[None, :], s, float("-inf"))
            p = tl.exp2(s)
            dv = tl.dot(p.to(do_tile.dtype), do_tile, dv)
            ds = p * (tl.dot(v_tile, tl.trans(do_tile)) - delta_tile[None, :])
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk)
    cos, sin = cos + begin * WIDTH, sin + begin * WIDTH
    to = d_joined + begin * 3 * D + D + head * WIDTH
    _store_turned_back(to, places, length, dk * scale, cos, sin, 3 * D, WIDTH)
    _store(to + D, places, length, dv, 3 * D, WIDTH)


@torch.library.custom_op("arctrm::tiled_attention", mutates_args=())
def tiled_attention(
    joined: Tensor, cos: Tensor, sin: Tensor, forward_tiles: Tensor, backward_tiles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [T, A, K] of `joined`, whose queries and keys turn by the rotary angles [T, 1, K],
    two equal halves. Tiles: int32 [M, 4], see `attention.Tiles`.

    For the gradient also log2 of the sums of the weights, float32 [A, T], and `turned`.
    """
    joined = joined.contiguous()
    num_tokens, heads, width = joined.shape[0], joined.shape[1] // 3, joined.shape[2]
    turned = joined.new_empty((num_tokens, 2 * heads, width))
    out = joined.new_empty((num_tokens, heads, width))
    lse = joined.new_empty((heads, num_tokens), dtype=torch.float32)
    sizes: dict[str, Any] = {"HEADS": heads, "WIDTH": width}
    num_rows, rows = num_tokens * 2 * heads, TURNED_ROWS
    _turn_kernel[(triton.cdiv(num_rows, rows),)](
        joined, cos, sin, turned, num_rows, **sizes, ROWS=rows, num_warps=4
    )
    _forward_kernel[(heads, len(forward_tiles))](
        turned, joined, forward_tiles, out, lse, num_tokens, **sizes, **FORWARD
    )
    return out, lse, turned


@tiled_attention.register_fake
def _(joined: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, heads, width = joined.shape[0], joined.shape[1] // 3, joined.shape[2]
    return (
        joined.new_empty((num_tokens, heads, width)),
        joined.new_empty((heads, num_tokens), dtype=torch.float32),
        joined.new_empty((num_tokens, 2 * heads, width)),
    )


@torch.library.custom_op("arctrm::tiled_attention_backward", mutates_args=())
def _backward(
    joined: Tensor, cos: Tensor, sin: Tensor, tiles: Tensor,
    out: Tensor, lse: Tensor, turned: Tensor, d_out: Tensor,
) -> Tensor:  # fmt: skip
    joined, d_out = joined.contiguous(), d_out.contiguous()
    num_tokens, heads, width = out.shape
    d_joined, delta = torch.empty_like(joined), torch.empty_like(lse)
    sizes: dict[str, Any] = {"HEADS": heads, "WIDTH": width}
    grid, given = (heads, len(tiles)), (turned, joined, cos, sin, tiles)
    _queries_kernel[grid](*given, out, lse, d_out, d_joined, delta, num_tokens, **sizes, **QUERIES)
    _keys_kernel[grid](*given, lse, d_out, delta, d_joined, num_tokens, **sizes, **KEYS)
    return d_joined


@_backward.register_fake
def _(joined: Tensor, *others: Tensor) -> Tensor:
    return joined.new_empty(joined.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    joined, cos, sin, _, tiles = inputs
    ctx.save_for_backward(joined, cos, sin, tiles, *output)


def _gradient(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(*ctx.saved_tensors, d_out), None, None, None, None


tiled_attention.register_autograd(_gradient, setup_context=_save)
