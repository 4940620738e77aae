"""What the adapters are made of: learned queries that read a set of vectors.

Special about the attention here: every row also has one learned key and value. A row in which
nothing may be attended therefore gives a learned constant, and never a division by zero. The same
block reads padded rows (`dense`) and packed ones (`packed`).

Legend: B rows, Q queries, S padded keys, T packed keys, D width, A heads, K = D / A, H width of
the reader.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arctrm.errors import ConfigError
from arctrm.trm.layers import rms_norm, truncated_normal

Z_SCALE = 0.1
"""Adapters start as a whisper beside TRM's own input and latents (deviation 1), but not silent:
a zero would keep the first gradient from the reader."""

SHARPNESS = 4.0
"""Deviation of the attention logits at the start. At 1, queries average hundreds of tokens: all
slots say nearly the same, and nearly the same for every task."""


class Null(NamedTuple):
    """The key and value that every row has."""

    key: Tensor
    """[A, K]"""
    value: Tensor
    """[A, K]"""


Attend = Callable[[Tensor, Tensor, Tensor, Null], Tensor]
"""Queries [B, Q, A, K], keys and values [..., A, K], null -> [B, Q, A, K]."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A matrix without bias that keeps the deviation of its input."""
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(truncated_normal(outputs, inputs, std=inputs**-0.5))
    return layer


def table(rows: int, width: int) -> nn.Parameter:
    """Learned vectors, small beside what attention adds to them."""
    return nn.Parameter(truncated_normal(rows, width, std=width**-0.5))


def dense(mask_BS: Tensor) -> Attend:
    """Attention to the keys [B, S, A, K] of the own row where the bool mask is True."""
    allowed = F.pad(mask_BS, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + S)

    def attend(q_BQAK: Tensor, k_BSAK: Tensor, v_BSAK: Tensor, null: Null) -> Tensor:
        rows = k_BSAK.shape[0]
        k, v = (
            torch.cat((extra.expand(rows, 1, -1, -1), x), dim=1).transpose(1, 2)
            for extra, x in zip(null, (k_BSAK, v_BSAK), strict=True)
        )
        return F.scaled_dot_product_attention(
            q_BQAK.transpose(1, 2), k, v, attn_mask=allowed
        ).transpose(1, 2)

    return attend


def packed(row_T: Tensor, mask_T: Tensor) -> Attend:
    """Attention to the packed keys [T, A, K] of the own row where the bool mask is True.

    `row_T` must be a row of the queries wherever the mask is True.
    """

    def attend(q_BQAK: Tensor, k_TAK: Tensor, v_TAK: Tensor, null: Null) -> Tensor:
        row = torch.where(mask_T, row_T, 0)
        q = q_BQAK * q_BQAK.shape[-1] ** -0.5
        scores = (q.index_select(0, row) * k_TAK[:, None]).sum(-1).float()  # (T, Q, A)
        scores = scores.masked_fill(~mask_T[:, None, None], -torch.inf)
        own = (q * null.key).sum(-1).float()  # (B, Q, A)
        index = row[:, None, None].expand_as(scores)
        top = own.detach().scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - top.index_select(0, row)).exp()
        base = (own - top).exp()
        total = base.index_add(0, row, weights)
        summed = (base[..., None] * null.value).index_add(
            0, row, weights[..., None] * v_TAK[:, None]
        )
        return (summed / total[..., None]).to(q_BQAK.dtype)

    return attend


class CrossBlock(nn.Module):
    """Queries read the keys, then think: pre-norm cross-attention and SwiGLU (inner width D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ConfigError(
                f"adapter: width {width} is not a multiple of num_heads = {num_heads}; "
                f"use {width // num_heads * num_heads or num_heads} or another number of heads"
            )
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.gate_up = linear(width, 2 * width)
        self.down = linear(width, width)
        self.sharpness = nn.Parameter(torch.full((num_heads, 1), SHARPNESS))
        self.null = nn.Parameter(truncated_normal(2, num_heads, width // num_heads, std=1.0))

    def forward(self, x_BQD: Tensor, keys: Tensor, attend: Attend) -> Tensor:
        """The queries [B, Q, D] after reading `keys` [..., D] as `attend` allows."""
        heads = (self.num_heads, -1)
        q = rms_norm(self.query(rms_norm(x_BQD)).unflatten(-1, heads)) * self.sharpness
        k = rms_norm(self.key(keys).unflatten(-1, heads))
        v = self.value(keys).unflatten(-1, heads)
        null_key, null_value = self.null.to(k.dtype)
        read = attend(q.to(k.dtype), k, v, Null(rms_norm(null_key), null_value))
        x_BQD = x_BQD + self.out(read.flatten(-2))
        gate, up = self.gate_up(rms_norm(x_BQD)).chunk(2, dim=-1)
        return x_BQD + self.down(F.silu(gate) * up)


def masked(x: Tensor, mask: Tensor, width: int, name: str) -> Tensor:
    """`x` [..., width] in float32 with zeros where the bool mask [...] is False.

    What lies there is replaced, not multiplied: padding may hold anything, NaN included.

    Raises:
        ConfigError: the width is another than the adapter was made for, or the mask does not fit.
    """
    if x.shape[-1] != width or mask.shape != x.shape[:-1]:
        raise ConfigError(
            f"{name}: got vectors {list(x.shape)} with a mask {list(mask.shape)}, expected width "
            f"{width} and one mask value per vector; use the adapter made for this model"
        )
    return torch.where(mask[..., None], x.float(), 0.0)


def count_parameters(adapters: Mapping[str, nn.Module]) -> dict[str, int]:
    """Parameters of each adapter, and their "total"."""
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in adapters.items()}
    return sizes | {"total": sum(sizes.values())}
