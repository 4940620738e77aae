"""What the reader tells TRM when both answer: states of the query and its draft, packed.

A guide belongs to one query of TRM: the reader's prompt for the same input under the same view, and
the draft that the reader wrote after it. It is laid out in the tokens of the tiny reader and read
as the sequences of training are, by tiny readers and hub models. All states of a guide are visible
to its query: nothing in them is an answer that somebody gave.

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
from arctrm.training import reader_stream as reading
from arctrm.training.joint_hub import joint_reader
from arctrm.training.joint_reader import JointReader
from arctrm.training.losses import IGNORE
from arctrm.training.reader_stream import ReaderBatch

CONDITION = [reading.TASK, reading.DIHEDRAL, reading.FLAG]
"""Columns of a reader's row that a prompt's condition fills."""


@dataclass(frozen=True, eq=False)
class Guide:
    """What the reader has to say to one query."""

    prompt: Prompt
    """The same input under the same view, laid out for the tiny reader."""
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
    reader = joint_reader(hybrid.reader)
    batch = _batch(reader, guides, 0 if soft_RPH is None else soft_RPH.shape[1])
    soft_NH = None
    if soft_RPH is not None:
        soft = soft_RPH[: len(guides)].flatten(0, 1)
        soft_NH = soft.new_zeros(len(batch.tokens), soft.shape[1])
        soft_NH = soft_NH.index_copy(0, (batch.tokens == PREFIX).nonzero()[:, 0], soft)
    hidden = reader.hidden(batch, soft_NH)
    queries = torch.tensor([guide.prompt.output_start for guide in guides])
    cells = _cells(batch.tokens, batch.positions, queries.to(batch.row.device)[batch.row])
    offsets = batch.packing.offsets.long()
    padded = torch.nn.functional.pad
    missing = num_rows - len(guides)
    begin, visible = padded(offsets[:-1], (0, missing)), padded(offsets.diff(), (0, missing))
    return ReaderStates(hidden, batch.row, *cells, begin, visible)


def _batch(reader: JointReader, guides: Sequence[Guide], num_soft: int) -> ReaderBatch:
    """The guides one after another as in training; nothing is to be learned from them."""
    device = reader.grids.device
    spelt = [reader.marked(*_spelt(guide, num_soft)) for guide in guides]
    tokens, positions = (
        torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*spelt, strict=True)
    )
    lengths = [len(codes) for codes, _ in spelt]
    length = torch.tensor(lengths, device=device)
    offsets = torch.nn.functional.pad(length.cumsum(0), (1, 0)).to(torch.int32)
    rows = torch.zeros(len(guides), reading.NUM_COLUMNS, dtype=torch.long)
    prompts = None
    if reader.config.sees_inputs_whole:
        prompts = torch.tensor([len(guide.prompt.tokens) for guide in guides], device=device)
    rows[:, CONDITION] = torch.tensor([guide.prompt.condition for guide in guides])
    return ReaderBatch(
        rows.to(device),
        tokens,
        positions,
        torch.full_like(tokens, IGNORE),
        torch.arange(len(guides), device=device).repeat_interleave(length),
        new_packing(offsets, max(lengths), reader.dtype, prompts),
        len(guides),
    )


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
