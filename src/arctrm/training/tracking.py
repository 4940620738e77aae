"""Where a run's numbers go: `metrics.jsonl` always, Weights & Biases if asked, one progress line.

Tracking never ends a run: whatever W&B does, training goes on and a note says so. A resumed run
leaves one record per step, because lines after the resumed step are dropped first.
"""

import json
import math
import netrc
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

from rich.markup import escape

from arctrm.config.training import TrackingConfig
from arctrm.console import note
from arctrm.errors import CheckpointError
from arctrm.training.files import disk_errors, write_text_atomically
from arctrm.training.progress import EXAMPLES_PER_SECOND, TrainingProgress

__all__ = [
    "EXAMPLES_PER_SECOND",
    "METRICS",
    "Tracker",
    "TrainingProgress",
    "start_wandb",
    "wandb_mode",
]

METRICS = (
    "loss",
    "exact_match",
    "shape_match",
    "cell_accuracy",
    "avg_attempts",
    "avg_trm_steps",
    "avg_reasoning_length",
)
"""The metrics that every stage logs, averaged per sample."""

_WANDB_START_SECONDS = 30.0


class Tracker:
    """Context manager that appends metrics to `<run>/metrics.jsonl` and, if asked, to W&B."""

    def __init__(
        self,
        run: Path,
        config: TrackingConfig,
        resolved: dict[str, Any],
        *,
        resume: bool = False,
        is_main: bool = True,
        resume_step: int | None = None,
    ) -> None:
        """Prepare; nothing is opened before the `with` block.

        Args:
            run: run folder.
            config: W&B switch and names.
            resolved: the resolved configuration, shown in W&B.
            resume: continue the files of an earlier run instead of starting them anew.
            is_main: other processes write nothing.
            resume_step: the step resumed from; later lines are dropped.
        """
        self.path = run / "metrics.jsonl"
        self._run, self._config, self._resolved = run, config, resolved
        self._resume, self._resume_step, self._is_main = resume, resume_step, is_main
        self._wandb: Any = None

    def __enter__(self) -> Self:
        if self._is_main:
            with disk_errors(self._run):
                self._run.mkdir(parents=True, exist_ok=True)
                kept = _lines_up_to(self.path, self._resume_step) if self._resume else []
                write_text_atomically(self.path, "".join(kept))
            if self._config.wandb:
                self._wandb = start_wandb(self._run, self._config, self._resolved, self._resume)
        return self

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line, in the file when this returns; not-a-number becomes null.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._wandb is not None:
            self._guarded(lambda: self._wandb.finish(exit_code=0 if kind is None else 1))
            self._wandb = None

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracking service does, training goes on
            note(f"W&B stopped ({escape(_first_line(error))}); metrics go on to {self.path}")
            self._wandb = None


def start_wandb(run: Path, config: TrackingConfig, resolved: dict[str, Any], resume: bool) -> Any:
    """Start, or on resume continue, the W&B run; None with a note where that fails.

    Online only with a login and without WANDB_MODE; otherwise offline, files in `<run>/wandb`.
    """
    mode = wandb_mode()
    if mode != "online":
        note(f"W&B runs {mode}; log in with `wandb login` (and unset WANDB_MODE) to send metrics")
    try:
        return _init_wandb(run, config, resolved, resume, mode)
    except Exception as error:  # network, quota, a broken installation: none may end training
        note(
            f"W&B could not start ({escape(_first_line(error))}); metrics go to metrics.jsonl only"
        )
        return None


def wandb_mode() -> str:
    """WANDB_MODE if set, else "online" with a login (environment or netrc), else "offline"."""
    chosen = os.environ.get("WANDB_MODE")
    if chosen:
        return chosen
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _init_wandb(
    run: Path, config: TrackingConfig, resolved: dict[str, Any], resume: bool, mode: Any
) -> Any:
    import wandb  # slow to import, and optional

    identity = run / "wandb_id"
    known = identity.read_text(encoding="utf-8").strip() if resume and identity.is_file() else None
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
    write_text_atomically(identity, started.id + "\n")
    return started


def _in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _lines_up_to(path: Path, step: int | None) -> list[str]:
    """Whole lines of `metrics.jsonl` up to a step; a line cut off by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    try:
        return [line for line in lines if step is None or json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: a line is not a metrics record ({error}); move the file away to resume"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
