"""Where a run's numbers go: `metrics.jsonl` always, Weights & Biases if asked, one progress line.

Tracking never ends a run: whatever W&B does, training goes on and a note says so. A resumed run
leaves one record of each step, because lines after the resumed step are dropped first.
"""

import json
import math
import netrc
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from arctrm.config import TrackingConfig
from arctrm.console import note, progress_console
from arctrm.errors import CheckpointError
from arctrm.system import disk_errors, write_bytes_atomically

METRICS = (
    "loss",
    "exact_match",
    "shape_match",
    "cell_accuracy",
    "avg_attempts",
    "avg_trm_steps",
    "avg_reasoning_length",
)
"""The metrics that every stage logs, averaged over examples."""
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("exact_match", "exact {:.1%}"),
    ("reader_exact_match", "reader exact {:.1%}"),
    ("examples_per_second", "{:,.0f} examples/s"),
)
_WANDB_START_SECONDS = 30.0
_PLAIN_SECONDS = 10.0
"""Between two progress lines where there is no terminal."""


class Tracker:
    """Context manager that appends metrics to `<run>/metrics.jsonl` and, if asked, to W&B, and
    shows them: one live line on a terminal, elsewhere (a log file) a plain line now and then.
    """

    def __init__(
        self,
        run: Path,
        config: TrackingConfig,
        resolved: dict[str, Any],
        *,
        resume_step: int | None = None,
        is_main: bool = True,
    ) -> None:
        """Prepare; nothing is opened before the `with` block.

        `resolved` is the configuration that W&B shows, `resume_step` the step that the files of an
        earlier run are continued from; a process that is not `is_main` writes nothing.
        """
        self.path = run / "metrics.jsonl"
        self._run, self._config, self._resolved = run, config, resolved
        self._resume_step, self._is_main = resume_step, is_main
        self._wandb: Any = None
        self._live: Progress | None = None
        self._first: tuple[float, float] | None = None  # progress and elapsed at the first line
        self._line, self._is_printed, self._printed_at = "", True, -math.inf

    def __enter__(self) -> Self:
        if not self._is_main:
            return self
        with disk_errors(self._run):
            self._run.mkdir(parents=True, exist_ok=True)
            kept = [] if self._resume_step is None else _lines_up_to(self.path, self._resume_step)
            write_bytes_atomically(self.path, "".join(kept).encode())
        if self._config.wandb:
            self._wandb = _start_wandb(
                self._run, self._config, self._resolved, self._resume_step is not None
            )
        if progress_console().is_terminal:
            columns = (BarColumn(bar_width=20), TaskProgressColumn())
            text = TextColumn("{task.description}")
            self._live = Progress(*columns, text, console=progress_console())
            self._task = self._live.add_task("starting", total=1.0)
            self._live.start()
        return self

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line, in the file when this returns; a number that is not finite is null.

        `metrics` hold "progress" (0..1) and "elapsed" (seconds), too.

        Raises:
            ResourceError: the disk is full.
        """
        if not self._is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with disk_errors(self._run), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.log(values, step=step))
        self._show(step, values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracking service does, training goes on
            note(f"W&B stopped ({escape(_first_line(error))}); metrics go on to {self.path}")
            self._wandb = None


def clock(seconds: float) -> str:
    """Seconds as "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def wandb_mode() -> str:
    """WANDB_MODE if set, else "online" with a login (environment or netrc), else "offline"."""
    chosen = os.environ.get("WANDB_MODE")
    if chosen:
        return chosen
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "offline" if known is None else "online"


def _start_wandb(run: Path, config: TrackingConfig, resolved: dict[str, Any], resume: bool) -> Any:
    """Start, or on resume continue, the W&B run; None with a note where that fails.

    Online only with a login and without WANDB_MODE; otherwise offline, files in `<run>/wandb`.
    """
    mode: Any = wandb_mode()
    if mode != "online":
        note(f"W&B runs {mode}; log in with `wandb login` (and unset WANDB_MODE) to send metrics")
    identity = run / "wandb_id"
    try:
        import wandb  # slow to import

        known = identity.read_text(encoding="utf-8").strip() if identity.is_file() else None
        known = known if resume else None
        started = wandb.init(
            project=config.project,
            name=config.run_name or run.name,
            dir=run,
            config=resolved,
            id=known,
            resume="allow" if known else None,
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=_WANDB_START_SECONDS),
        )
        write_bytes_atomically(identity, (started.id + "\n").encode())
    except Exception as error:  # network, quota, a broken installation: none may end training
        note(
            f"W&B could not start ({escape(_first_line(error))}); metrics go to metrics.jsonl only"
        )
        return None
    return started


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of `metrics.jsonl` up to a step; a line cut off by a kill is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    try:
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: a line is not a metrics record ({error}); move the file away to resume"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
