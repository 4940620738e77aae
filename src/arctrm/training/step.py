"""One supervision step on one packed batch: rows in, gradient out.

`MicroStep` keeps everything it touches in tensors of fixed address and shape, so that the same
code runs eagerly on a CPU and as one captured CUDA graph on a GPU.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from arctrm.training.losses import HALT_WEIGHT, RowLosses, row_losses
from arctrm.training.stream import (
    DIHEDRAL,
    EMBEDDING,
    FLAG,
    SCALE,
    STEPS,
    Batch,
    PairStream,
    StreamState,
)
from arctrm.trm.carry import halting
from arctrm.trm.model import TRM, Prediction
from arctrm.trm.packing import sequences

COUNTS = (
    "rows",
    "cell_loss",
    "halt_loss",
    "exact",
    "shape",
    "cell_accuracy",
    "finished",
    "finished_steps",
    "tokens",
)
"""What `MicroStep.counts` sums up, in this order."""


class Step(Protocol):
    """Something that adds one batch's gradient to the parameters."""

    counts: Tensor
    """float64: sums since they were last set to zero."""

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""

    def prepare(self) -> None:
        """What comes before every call and cannot be captured in a CUDA graph."""

    def __call__(self) -> None:
        """Add the gradient."""


class MicroStep:
    """Refill, supervision step, loss, backward, halting; sums counts into `counts` [COUNTS]."""

    def __init__(
        self,
        model: TRM,
        stream: PairStream,
        state: StreamState,
        halt_max_steps: int,
        loss_scale: float,
    ):
        self.model, self.stream, self.state = model, stream, state
        self.halt_max_steps, self.loss_scale = halt_max_steps, loss_scale
        self.counts = torch.zeros(len(COUNTS), device=stream.device, dtype=torch.float64)

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, updated in place."""
        return {**self.state._asdict(), "counts": self.counts}

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def __call__(self) -> None:
        """Add the gradient of one packed batch; the carry moves on."""
        with torch.no_grad():
            batch = self.stream.next_batch(self.state, self.model)
        prediction, losses = self._forward(batch)
        total = (losses.cells + HALT_WEIGHT * losses.halt).sum()
        num_rows = losses.real.sum().clamp(min=1)
        (total / num_rows * self.loss_scale).backward()
        with torch.no_grad():
            self._finish(batch, prediction, losses)

    def _forward(self, batch: Batch) -> tuple[Prediction, RowLosses]:
        rows, tokens = batch.rows, batch.tokens
        scale = rows[:, SCALE] if self.model.config.scaling.share else None
        prefix, condition = self.model.prefix(
            rows[:, EMBEDDING], rows[:, DIHEDRAL], rows[:, FLAG], scale=scale
        )
        x = self.model.embed(batch.codes, tokens.row, tokens.first, prefix, condition)
        seq = sequences(tokens, self.model.config, self.model.dtype)
        latents, prediction = self.model.supervision_step(batch.latents, x, seq, tokens.first)
        self.state.z_H.copy_(latents.z_H)
        self.state.z_L.copy_(latents.z_L)
        losses = row_losses(
            prediction.logits,
            prediction.q_halt,
            batch.labels,
            tokens.row,
            self.model.config.stablemax,
        )
        return prediction, losses

    def _finish(self, batch: Batch, prediction: Prediction, losses: RowLosses) -> None:
        """Count, and decide which rows are done."""
        steps = batch.rows[:, STEPS] + losses.real
        self.state.rows[:, STEPS] = steps
        halted = halting(
            prediction.q_halt,
            steps,
            self.halt_max_steps,
            self.model.config.halt_exploration_prob,
        )
        halted = halted & losses.real
        self.state.halted.copy_(halted)
        self.counts += self._counts(losses, halted, steps, batch)

    def _counts(self, losses: RowLosses, halted: Tensor, steps: Tensor, batch: Batch) -> Tensor:
        real = losses.real
        sums = (
            real,
            losses.cells * real,
            losses.halt * real,
            losses.exact,
            losses.shape,
            losses.cell_accuracy * real,
            halted,
            steps * halted,
            batch.tokens.row < real.shape[0],
        )
        return torch.stack([value.detach().sum().double() for value in sums])


class GraphedStep:
    """A step captured in one CUDA graph after a few eager runs; calls replay it.

    The eager runs are real steps: their gradients are dropped by the caller's next zeroing, their
    batches count as drawn. What cannot be captured is done by `prepare`, before every replay.
    """

    def __init__(
        self,
        step: Callable[[], None],
        warmup: int = 3,
        prepare: Callable[[], None] = lambda: None,
    ):
        self.step = step  # the graph reads and writes its tensors: keep them alive
        self.prepare = prepare
        prepare()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = captured(step)

    def __call__(self) -> None:
        """Replay."""
        self.graph.replay()


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which is not run; keep alive what it reads and writes."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may touch CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph
