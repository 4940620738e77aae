"""`recipe.json`: what a recipe was, what each of its stages cost, and what came out."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Group
from rich.table import Table

from arctrm.config import JointConfig
from arctrm.errors import CheckpointError
from arctrm.training.checkpoints import RECIPE_RECORD
from arctrm.training.files import write_text_atomically
from arctrm.training.provenance import git_revision, hardware

DOLLARS_PER_GPU_HOUR = 3.0
PASSES = ("pass@1", "pass@2", "pass@10")


class Record:
    """The content of `recipe.json`; only process 0 writes it."""

    def __init__(self, out: Path, accelerator: Accelerator, config: JointConfig, old: Any) -> None:
        """`old` is the content that an interrupted recipe left (`read`), or None."""
        self.path, self._is_main = out / RECIPE_RECORD, accelerator.is_main_process
        on_gpu = accelerator.device.type == "cuda"
        self._gpus = accelerator.num_processes if on_gpu else 0
        self.content: dict[str, Any] = {
            "git_revision": git_revision(),
            "config_sha256": fingerprint(config),
            "seed": config.seed,
            "hardware": hardware(),
            "processes": accelerator.num_processes,
            "gpus": self._gpus,
            "dollars_per_gpu_hour": DOLLARS_PER_GPU_HOUR,
            "stages": {},
            "total": {},
            "evaluated": False,
            "scores": None,
        }
        for key in ("stages", "total", "evaluated", "scores"):
            self.content[key] = (old or self.content)[key]

    @contextmanager
    def timed(self, name: str, length: str = "") -> Iterator[None]:
        """Add the wall-clock time of the block to a stage, however it ends."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._add(name, length, time.monotonic() - begin)
            self.write()

    def _add(self, name: str, length: str, seconds: float) -> None:
        stages = self.content["stages"]
        before = stages.get(name, {"seconds": 0.0, "gpu_hours": 0.0})
        stages[name] = {"length": length} | self._cost(
            before["seconds"] + seconds, before["gpu_hours"] + seconds * self._gpus / 3600
        )
        rows = stages.values()
        self.content["total"] = self._cost(
            sum(row["seconds"] for row in rows), sum(row["gpu_hours"] for row in rows)
        )

    def _cost(self, seconds: float, gpu_hours: float) -> dict[str, float]:
        dollars = gpu_hours * DOLLARS_PER_GPU_HOUR
        return {"seconds": seconds, "gpu_hours": gpu_hours, "dollars": dollars}

    def forget_scores(self) -> None:
        """Say that what was scored is trained further."""
        self.content |= {"evaluated": False, "scores": None}

    def take_scores(self, folder: Path) -> None:
        """Read the scores that `eval` wrote: task_fraction of everything and of each ablation."""
        if not self._is_main:
            return
        rows = _json(folder / "ablations.json")
        scores = _json(folder / "scores.json")
        if rows is None and scores is not None:
            rows = {"everything": scores}
        for row in (rows or {}).values():
            del row["tasks"]
        self.content |= {"evaluated": True, "scores": rows}
        self.write()

    def write(self) -> None:
        """Replace the file."""
        if self._is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.path, json.dumps(self.content, indent=1) + "\n")

    def tables(self) -> Group:
        """What each stage cost, and the scores."""
        cost = Table(title=f"recipe, {self._gpus} GPU(s)", title_justify="left")
        cost.add_column("stage")
        for column in ("length", "seconds", "GPU-hours", f"$ at {DOLLARS_PER_GPU_HOUR:g} an hour"):
            cost.add_column(column, justify="right")
        for name, row in (*self.content["stages"].items(), ("total", self.content["total"])):
            hours, dollars = f"{row['gpu_hours']:.3f}", f"{row['dollars']:.2f}"
            cost.add_row(name, row.get("length", ""), f"{row['seconds']:.1f}", hours, dollars)
        rows = self.content["scores"]
        return Group(cost, _score_table(rows)) if rows else Group(cost)


def read(out: Path) -> dict[str, Any] | None:
    """What an earlier recipe in `out` left, or None.

    Raises:
        CheckpointError: the file there is not the record of a recipe.
    """
    path = out / RECIPE_RECORD
    content = _json(path)
    if content is not None and "stages" not in content:
        raise CheckpointError(f"{path}: not the record of a recipe; choose another --out")
    return content


def fingerprint(config: JointConfig) -> str:
    """SHA-256 of the resolved configuration, wherever it is written to."""
    resolved = config.model_dump(mode="json", exclude={"out"})
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def _score_table(rows: dict[str, Any]) -> Table:
    first = next(iter(rows.values()))
    title = f"{first['num_tasks']} tasks, task_fraction (%)"
    table = Table(title=title, title_justify="left")
    table.add_column("candidates of")
    for name in PASSES:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * row['task_fraction'][key]:.2f}" for key in PASSES))
    return table


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{path}: not valid JSON; move the file away") from None
