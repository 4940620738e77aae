"""Packed batches: rows of different lengths side by side on one axis of tokens.

A row is P prefix slots followed by the cells of its canvas, row-major. The shapes depend on the
token budget only, never on the rows, so one compiled graph serves every batch; tokens that no row
uses belong to dummy sequences that carry no loss.

Legend: T tokens, R rows, N = R + dummy sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.config.trm import TRMConfig
from arctrm.data.task import MAX_SIDE
from arctrm.trm.layers import Sequences, rotary_tables

DUMMY = 256
"""Tokens of the first dummy sequences: attention costs their square, so they are short."""


class TokenMap(NamedTuple):
    """Where each token of a packed batch belongs."""

    row: Tensor
    """int64 [T]: row of the token; R or more: no row."""
    slot: Tensor
    """int64 [T]: place in its sequence; below P: prefix slot."""
    y: Tensor
    """int64 [T]: canvas row of the cell (0 for prefix slots)."""
    x: Tensor
    """int64 [T]: canvas column of the cell (0 for prefix slots)."""
    offsets: Tensor
    """int32 [N + 1]: first token of each sequence."""
    first: Tensor
    """int64 [R]: first token of each row, T where the row is not there."""


def longest_row(config: TRMConfig) -> int:
    """Tokens of a row with a full 30x30 canvas."""
    return config.num_slots + MAX_SIDE * MAX_SIDE


def dummy_lengths(num_tokens: int, unused: Tensor, max_len: int) -> Tensor:
    """Lengths of as many dummy sequences as an axis of `num_tokens` may need, for `unused` ones.

    Short ones hold what a row that did not fit leaves over; there is more only where rows run out.
    """
    short = min(DUMMY, max_len)
    num_short = -(-min(max_len, num_tokens) // short)
    num_long = -(-max(num_tokens - num_short * short, 0) // max_len)
    number = torch.arange(num_short + num_long, device=unused.device)
    sizes = torch.where(number < num_short, short, max_len)
    return (unused - sizes.cumsum(0) + sizes).clamp(min=0).minimum(sizes)


def token_map(
    lengths_R: Tensor, widths_R: Tensor, num_tokens: int, max_len: int, num_slots: int
) -> TokenMap:
    """Lay rows of `lengths_R` tokens on an axis of `num_tokens`, the rest in dummy sequences.

    A length of 0 marks a row that is not there. Sum of lengths <= num_tokens; no length, and no
    dummy, is above `max_len`.
    """
    device = lengths_R.device
    used = lengths_R.sum()
    dummies = dummy_lengths(num_tokens, num_tokens - used, max_len)
    ends = torch.cat((lengths_R, dummies)).cumsum(0)
    token = torch.arange(num_tokens, device=device)
    row = torch.searchsorted(ends, token, right=True)
    begins = torch.cat((ends.new_zeros(1), ends))
    slot = token - begins[row]
    real = row < lengths_R.shape[0]
    width = torch.where(real, widths_R[torch.where(real, row, 0)], 1).clamp(min=1)
    cell = (slot - num_slots).clamp(min=0) * real
    return TokenMap(
        row,
        slot,
        torch.div(cell, width, rounding_mode="floor"),
        cell % width,
        begins.to(torch.int32),
        torch.where(lengths_R > 0, begins[: lengths_R.shape[0]], num_tokens),
    )


def sequences(tokens: TokenMap, config: TRMConfig, dtype: torch.dtype) -> Sequences:
    """Rotary tables and attention layout of a packed batch."""
    head = config.hidden_size // config.num_heads
    if config.layout == "reference":
        positions = tokens.slot[:, None]
    else:
        positions = torch.stack((tokens.y, tokens.x), dim=1)
    cos, sin = rotary_tables(positions, head, config.rope_base)
    packed_kernel = has_packed_kernel(cos.device, dtype)
    lengths = None if packed_kernel else tuple(n for n in tokens.offsets.diff().tolist() if n)
    return Sequences(tokens.offsets, longest_row(config), cos, sin, False, lengths)


def has_packed_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch attends to packed sequences in one call there: on a GPU, in 16 bits."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
