"""What follows the gradient in an optimiser step: clipping, the optimisers, the moving average.

None of it waits for the device. What changes from step to step (learning rates, the decay of the
average) stands in tensors on a GPU, so that the whole update can be replayed as one CUDA graph.
"""

from collections.abc import Callable

import torch

from arctrm.training.optimisers import EMA, FlatGradients, Optimisers
from arctrm.training.step import captured


class Update:
    """Clip to `clip_norm` (0 = not), step, average; `ema` None: keep no average."""

    def __init__(
        self,
        gradients: FlatGradients,
        optimisers: Optimisers,
        ema: EMA | None,
        clip_norm: float,
    ):
        self.gradients, self.optimisers, self.ema = gradients, optimisers, ema
        self.clip_norm = clip_norm
        self.apply: Callable[[], None] = self._apply

    def __call__(self, factor: float, step: int) -> None:
        """The update of step number `step` (from 1) at `factor` x the peak learning rates."""
        self.optimisers.set_rates(factor)
        if self.ema is not None:
            self.ema.set_decay(step)
        self.apply()

    def capture(self) -> None:
        """Replay a CUDA graph from the second call on; restore a checkpoint before the first."""
        self.apply = LateGraph(self._apply, self.optimisers.make_capturable)

    def _apply(self) -> None:
        if self.clip_norm > 0:
            self.gradients.clip(self.clip_norm)
        self.optimisers.apply()
        if self.ema is not None:
            self.ema.move()


class LateGraph:
    """Work whose first call runs eagerly, which makes its buffers; the second captures it.

    Every call does the work exactly once: capturing runs nothing, the replay after it does.
    """

    def __init__(self, work: Callable[[], None], prepare: Callable[[], None]):
        self.work, self.prepare = work, prepare
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run, or capture and replay, or replay."""
        if not self.warm:
            self.work()
            self.warm = True
            return
        if self.graph is None:
            self.prepare()
            self.graph = captured(self.work)
        self.graph.replay()
