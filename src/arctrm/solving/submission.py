"""`submission.json` in the ARC Prize (Kaggle) format: two grids for every test input.

{task id: [{"attempt_1": [[0, 1], ...], "attempt_2": [[...], ...]}, ... one per test input]}
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arctrm.data.parse import load_json, parse_grid
from arctrm.data.task import Grid, Task
from arctrm.errors import DataError, ResourceError
from arctrm.training.files import replace_bytes

ATTEMPT_NAMES = ("attempt_1", "attempt_2")

Submission = dict[str, list[dict[str, list[list[int]]]]]
"""The JSON object itself."""

Attempts = tuple[Grid, Grid]
"""attempt_1 and attempt_2 of one test input."""


def submission(predictions: Mapping[str, Sequence[Attempts]]) -> Submission:
    """The JSON object for two grids per test input, in the order of the test inputs."""
    return {
        task_id: [
            {name: grid.tolist() for name, grid in zip(ATTEMPT_NAMES, attempts, strict=True)}
            for attempts in per_input
        ]
        for task_id, per_input in sorted(predictions.items())
    }


def write_submission(path: Path, content: Submission) -> None:
    """Write the file in one step: an older one is replaced whole or not at all, a crash included.

    Raises:
        ResourceError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, json.dumps(content).encode())
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from error


def read_submission(path: Path) -> dict[str, list[Attempts]]:
    """Read a submission: task id -> (attempt_1, attempt_2) for each test input.

    Raises:
        TaskError: the file is unreadable, not JSON, or a grid in it is not a grid.
        DataError: it is JSON of another form.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a submission; expected task id -> list of attempts")
    return {task_id: _read_task(entry, f"{path}: {task_id}") for task_id, entry in content.items()}


def check_complete(content: Submission, tasks: Iterable[Task]) -> None:
    """Check that every test input of every task is answered by two grids.

    Raises:
        DataError: names the first task that is not, with what it has and what it needs.
    """
    for task in tasks:
        entry = content.get(task.id, [])
        complete = [item for item in entry if all(item.get(name) for name in ATTEMPT_NAMES)]
        if len(entry) != len(task.test) or len(complete) != len(task.test):
            raise DataError(
                f"submission: task {task.id} has {len(task.test)} test inputs, but {len(complete)} "
                f"of {len(entry)} entries with both {' and '.join(ATTEMPT_NAMES)}; answer every one"
            )


def _read_task(entry: Any, where: str) -> list[Attempts]:
    if not isinstance(entry, list):
        raise DataError(f"{where}: expected a list with one entry per test input")
    return [_read_attempts(item, f"{where}[{index}]") for index, item in enumerate(entry)]


def _read_attempts(item: Any, where: str) -> Attempts:
    if not isinstance(item, dict) or not all(name in item for name in ATTEMPT_NAMES):
        raise DataError(f"{where}: expected an object with {' and '.join(ATTEMPT_NAMES)}")
    first, second = (parse_grid(item[name], f"{where}.{name}") for name in ATTEMPT_NAMES)
    return first, second
