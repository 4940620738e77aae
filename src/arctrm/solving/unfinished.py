"""unfinished.jsonl: what `eval` has answered already, kept until everything is scored.

    {"config": {...}, "weights": 12 hex digits, "checkpoint": name}
    {"row": "everything", "task": id, "content": 12 hex digits, "seconds": float,
     "test": [for each test input: [grids as in candidates.json.gz]]}

One line for each task of each row of the table of ablations; the lines of some tasks are added at
once. Whenever the process dies, the file holds whole lines and at most one torn one at its end.
Answers are not in it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arctrm.config import EvalConfig
from arctrm.data.task import Task
from arctrm.errors import ConfigError, DataError
from arctrm.solving.candidates import Key
from arctrm.solving.kept import as_entry, from_entry
from arctrm.solving.resuming import check_same_tasks, check_same_weights, content_of
from arctrm.solving.vote import Ranked
from arctrm.training.checkpoint_meta import check_same_config
from arctrm.training.files import disk_errors, write_text_atomically

UNFINISHED = "unfinished.jsonl"
EVERYTHING = "everything"
"""The row without an ablation."""
MAY_DIFFER_ON_RESUME = (
    *("checkpoint", "out", "reader.batch_size", "inference.tokens_per_batch", "inference.compile"),
    *("evaluation.tasks", "evaluation.max_tasks", "evaluation.solutions"),
    *("evaluation.ablate", "evaluation.keep_candidates"),
)
"""Keys that change no answer; weights are compared by their fingerprint."""


class Unfinished:
    """The rankings so far, and the file that holds them (None: they are not kept)."""

    def __init__(self, path: Path | None, lines: Sequence[str] = ()):
        self.path = path
        self.rows: dict[str, dict[Key, list[Ranked]]] = {}
        """Row -> the ranked grids of each test input."""
        self.model: tuple[str, str] | None = None
        """Name and fingerprint of the weights that began, where they have."""
        self.contents: dict[str, str] = {}
        """Task id -> fingerprint of what was answered, of what was there."""
        self._lines = list(lines[1:])
        self._seconds: dict[str, float] = {}
        self._tasks: dict[str, set[str]] = {}
        for line in self._lines:
            saved = json.loads(line)
            inputs = [[from_entry(one) for one in own] for own in saved["test"]]
            self._take(saved["row"], saved["task"], inputs, saved["seconds"])
            self.contents[saved["task"]] = saved["content"]

    def has(self, row: str, tasks: Iterable[Task]) -> bool:
        """Whether all `tasks` are ranked for a row."""
        return {task.id for task in tasks} <= self._tasks.get(row, set())

    def left(self, tasks: Iterable[Task], rows: Iterable[str]) -> list[Task]:
        """The tasks that are not ranked for all `rows`."""
        wanted = tuple(rows)
        return [task for task in tasks if not all(self.has(row, [task]) for row in wanted)]

    def seconds(self, tasks: Sequence[Task]) -> float:
        """What it took to answer `tasks`, without ablations, in all processes together."""
        return sum(self._seconds[task.id] for task in tasks)

    def check_weights(self, name: str, weights: str) -> None:
        """Refuse to go on with other weights, given by their fingerprint, than those that began.

        Raises:
            DataError: names the file and both.
        """
        if self.path is not None and self.model is not None:
            check_same_weights(self.path, self.model, (name, weights))

    def begin(self, config: EvalConfig, name: str, weights: str) -> None:
        """Write the head, and what there is, without a line that was torn."""
        if self.path is None:
            return
        saved = config.model_dump(mode="json")
        head = {"config": saved, "weights": weights, "checkpoint": name}
        write_text_atomically(self.path, "".join([_line(head), *self._lines]))

    def add(
        self,
        row: str,
        tasks: Sequence[Task],
        ranked: Mapping[Key, list[Ranked]],
        seconds: float,
        write: bool,
    ) -> None:
        """Take the rankings of some tasks, which took `seconds` together; with `write`, keep them
        on the disk, too.
        """
        lines = []
        for task in tasks:
            inputs = [ranked[task.id, index] for index in range(len(task.test))]
            self._take(row, task.id, inputs, seconds / len(tasks))
            content = {
                "row": row,
                "task": task.id,
                "content": content_of(task),
                "seconds": seconds / len(tasks),
                "test": [[as_entry(one) for one in own] for own in inputs],
            }
            lines.append(_line(content))
        if self.path is None or not write:
            return
        with disk_errors(self.path.parent), self.path.open("a") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, tasks: Iterable[Task]) -> None:
        """All `tasks` are scored: nothing is unfinished, unless others were answered, too."""
        others = self._tasks.get(EVERYTHING, set()) - {task.id for task in tasks}
        if self.path is not None and not others:
            self.path.unlink(missing_ok=True)

    def _take(self, row: str, task: str, inputs: list[list[Ranked]], seconds: float) -> None:
        rankings = self.rows.setdefault(row, {})
        for index, own in enumerate(inputs):
            rankings[task, index] = own
        self._tasks.setdefault(row, set()).add(task)
        if row == EVERYTHING:
            self._seconds[task] = seconds


def open_unfinished(out: Path, config: EvalConfig, tasks: list[Task], resume: bool) -> Unfinished:
    """What was answered in the folder `out`; nothing is written yet.

    An evaluation that adapts keeps nothing: its weights are gone when it stops.

    Raises:
        DataError: there is nothing to resume, or something that would be lost, or of other tasks.
        CheckpointError: it was answered under another configuration.
        ConfigError: it adapts.
    """
    path = out / UNFINISHED
    lines = _whole_lines(path)
    if not resume:
        if len(lines) > 1:
            raise DataError(
                f"{path}: holds what an evaluation that was interrupted has answered; add "
                "--resume to go on with it, delete it, or choose another --out"
            )
        return Unfinished(None if config.evaluation.adapts else path)
    if config.evaluation.adapts:
        raise ConfigError(
            f"--resume with evaluation.{config.evaluation.adapted_for}: what was adapted is not "
            "kept; leave out --resume to adapt and answer anew"
        )
    if not lines:
        raise DataError(
            f"{out}: holds no unfinished evaluation; leave out --resume to start one there"
        )
    return _resumed(path, lines, config, tasks)


def _resumed(path: Path, lines: list[str], config: EvalConfig, tasks: list[Task]) -> Unfinished:
    try:
        head = json.loads(lines[0])
        began, model = dict(head["config"]), (str(head["checkpoint"]), str(head["weights"]))
        unfinished = Unfinished(path, lines)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: is not what arctrm eval keeps of an unfinished evaluation ({error}); delete "
            "it, or choose another --out"
        ) from error
    check_same_config(began, config.model_dump(mode="json"), MAY_DIFFER_ON_RESUME, where=str(path))
    check_same_tasks(path, unfinished.contents, tasks)
    unfinished.model = model
    return unfinished


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end; none without a file."""
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete it, or choose another --out"
        ) from error
    lines = text.splitlines(keepends=True)
    return lines if text.endswith("\n") else lines[:-1]


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"
