"""What `eval` and `baseline` check before they go on with answers that are there already."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from arctrm.data.task import Task
from arctrm.errors import DataError


def content_of(task: Task) -> str:
    """12 hex digits over the demonstrations and the test inputs."""
    inputs = [pair.input.tolist() for pair in task.test]
    text = f"{task.fingerprint()} {inputs}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_same_tasks(path: Path, contents: Mapping[str, str], tasks: Iterable[Task]) -> None:
    """Refuse tasks that are not those of `contents` (task id -> `content_of`); others may be new.

    Raises:
        DataError: names the file and the task.
    """
    for task in tasks:
        if task.id in contents and contents[task.id] != content_of(task):
            raise DataError(
                f"{path}: task {task.id} was another one when it was answered; restore it, or "
                "choose another --out"
            )


def check_same_weights(path: Path, began: tuple[str, str], now: tuple[str, str]) -> None:
    """Refuse other weights than those that began, each given by name and fingerprint.

    Raises:
        DataError: names the file and both.
    """
    if began[1] != now[1]:
        raise DataError(
            f"{path}: was begun with other weights ({', '.join(began)}) than these "
            f"({', '.join(now)}); resume with the model it was begun with, or choose another --out"
        )
