"""From the counts that steps sum up on the device to the metrics that are logged."""

import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from arctrm.training.losses import HALT_WEIGHT
from arctrm.training.progress import EXAMPLES_PER_SECOND
from arctrm.training.step import COUNTS

Sums = dict[str, float]
"""Count name -> sum over batches and processes."""


class Metrics:
    """Means over all processes since the last call; the call waits for the device."""

    def __init__(
        self,
        accelerator: Accelerator,
        counts: list[Tensor],
        names: Sequence[str] = COUNTS,
        more: Callable[[Sums], dict[str, float]] = lambda sums: {},
    ):
        """`names` says what the counts are, `more` adds metrics that only one stage has."""
        self.accelerator, self.counts, self.names, self.more = accelerator, counts, names, more
        self.read_at = time.monotonic()

    def __call__(self) -> dict[str, float]:
        """Metrics averaged per sample; "examples" is the number of rows they average over."""
        total = torch.stack(self.counts).sum(0)
        for counts in self.counts:
            counts.zero_()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(total)
        sums = dict(zip(self.names, total.tolist(), strict=True))
        now = time.monotonic()
        seconds, self.read_at = now - self.read_at, now
        rows, finished = max(sums["rows"], 1.0), max(sums["finished"], 1.0)
        return {
            "examples": sums["rows"],
            "loss": (sums["cell_loss"] + HALT_WEIGHT * sums["halt_loss"]) / rows,
            "cell_loss": sums["cell_loss"] / rows,
            "halt_loss": sums["halt_loss"] / rows,
            "exact_match": sums["exact"] / rows,
            "shape_match": sums["shape"] / rows,
            "cell_accuracy": sums["cell_accuracy"] / rows,
            "avg_attempts": 1.0,  # a model alone answers once and has no reasoning text
            "avg_trm_steps": sums["finished_steps"] / finished,
            "avg_reasoning_length": 0.0,
            EXAMPLES_PER_SECOND: sums["rows"] / seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            **self.more(sums),
        }
