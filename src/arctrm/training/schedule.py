"""The learning-rate schedule, in optimiser steps or in wall-clock time.

A pure function of (step, elapsed seconds): it holds no clock and no state, so a resumed run
continues on the same curve and every process computes the same value from the same numbers.
"""

from arctrm.config.training import ScheduleConfig

MAX_WARMUP = 0.5
"""Warm-up ends at this fraction of the run at the latest, however short the run is."""


class Schedule:
    """Linear warm-up, constant, linear decay to zero at the end of the run."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def progress(self, step: int, elapsed: float) -> float:
        """Fraction of the run that lies behind: 0 at the start, 1 at the end.

        Args:
            step: optimiser steps taken so far.
            elapsed: seconds of training so far, those before a resume included.
        """
        if self.config.max_steps is not None:
            fraction = step / self.config.max_steps
        else:
            assert self.config.budget is not None  # ScheduleConfig allows exactly one of the two
            fraction = elapsed / self.config.budget
        return min(max(fraction, 0.0), 1.0)

    def factor(self, step: int, elapsed: float) -> float:
        """Multiplier of the peak learning rate for optimiser step number `step` (from 0).

        Warm-up is `(step + 1) / warmup_steps`; where a run is shorter than twice the warm-up,
        progress takes over, so that the peak is reached half way at the latest.
        """
        progress = self.progress(step, elapsed)
        return min(self._warmup(step, progress), self._decay(progress))

    def finished(self, step: int, elapsed: float) -> bool:
        """Whether the run has reached its length."""
        return self.progress(step, elapsed) >= 1.0

    def _warmup(self, step: int, progress: float) -> float:
        if step + 1 >= self.config.warmup_steps:
            return 1.0
        return min(max((step + 1) / self.config.warmup_steps, progress / MAX_WARMUP), 1.0)

    def _decay(self, progress: float) -> float:
        start = self.config.constant_fraction
        return 1.0 if progress <= start else (1.0 - progress) / (1.0 - start)
