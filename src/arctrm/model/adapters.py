"""Adapters between a hub model and TRM, which live in spaces of different widths.

All start as a whisper beside what TRM embeds itself; a zero would keep the gradient from the LLM.
Legend: B rows, S states of a row, Q queries, H width of the LLM, D width of TRM, C context slots,
P prefix vectors, N rows (= columns) of the canvas, T cells of a packed batch.
"""

from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arctrm.errors import ConfigError

WHISPER = 0.1  # first deviation of what adapters add, where embeddings have 1
SHARPNESS = 4.0  # of attention logits; at 1 all queries say nearly the same, for every task
NUM_BLOCKS = 2


class Read(NamedTuple):
    """What the learned queries have read, for context slots, canvas rows and canvas columns."""

    slots: Tensor  # [B, C, D]
    rows: Tensor  # [B, N, D]
    columns: Tensor  # [B, N, D]


class TextToLatentAdapter(nn.Module):
    """LLM -> TRM: learned queries read the sequence, one per slot, canvas row and canvas column.

    A cell's latents come from its row and its column vector through a small head, so that the map
    from 4096 wide states to 900 cells of 512 costs 7 million parameters, not 1.9 billion.
    """

    def __init__(
        self,
        llm_hidden_size: int = 4096,
        trm_hidden_size: int = 512,
        trm_seq_len: int = 900,
        num_context_slots: int = 16,
        num_heads: int = 8,
    ):
        super().__init__()
        self.side, width = isqrt(trm_seq_len), trm_hidden_size
        if self.side**2 != trm_seq_len or not trm_seq_len:
            raise ConfigError(f"trm_seq_len = {trm_seq_len} is no square number; use 900 (30 x 30)")
        self.num_context_slots = num_context_slots
        self.project = _linear(llm_hidden_size, width)
        queries = num_context_slots + 2 * self.side
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.blocks = nn.ModuleList(_CrossBlock(width, num_heads) for _ in range(NUM_BLOCKS))
        self.slot_head = _linear(width, width)
        self.cell_head = _linear(width, 2 * width)

    def forward(self, llm_hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z_H and z_L [B, N x N, D] of states [B, H] or [B, S, H], bool mask [B, S]."""
        read = self.read(llm_hidden, mask)
        z_H, z_L = self._latents(read.rows[:, :, None], read.columns[:, None])
        return z_H.flatten(1, 2), z_L.flatten(1, 2)

    def context(self, llm_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prefix slots [B, C, D]."""
        return self.slots(self.read(llm_hidden, mask))

    def read(self, llm_hidden: Tensor, mask: Tensor | None = None) -> Read:
        """What the queries read of the states."""
        if llm_hidden.ndim == 2:
            llm_hidden = llm_hidden[:, None]
        if mask is None:
            mask = llm_hidden.new_ones(llm_hidden.shape[:2], dtype=torch.bool)
        hidden = _masked(llm_hidden, mask)
        return self.read_keys(self.keys(hidden), mask)

    def keys(self, llm_hidden: Tensor) -> Tensor:
        """States [..., H] as the queries see them, [..., D]."""
        return _norm(self.project(_norm(llm_hidden)))

    def read_keys(self, keys_BSD: Tensor, mask: Tensor) -> Read:
        """As `read`, of `keys`."""
        x = self.queries.expand(len(keys_BSD), -1, -1)
        for block in self.blocks:
            x = block(x, keys_BSD, mask)
        return Read(*_norm(x).split((self.num_context_slots, self.side, self.side), dim=1))

    def slots(self, read: Read) -> Tensor:
        """Prefix slots [B, C, D] of what was read."""
        return self.slot_head(read.slots) * WHISPER

    def cells(self, read: Read, row_T: Tensor, y_T: Tensor, x_T: Tensor) -> tuple[Tensor, Tensor]:
        """z_H and z_L, [T, D], of some cells (row, y, x) of what was read."""
        return self._latents(read.rows[row_T, y_T], read.columns[row_T, x_T])

    def _latents(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        cell = _norm(row + column + row * column)
        z_H, z_L = (self.cell_head(cell) * WHISPER).chunk(2, dim=-1)
        return z_H, z_L


class AlignedAdapter(nn.Module):
    """LLM -> TRM, cell by cell: both spend one token on a cell, so no place has to be learned."""

    def __init__(self, llm_hidden_size: int = 4096, trm_hidden_size: int = 512):
        super().__init__()
        self.norm = nn.LayerNorm(llm_hidden_size)
        self.project = _linear(llm_hidden_size, trm_hidden_size)
        self.to_z, self.to_input = (_linear(trm_hidden_size, trm_hidden_size) for _ in range(2))

    def forward(self, llm_hidden: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """(z, injection), [T, D] each, of states [T, H]; zero where bool `there` [T] is False."""
        hidden = _masked(llm_hidden, there)
        x = self.project(self.norm(hidden)) * there[:, None]
        return self.to_z(x) * WHISPER, self.to_input(x) * WHISPER


class LatentToTextAdapter(nn.Module):
    """TRM -> LLM: learned queries read both latents and become vectors of size `output_scale`."""

    def __init__(
        self,
        trm_hidden_size: int = 512,
        llm_hidden_size: int = 4096,
        num_prefix: int = 4,
        num_heads: int = 8,
        output_scale: float = 0.02,
    ):
        super().__init__()
        self.output_scale = output_scale
        first = torch.randn(num_prefix, trm_hidden_size) * trm_hidden_size**-0.5
        self.queries = nn.Parameter(first)
        self.from_H, self.from_L = (_linear(trm_hidden_size, trm_hidden_size) for _ in "HL")
        self.block = _CrossBlock(trm_hidden_size, num_heads)
        self.project = _linear(trm_hidden_size, llm_hidden_size)

    def forward(self, z_H: Tensor, z_L: Tensor, mask: Tensor | None = None) -> Tensor:
        """Soft prefix [B, P, H] of latents [B, S, D], bool mask [B, S]; a row with nothing to read
        gives a learned constant.
        """
        if mask is None:
            mask = z_H.new_ones(z_H.shape[:2], dtype=torch.bool)
        high, low = (_norm(_masked(z, mask)) for z in (z_H, z_L))
        keys = _norm(self.from_H(high) + self.from_L(low))
        x = self.block(self.queries.expand(len(keys), -1, -1), keys, mask)
        return self.project(_norm(x)) * self.output_scale


class _CrossBlock(nn.Module):
    """Pre-norm cross-attention and SwiGLU; every row also has one learned key and value."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"width {width} is not a multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (_linear(width, width) for _ in range(4))
        self.gate_up, self.down = _linear(width, 2 * width), _linear(width, width)
        self.sharpness = nn.Parameter(torch.full((num_heads, 1), SHARPNESS))
        self.null = nn.Parameter(torch.randn(2, num_heads, width // num_heads))

    def forward(self, x_BQD: Tensor, keys_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """The queries [B, Q, D] after reading the keys where the bool mask is True."""
        heads = (self.num_heads, -1)
        q = _norm(self.query(_norm(x_BQD)).unflatten(-1, heads)) * self.sharpness
        k = _norm(self.key(keys_BSD).unflatten(-1, heads))
        v = self.value(keys_BSD).unflatten(-1, heads)
        null_key, null_value = self.null.expand(len(k), 1, -1, -1, -1).unbind(2)
        k, v = torch.cat((_norm(null_key), k), 1), torch.cat((null_value, v), 1)
        allowed = F.pad(mask_BS, (1, 0), value=True)[:, None, None]  # (B, 1, 1, 1 + S)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x_BQD = x_BQD + self.out(read.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(_norm(x_BQD)).chunk(2, dim=-1)
        return x_BQD + self.down(F.silu(gate) * up)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.trunc_normal_(layer.weight, std=inputs**-0.5)
    return layer


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in float32, zero where the mask is False: what lies there may be anything, even NaN."""
    return torch.where(mask[..., None], x.float(), 0.0)
