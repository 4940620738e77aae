"""The progress line of a training run: loss, exact match, examples/s, time left.

On a terminal, one live rich line; elsewhere (a log file, CI) a plain line every ten seconds.
"""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from arctrm.console import progress_console
from arctrm.training.schedule import Schedule

EXAMPLES_PER_SECOND = "examples_per_second"
"""Metric name of the throughput (rows x supervision steps per second, all processes)."""

_COLUMNS = (("loss", "loss", "{:.4f}"), ("exact_match", "exact", "{:.1%}"))


class TrainingProgress:
    """Context manager; `update` after each step, or as often as wanted."""

    def __init__(self, schedule: Schedule, *, is_main: bool = True, interval: float = 10.0) -> None:
        """Prepare.

        Args:
            schedule: length of the run, in steps or seconds.
            is_main: other processes print nothing.
            interval: seconds between plain lines where there is no terminal.
        """
        self._schedule, self._is_main, self._interval = schedule, is_main, interval
        self._live: Progress | None = None
        self._first: tuple[float, float] | None = None  # progress and elapsed at the first update
        self._printed_at = -float("inf")
        self._last = self._last_printed = ""
        self._metrics: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._is_main and progress_console().is_terminal:
            self._live = Progress(
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=progress_console(),
            )
            self._task = self._live.add_task("starting", total=1.0)
            self._live.start()
        return self

    def update(self, step: int, elapsed: float, metrics: dict[str, float] | None = None) -> None:
        """Show the state after `step` optimiser steps and `elapsed` seconds of training.

        Args:
            step: optimiser steps taken.
            elapsed: seconds of training, those before a resume included.
            metrics: newest values, if there are new ones; the last known stay on the line.
        """
        if not self._is_main:
            return
        self._metrics |= metrics or {}
        progress = self._schedule.progress(step, elapsed)
        self._last = self._line(step, elapsed, progress)
        if self._live is not None:
            self._live.update(self._task, completed=progress, description=self._last)
        elif elapsed - self._printed_at >= self._interval:
            self._print(elapsed)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._last != self._last_printed:
            self._print(0.0)

    def seconds_left(self, step: int, elapsed: float) -> float | None:
        """Seconds to the end: exact with a time budget, extrapolated from this session's speed.

        None before there is a speed to go by.
        """
        progress = self._schedule.progress(step, elapsed)
        if self._schedule.config.budget is not None:
            return max(self._schedule.config.budget - elapsed, 0.0)
        if self._first is None:
            self._first = (progress, elapsed)
        done, seconds = progress - self._first[0], elapsed - self._first[1]
        return (1.0 - progress) * seconds / done if done > 0 else None

    def _line(self, step: int, elapsed: float, progress: float) -> str:
        left = self.seconds_left(step, elapsed)
        shown = [
            f"{label} {form.format(self._metrics[name])}"
            for name, label, form in _COLUMNS
            if name in self._metrics
        ]
        if EXAMPLES_PER_SECOND in self._metrics:
            shown.append(f"{self._metrics[EXAMPLES_PER_SECOND]:,.0f} examples/s")
        total = self._schedule.config.max_steps
        steps = f"step {step}/{total}" if total is not None else f"step {step}"
        return "  ".join([steps, *shown, f"{clock(left)} left"])

    def _print(self, elapsed: float) -> None:
        self._printed_at, self._last_printed = elapsed, self._last
        progress_console().print(self._last, soft_wrap=True)


def clock(seconds: float | None) -> str:
    """Seconds as "1:02:03" or "2:03"; "?" when not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
