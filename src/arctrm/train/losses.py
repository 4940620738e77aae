"""Loss and counts of packed batches, the same for both voices.

Cross entropy is averaged over the labelled tokens of a batch. In the TRM voice half the binary
cross entropy of the halting logit against "all cells are right" is added (arXiv 2510.04871, 2.3).

Legend: T tokens, R rows (pairs), V tokens or colours that a logit is for.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.data.task import NUM_COLOURS

IGNORE = -100  # label of a token that nothing is asked of
HALT_WEIGHT = 0.5


class RowCounts(NamedTuple):
    """Loss and counts of a packed batch; rows without a label count nothing."""

    total: Tensor  # sum of the cross entropies of all labels (nats), with gradient
    num_labels: Tensor
    real: Tensor  # bool [R]: the row has labels
    loss: Tensor  # float32 [R]: mean cross entropy of the row's labels (nats), without gradient
    exact: Tensor  # bool [R]: every label is predicted
    shape: Tensor  # bool [R]: cells and ends of rows and grid stand where they do in the answer
    cell_accuracy: Tensor  # float32 [R]: share of the row's labels that are predicted

    @property
    def mean(self) -> Tensor:
        """Mean cross entropy of the batch's labels, with gradient."""
        return self.total / self.num_labels.clamp(min=1)


def row_counts(logits_TV: Tensor, labels_T: Tensor, row_T: Tensor, num_rows: int) -> RowCounts:
    """Loss and counts of each row; `row_T` says whose a token is (`num_rows` or more: nobody's)."""
    entropy = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="none")
    valid = labels_T != IGNORE
    predicted = logits_TV.argmax(-1)
    right = valid & (predicted == labels_T)
    same_kind = valid & ((predicted < NUM_COLOURS) == (labels_T < NUM_COLOURS))
    columns = torch.stack([x.detach().float() for x in (valid, right, same_kind, entropy)], 1)
    sums = torch.zeros(num_rows + 1, len(columns[0]), device=columns.device)
    sums = sums.index_add(0, row_T.clamp(max=num_rows), columns)[:num_rows]
    count, num_right, num_same_kind, loss = sums.unbind(1)
    real, divisor = count > 0, count.clamp(min=1)
    exact, shape = (real & (number == count) for number in (num_right, num_same_kind))
    loss, accuracy = loss / divisor, num_right / divisor
    return RowCounts(entropy.sum(), valid.sum(), real, loss, exact, shape, accuracy)


def halting_loss(q_halt_R: Tensor, counts: RowCounts) -> Tensor:
    """float32 [R]: binary cross entropy (nats) of the halting logits; 0 for rows without labels."""
    of, target = F.binary_cross_entropy_with_logits, counts.exact.float()
    return of(q_halt_R, target, reduction="none") * counts.real


def halting_mean(q_halt_R: Tensor, counts: RowCounts) -> Tensor:
    """What halting adds to the loss of a batch: `HALT_WEIGHT` times its mean over rows."""
    number = counts.real.sum().clamp(min=1)
    return HALT_WEIGHT * halting_loss(q_halt_R, counts).sum() / number
