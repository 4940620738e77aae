"""What TRM starts from in training: first answers that are partly hidden, partly wrong, or drafts.

The label of every answer cell is its own true colour. No row is asked to copy a true answer: what
is shown is hidden in part, wrong in part, or the reader's own draft.

Legend: T tokens, R rows (pairs).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arctrm.config import TRMConfig
from arctrm.data.task import NUM_COLOURS
from arctrm.model.layout import HIDDEN, OUTPUT_PART, part_of
from arctrm.model.trm import Rows, State, first_state, reader_states
from arctrm.model.trunk import Trunk
from arctrm.train.drafts import DraftPool
from arctrm.train.losses import IGNORE
from arctrm.train.sequences import PAIR, Batch, Sequences
from arctrm.train.source import OUTPUT, PairSource

RIGHT_DRAFTS = 0.25
"""Share of the right drafts that is shown: all would teach to copy; none, that a draft is wrong."""


class Questions(NamedTuple):
    """Training rows of TRM: the question, a first answer, and what the answer should be."""

    rows: Rows
    labels: Tensor  # int64 [T]: colour of each answer cell, else IGNORE
    prompts: Tensor  # int64: tokens of each sequence (dummies included) before its answer
    drafted: Tensor  # bool [R]: the first answer is the reader's draft


def questions(
    batch: Batch,
    sequences: Sequences,
    config: TRMConfig,
    drafts: DraftPool | None = None,
    drafted: Tensor | None = None,
) -> Questions:
    """First answers for a packed batch of one pair a sequence; `drafted`: rows with a draft."""
    cells, shown = answer_cells(batch), batch.tokens
    if drafted is None:
        drafted = torch.zeros(len(batch.rows), dtype=torch.bool, device=shown.device)
        if drafts is not None:
            drafted = draw_drafted(batch.rows, sequences.source, drafts, config.draft_share)
    if drafts is not None:
        tokens = sequences.tokens_of(batch, with_drafts(batch.rows, drafts, drafted))
        shown = torch.where(cells, tokens, shown)
    share, chance = torch.rand(2, len(drafted), device=shown.device)
    share = torch.where(chance < config.hidden_whole, 1.0, share)
    hidden = torch.rand(shown.shape, device=shown.device) < share[batch.own_row]
    true = cells & ~drafted[batch.own_row]
    shown = with_wrong_colours(shown, true, batch.row, config.noise)
    shown = torch.where(true & hidden, HIDDEN, shown)
    rows = Rows(shown, batch.positions, batch.row, cells, batch.condition, batch.seen)
    return Questions(rows, torch.where(cells, batch.tokens, IGNORE), batch.prompts, drafted)


@torch.no_grad()
def start(trunk: Trunk, asked: Questions, *, aligned: bool = False) -> State:
    """The first state; where `aligned`, drafted rows begin with the reader's states."""
    if not aligned:
        return first_state(trunk, asked.rows)
    own_row = asked.rows.row.clamp(max=len(asked.drafted) - 1)
    states = reader_states(trunk, asked.rows, asked.prompts) * asked.drafted[own_row, None]
    return first_state(trunk, asked.rows, states)


def answer_cells(batch: Batch) -> Tensor:
    """bool [T]: the cells of the outputs."""
    is_output = part_of(batch.positions) == OUTPUT_PART
    return is_output & (batch.tokens < NUM_COLOURS) & (batch.row < len(batch.rows))


def with_wrong_colours(tokens: Tensor, cells: Tensor, row: Tensor, share: float) -> Tensor:
    """Tokens [T] with a share of `cells` (bool [T]) in random colours, in every other row."""
    if not share:
        return tokens
    changed = cells & (row % 2 == 0) & (torch.rand(tokens.shape, device=tokens.device) < share)
    return torch.where(changed, torch.randint_like(tokens, NUM_COLOURS), tokens)


def with_drafts(rows: Tensor, drafts: DraftPool, drafted: Tensor) -> Tensor:
    """Rows [R, columns] of which the `drafted` ones (bool [R]) have their draft as the output."""
    rows = rows.clone()
    rows[:, PAIR] += drafts.num_pairs * drafted
    return rows


def draw_drafted(rows: Tensor, source: PairSource, drafts: DraftPool, share: float) -> Tensor:
    """bool [R]: rows that begin with a draft; it has the answer's size, which TRM is given."""
    pair = rows[:, PAIR]
    size, own = (source.pairs[p, OUTPUT][:, 1:] for p in (pair, pair + drafts.num_pairs))
    chance = torch.rand(2, len(pair), device=pair.device)
    trusted = ~drafts.right[pair] | (chance[1] < RIGHT_DRAFTS)
    return drafts.there[pair] & (size == own).all(1) & trusted & (chance[0] < share)
