"""What the reader tells TRM when both answer: states of the query and its draft, packed.

A guide belongs to one query of TRM: the reader's prompt for the same input under the same view, and
the draft that the reader wrote after it. All states of a guide are visible to its query: nothing in
them is an answer that somebody gave.

Legend: N reader tokens of all guides, R rows of TRM, H width of the reader.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arctrm.adapters.draft import INPUT, OUTPUT
from arctrm.data.task import NUM_COLOURS, Grid
from arctrm.hybrid import NO_CELL, Hybrid, ReaderStates
from arctrm.reader.attention import new_packing
from arctrm.reader.interface import Prompt
from arctrm.reader.tokens import (
    END,
    INPUT_PART,
    OUTPUT_PART,
    PARTS_PER_PAIR,
    PREFIX,
    SIDE,
    grid_tokens,
    pack_position,
)


@dataclass(frozen=True, eq=False)
class Guide:
    """What the reader has to say to one query."""

    prompt: Prompt
    """The same input under the same view."""
    draft: Grid | None
    """As the view shows it; None where there is none."""


def states(
    hybrid: Hybrid,
    guides: Sequence[Guide],
    num_rows: int,
    soft_RPH: Tensor | None = None,
) -> ReaderStates:
    """The reader's states of the guides of rows 0, 1, ...; rows without a guide see nothing.

    `soft_RPH` is the soft prefix of each row from an earlier attempt.
    """
    reader = hybrid.tiny
    assert reader is not None
    num_soft = 0 if soft_RPH is None else soft_RPH.shape[1]
    spelt = [_spelt(guide, num_soft) for guide in guides]
    lengths = [len(tokens) for tokens, _ in spelt]
    tokens, positions = (
        torch.from_numpy(np.concatenate(arrays)).to(reader.device)
        for arrays in zip(*spelt, strict=True)
    )
    length = torch.tensor(lengths, device=reader.device)
    row = torch.arange(len(guides), device=reader.device).repeat_interleave(length)
    conditions = torch.tensor([guide.prompt.condition for guide in guides])
    added = reader.condition(*conditions.to(reader.device).unbind(1))[row]
    if soft_RPH is not None:
        is_soft = tokens == PREFIX
        soft = soft_RPH[: len(guides)].flatten(0, 1).to(added.dtype)
        added = added.index_add(0, is_soft.nonzero()[:, 0], soft)
    ends = length.cumsum(0)
    offsets = torch.cat((ends.new_zeros(1), ends)).to(torch.int32)
    packing = new_packing(offsets, max(lengths), reader.dtype)
    hidden = reader.hidden(tokens, positions, added, packing)
    queries = torch.tensor([guide.prompt.output_start for guide in guides])
    cells = _cells(tokens, positions, queries.to(reader.device)[row])
    padded = torch.nn.functional.pad
    missing = num_rows - len(guides)
    begin, visible = padded(ends - length, (0, missing)), padded(length, (0, missing))
    return ReaderStates(hidden, row, *cells, begin, visible)


def longest_visible(states: ReaderStates) -> int:
    """States that the longest row sees."""
    return max(1, int(states.visible.max()))


def _spelt(guide: Guide, num_soft: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of prompt, draft, and room for a soft prefix."""
    prompt = guide.prompt
    part = prompt.output_start // SIDE**2
    tokens, positions = [prompt.tokens], [prompt.positions]
    if guide.draft is not None:
        cells, places = grid_tokens(guide.draft, part)
        tokens += [cells, np.array([END])]
        positions += [places, np.array([pack_position(part, guide.draft.shape[0])])]
    following = part - OUTPUT_PART + PARTS_PER_PAIR  # the start of the pair that would come next
    tokens.append(np.full(num_soft, PREFIX))
    positions.append(np.array([pack_position(following, 0, x) for x in range(num_soft)], dtype=int))
    return np.concatenate(tokens).astype(np.int64), np.concatenate(positions).astype(np.int64)


def _cells(
    tokens: Tensor, positions: Tensor, output_start: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kind, y and x of each token: cells of the query's own input and draft only."""
    part = torch.div(positions, SIDE**2, rounding_mode="floor")
    own = torch.div(output_start, SIDE**2, rounding_mode="floor")
    is_cell = tokens < NUM_COLOURS
    kind = torch.full_like(tokens, NO_CELL)
    kind = torch.where(is_cell & (part == own - OUTPUT_PART + INPUT_PART), INPUT, kind)
    kind = torch.where(is_cell & (part == own), OUTPUT, kind)
    y = torch.div(positions, SIDE, rounding_mode="floor") % SIDE
    return kind, y, positions % SIDE
