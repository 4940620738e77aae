"""The one set of TRM blocks, for packed batches of token sequences.

Everything works on a flat axis of tokens; a `Sequences` says where each sequence begins. The
reference layout (all sequences equally long) and the compact layout (canvases cropped to the pair)
differ in that object and in the rotary tables only.

Legend: T tokens of a packed batch, N sequences in it, D width, A heads, K = D / A head width,
I inner width of the MLP.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

RMS_EPS = 1e-5


class Sequences(NamedTuple):
    """Where the sequences of a packed batch lie, and the rotary tables of its tokens."""

    offsets: Tensor
    """int32 [N + 1]: sequence n is tokens offsets[n] : offsets[n + 1]."""
    max_len: int
    """Upper bound of a sequence's length in tokens."""
    cos: Tensor
    """[T, 1, K]."""
    sin: Tensor
    """[T, 1, K]."""
    uniform: bool
    """All sequences are exactly max_len long."""
    lengths: tuple[int, ...] | None
    """Lengths of the sequences that exist, where the packed attention kernel is not available
    (CPU, float32)."""


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last axis; no weight, computed in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=RMS_EPS).to(x.dtype)


def truncated_normal(*shape: int, std: float) -> Tensor:
    """Normal numbers of standard deviation `std` cut at two deviations, as the reference does."""
    # A normal cut at +-2 has a deviation of 0.8796: divide it out, so that `std` is what comes out.
    scale = std / 0.87962566
    return torch.nn.init.trunc_normal_(torch.empty(*shape), std=scale, a=-2 * scale, b=2 * scale)


def rotary_tables(positions_TP: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, K] of P position axes that share the head width equally.

    With one axis this is the usual rotary embedding; with two (row, column) the first half of the
    frequencies turns with the row and the second half with the column.
    """
    axes = positions_TP.shape[1]
    per_axis = head_width // 2 // axes
    exponents = torch.arange(per_axis, device=positions_TP.device, dtype=torch.float32) / per_axis
    angles = positions_TP.float()[:, :, None] * base**-exponents  # (T, P, K / 2P)
    angles = angles.flatten(1).repeat(1, 2)[:, None, :]  # (T, 1, K)
    return angles.cos(), angles.sin()


def apply_rotary(x_TAK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by the token's angles."""
    first, second = x_TAK.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_TAK.float() * cos + turned * sin).to(x_TAK.dtype)


def attend(q_TAK: Tensor, k_TAK: Tensor, v_TAK: Tensor, seq: Sequences) -> Tensor:
    """Full attention inside each sequence; returns [T, A, K].

    Three ways to the same result: batched when all sequences are equally long, torch's packed
    kernel in half precision on CUDA, one sequence after the other elsewhere (no padding: most
    canvases are small, a few are 30x30).
    """
    if seq.uniform:
        q, k, v = (x.unflatten(0, (-1, seq.max_len)).transpose(1, 2) for x in (q_TAK, k_TAK, v_TAK))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    if seq.lengths is None:
        out = varlen_attn(q_TAK, k_TAK, v_TAK, seq.offsets, seq.offsets, seq.max_len, seq.max_len)
        assert isinstance(out, Tensor)
        return out
    parts = zip(
        *(x.transpose(0, 1).split(seq.lengths, 1) for x in (q_TAK, k_TAK, v_TAK)), strict=True
    )
    done = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in parts]
    return torch.cat(done, dim=1).transpose(0, 1)


class BlockWeights(NamedTuple):
    """The four matrices of one block, cast to the compute dtype."""

    qkv: Tensor
    """[3D, D]"""
    out: Tensor
    """[D, D]"""
    gate_up: Tensor
    """[2I, D]"""
    down: Tensor
    """[D, I]"""


def block(x_TD: Tensor, w: BlockWeights, seq: Sequences, num_heads: int, qk_norm: bool) -> Tensor:
    """Post-norm attention, then post-norm SwiGLU (TRM section 2; norms have no weight)."""
    q, k, v = F.linear(x_TD, w.qkv).unflatten(-1, (3, num_heads, -1)).unbind(1)  # (T, A, K)
    if qk_norm:
        q, k = rms_norm(q), rms_norm(k)
    q, k = apply_rotary(q, seq.cos, seq.sin), apply_rotary(k, seq.cos, seq.sin)
    x_TD = rms_norm(x_TD + F.linear(attend(q, k, v, seq).flatten(1), w.out))
    gate, up = F.linear(x_TD, w.gate_up).chunk(2, dim=-1)
    return rms_norm(x_TD + F.linear(F.silu(gate) * up, w.down))


def run_level(
    z_TD: Tensor,
    injection_TD: Tensor,
    weights: list[BlockWeights],
    seq: Sequences,
    num_heads: int,
    qk_norm: bool,
) -> Tensor:
    """One pass of the recursive network: add the injection, then all blocks."""
    z_TD = z_TD + injection_TD
    for w in weights:
        z_TD = block(z_TD, w, seq, num_heads, qk_norm)
    return z_TD


class Matrix(nn.Module):
    """A weight matrix without bias, held in float32; applied by `block`."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal(rows, columns, std=columns**-0.5))


class BlockParameters(nn.Module):
    """Parameters of one block, named as in the reference implementation."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = Matrix(3 * hidden_size, hidden_size)
        self.self_attn.o_proj = Matrix(hidden_size, hidden_size)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = Matrix(2 * inner_size, hidden_size)
        self.mlp.down_proj = Matrix(hidden_size, inner_size)

    def cast(self, dtype: torch.dtype) -> BlockWeights:
        """The matrices in the compute dtype; cast once per supervision step, not per pass."""
        weights = dict(self.named_parameters())
        names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        return BlockWeights(*(weights[f"{name}.weight"].to(dtype) for name in names))


class RecursiveLevel(nn.Module):
    """The parameters of the one network that updates both latents."""

    def __init__(self, num_layers: int, hidden_size: int, inner_size: int):
        super().__init__()
        self.layers = nn.ModuleList(
            BlockParameters(hidden_size, inner_size) for _ in range(num_layers)
        )

    def cast(self, dtype: torch.dtype) -> list[BlockWeights]:
        """All blocks' matrices in the compute dtype."""
        return [layer.cast(dtype) for layer in self.layers if isinstance(layer, BlockParameters)]
