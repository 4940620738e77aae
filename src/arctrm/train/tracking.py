"""Where a run's numbers go: `metrics.jsonl` always, Weights & Biases if asked, one progress line.

Tracking never ends a run: whatever W&B does, training goes on. A resumed run leaves one record of
each step, because lines after the resumed step are dropped first.
"""

import json
import math
import netrc
import os
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlparse

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from arctrm.config import TrackingConfig
from arctrm.console import note, progress_console
from arctrm.errors import CheckpointError
from arctrm.system import disk_errors, parse_json, read_limited, write_bytes_atomically

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("exact_match", "exact {:.1%}"),
    ("reader_exact_match", "reader exact {:.1%}"),
    ("examples_per_second", "{:,.0f} examples/s"),
)
_PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


@dataclass(eq=False)
class Tracker:
    """Appends metrics to `<run>/metrics.jsonl` and W&B, and shows them as one line."""

    run: Path
    config: TrackingConfig
    resolved: dict[str, Any]  # the configuration that W&B shows
    _: KW_ONLY
    resume_step: int | None = None  # from which files of an earlier run go on
    is_main: bool = True  # another process writes nothing

    def __post_init__(self) -> None:
        self.path = self.run / "metrics.jsonl"
        self._wandb: Any = None
        self._live: Progress | None = None
        self._first: tuple[float, float] | None = None  # progress and elapsed at the first line
        self._line, self._is_printed, self._printed_at = "", True, -math.inf

    def __enter__(self) -> Self:
        if not self.is_main:
            return self
        with disk_errors(self.run):
            self.run.mkdir(parents=True, exist_ok=True)
            kept = [] if self.resume_step is None else _lines_up_to(self.path, self.resume_step)
            write_bytes_atomically(self.path, "".join(kept).encode())
        if self.config.wandb:
            self._start_wandb()
        if progress_console().is_terminal:
            text = TextColumn("{task.description}")
            columns = BarColumn(bar_width=20), TaskProgressColumn(), text
            self._live = Progress(*columns, console=progress_console())
            self._task = self._live.add_task("starting", total=1.0)
            self._live.start()
        return self

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; `metrics` hold "progress" (0..1) and "elapsed" (seconds), too."""
        if not self.is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with disk_errors(self.run), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.log(values, step=step))
        self._show(step, values)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif not self._is_printed:
            progress_console().print(self._line, soft_wrap=True)
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.finish(exit_code=0 if kind is None else 1))
            self._wandb = None

    def _show(self, step: int, values: dict[str, float]) -> None:
        """The progress line: loss, exact match, speed, and the time left at the speed so far."""
        progress, elapsed = values["progress"], values["elapsed"]
        first_progress, first_elapsed = self._first or (progress, elapsed)
        self._first = first_progress, first_elapsed
        done, seconds = progress - first_progress, elapsed - first_elapsed
        left = clock((1 - progress) * seconds / done) if done > 0 else "?"
        shown = [form.format(values[name]) for name, form in _SHOWN if name in values]
        self._line = "  ".join([f"step {step:,}", f"{progress:.0%}", *shown, f"{left} left"])
        if self._live is not None:
            self._live.update(self._task, completed=progress, description=self._line)
            return
        self._is_printed = time.monotonic() - self._printed_at >= _PLAIN_SECONDS
        if self._is_printed:
            self._printed_at = time.monotonic()
            progress_console().print(self._line, soft_wrap=True)

    def _guarded(self, action: Callable[[], object], what: str = "stopped") -> None:
        try:
            action()
        except Exception as error:  # network, quota, a broken installation: training goes on
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            note(f"W&B {what} ({first}); metrics go on to {self.path}")
            self._wandb = None

    def _start_wandb(self) -> None:
        """Start, or on resume continue, the W&B run; offline ones are files in `<run>/wandb`."""
        mode: Any = wandb_mode()
        if mode != "online":
            note(f"W&B runs {mode}; log in with `wandb login` (and unset WANDB_MODE) to send it")
        identity = self.run / "wandb_id"

        def start() -> None:
            import wandb  # slow to import

            goes_on = self.resume_step is not None and identity.is_file()
            self._wandb = wandb.init(
                project=self.config.project,
                name=self.config.run_name or self.run.name,
                dir=self.run,
                config=self.resolved,
                id=identity.read_text(encoding="utf-8").strip() if goes_on else None,
                resume="allow" if goes_on else None,
                mode=mode,
                settings=wandb.Settings(console="off", silent=True, init_timeout=30),
            )
            write_bytes_atomically(identity, (self._wandb.id + "\n").encode())

        self._guarded(start, "could not start")


def clock(seconds: float) -> str:
    """Seconds as "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def wandb_mode() -> str:
    """WANDB_MODE if set, else "online" with a login (environment or netrc), else "offline"."""
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of `metrics.jsonl` up to a step; a line cut off by a kill is dropped."""
    try:
        text = read_limited(path).decode() if path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if parse_json(line)["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not metrics ({error}); move it away to resume") from error
