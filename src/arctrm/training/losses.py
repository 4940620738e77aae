"""TRM's loss on packed batches, and the counts that metrics are made of.

Cross entropy is averaged over the labelled cells of each row, then over rows; half the binary
cross entropy of the halting logit against "the whole grid is right" is added (TRM section 2.3,
reference implementation `losses.py`).

Legend: T tokens, R rows, V cell codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.data.canvas import COLOUR

IGNORE = -100
HALT_WEIGHT = 0.5


class RowLosses(NamedTuple):
    """Per-row losses and counts; rows without a labelled cell count nothing."""

    cells: Tensor
    """float [R]: mean cross entropy of the row's labelled cells (nats)."""
    halt: Tensor
    """float32 [R]: binary cross entropy of the halting logit (nats)."""
    exact: Tensor
    """bool [R]: every labelled cell is right."""
    shape: Tensor
    """bool [R]: grid and border cells are told apart everywhere (the grid's size is right)."""
    cell_accuracy: Tensor
    """float32 [R]: fraction of labelled cells that are right."""
    real: Tensor
    """bool [R]: the row has labelled cells."""


def log_stablemax(logits: Tensor) -> Tensor:
    """Log of the stablemax distribution, in float64 (Prieto et al. 2025, arXiv 2501.04697)."""
    x = logits.double()
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    return (s / s.sum(-1, keepdim=True)).log()


def cell_cross_entropy(logits_TV: Tensor, labels_T: Tensor, stablemax: bool) -> Tensor:
    """Cross entropy [T] in nats, 0 where the label is ignored."""
    if not stablemax:
        return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="none")
    target = labels_T.clamp(min=0)[:, None]
    chosen = log_stablemax(logits_TV).gather(-1, target)[:, 0]
    return torch.where(labels_T == IGNORE, 0, -chosen)


def row_losses(
    logits_TV: Tensor,
    q_halt_R: Tensor,
    labels_T: Tensor,
    row_T: Tensor,
    stablemax: bool = False,
) -> RowLosses:
    """Losses and counts of each row; `row_T` maps tokens to rows (>= R: no row)."""
    rows = q_halt_R.shape[0]
    valid = labels_T != IGNORE
    predicted = logits_TV.argmax(-1)
    right = valid & (predicted == labels_T)
    same_kind = valid & ((predicted < COLOUR) == (labels_T < COLOUR))

    def per_row(values: Tensor) -> Tensor:
        total = torch.zeros(rows + 1, dtype=values.dtype, device=values.device)
        return total.index_add(0, row_T.clamp(max=rows), values)[:rows]

    counts = per_row(valid.float())
    divisor = counts.clamp(min=1)
    num_right = per_row(right.float())
    real = counts > 0
    exact = real & (num_right == counts)
    cells = per_row(cell_cross_entropy(logits_TV, labels_T, stablemax)) / divisor
    halt = F.binary_cross_entropy_with_logits(q_halt_R, exact.float(), reduction="none")
    shape = real & (per_row(same_kind.float()) == counts)
    return RowLosses(cells, halt * real, exact, shape, num_right / divisor, real)
