"""What answering leaves on the disk: answers so far, candidates, the submission.

`unfinished.jsonl` is there while a command may be interrupted: a head (configuration, name and
fingerprint of the weights), then one line for each answered task of each row (an ablation is a row
of its own), and of `solve` the time used so far. Lines are only added: whenever a process dies, at
most the last is torn. No answer of the test set is in any of these files.
"""

import fcntl
import gzip
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, Field

from arctrm.config import StrictModel, differences
from arctrm.config.base import Number
from arctrm.data.parse import load_json, parse_grid
from arctrm.data.task import Grid, Task
from arctrm.errors import CheckpointError, DataError, TaskError
from arctrm.solve.questions import Key, keys_of
from arctrm.solve.rank import Ranked, attempts, counted
from arctrm.system import (
    LOCK,
    disk_errors,
    hold,
    parse_json,
    read_json,
    read_limited,
    write_bytes_atomically,
    write_run_record,
)

UNFINISHED, CANDIDATES, SUBMISSION = "unfinished.jsonl", "candidates.json.gz", "submission.json"
EVERYTHING = "everything"  # the row without an ablation
INTERRUPTED = "interrupted"  # the row of answers that Ctrl-C cut short
ATTEMPT_NAMES = ("attempt_1", "attempt_2")
SCORES = ("reader_scores", "inverse_scores")
Rankings = Mapping[Key, Sequence[Ranked]]
Score = float | None  # nats; None: minus infinity


class Entry(StrictModel):
    """A ranked grid, as the files keep it."""

    grid: list[list[int]]
    q: Score
    views: dict[str, tuple[int, ...]]
    reader_scores: tuple[Score, ...]
    inverse_scores: tuple[Score, ...]
    broken: tuple[str, ...]


class Record(StrictModel, extra="allow"):
    """A line of `unfinished.jsonl`: the answers to one task in one row."""

    row: str
    task: str
    content: str
    seconds: float = Field(ge=0)
    test: tuple[tuple[Entry, ...], ...]
    trm_steps: tuple[Number, Number] = (0, 0)
    prompt_tokens: Number = 0
    new_tokens: Number = 0


class Store:
    """Records of answered tasks, row by row, in memory and on the disk."""

    def __init__(self, path: Path, lines: Sequence[str] = ()):
        self.path, self.writes, self.num_read = path, False, 0
        self.held: TextIO | None = None  # the folder, until this object goes
        head, *records = map(parse_json, lines or ["{}"])
        self.head: dict[str, Any] = head  # `config`, name and fingerprint of the weights
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}  # row -> task id -> record
        self.used = 0.0  # seconds of the command's clock
        for record in records:
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        if "used" in record:
            self.used = max(self.used, float(record["used"]))
        elif "config" not in record:
            self.rows.setdefault(record["row"], {})[record["task"]] = record

    def has(self, row: str, tasks: Iterable[Task]) -> bool:
        """Whether all `tasks` are answered in a row."""
        return all(task.id in self.rows.get(row, {}) for task in tasks)

    def left(self, tasks: Iterable[Task], rows: Sequence[str] = (EVERYTHING,)) -> list[Task]:
        """The tasks that are not answered in all `rows`."""
        return [task for task in tasks if not all(self.has(row, [task]) for row in rows)]

    def begin(self, config: StrictModel, name: str, weights: str, *, writes: bool = True) -> None:
        """Check that the weights are those that began; who `writes` keeps all from now on."""
        began = self.head.get("checkpoint", name), self.head.get("weights", weights)
        if began[1] != weights:
            raise DataError(f"{self.path}: begun with other weights ({', '.join(began)})")
        self.writes = writes
        saved = config.model_dump(mode="json")
        self.head = {"config": saved, "weights": weights, "checkpoint": name}
        if writes:
            records = [one for row in self.rows.values() for one in row.values()]
            lines = [self.head, *records, *([{"used": self.used}] if self.used else ())]
            write_bytes_atomically(self.path, "".join(map(_line, lines)).encode())

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Among processes that answer together: only this one writes, and holds what all added."""
        if not self.writes:
            yield
            return
        with disk_errors(self.path.parent), self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self.num_read)
            for line in file:
                if line.endswith(b"\n"):
                    self._take(parse_json(line))
                    self.num_read += len(line)
                else:  # torn, by a process that died
                    os.truncate(self.path, self.num_read)
            yield

    def rankings(self, tasks: Iterable[Task]) -> dict[Key, list[Ranked]]:
        """The ranked grids of all test inputs; none where there is no answer, not even one that an
        interrupt cut short.
        """
        rows = self.rows.get(INTERRUPTED, {}) | self.rows.get(EVERYTHING, {})
        return {key: [] for key in keys_of(tasks)} | from_records(rows.values())

    def keep_time(self, used: float) -> None:
        """Note the seconds used so far."""
        self.used = max(self.used, used)
        self._append(_line({"used": round(used, 2)}))

    def add(self, row: str, answers: Sequence[tuple[Task, dict[str, Any]]], seconds: float) -> None:
        """Take the answers to some tasks, which took `seconds` together."""
        records = [
            {"row": row, "task": task.id, "content": content_of(task)}
            | {"seconds": seconds / len(answers)}
            | own
            for task, own in answers
        ]
        self._append("".join(map(_line, records)))  # first: what is held is also kept
        for record in records:
            self._take(record)

    def _append(self, lines: str) -> None:
        if self.writes:
            # A file that another process has finished with does not come back.
            there = lambda path, flags: os.open(path, flags & ~os.O_CREAT)
            with (
                disk_errors(self.path.parent),
                open(self.path, "a", encoding="utf-8", opener=there) as file,
            ):
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    def finish(self, tasks: Iterable[Task]) -> None:
        """All `tasks` are scored: nothing is unfinished, unless others were answered, too."""
        if self.rows.get(EVERYTHING, {}).keys() <= {task.id for task in tasks}:
            for path in (self.path, self.path.with_name(LOCK)):
                path.unlink(missing_ok=True)


def refuse_finished(out: Path, names: Iterable[str]) -> None:
    """Raise DataError where a run that ended has left one of these files in `out`."""
    if done := next((name for name in names if (out / name).exists()), None):
        what = f"{out}: holds {done} of a finished run, of which nothing is left to --resume"
        raise DataError(f"{what}; choose another --out, or delete it")


def open_store(
    path: Path,
    config: StrictModel,
    tasks: Sequence[Task],
    resume: bool,
    finished: Iterable[str] = (),
) -> Store:
    """What was answered before, under the same configuration; nothing is written yet.

    `finished` names files that, without unfinished answers beside them, are of a run that ended.
    """
    if not path.exists():
        refuse_finished(path.parent, finished)
    try:
        lines = read_limited(path).decode().splitlines(keepends=True)
        store = Store(path, [line for line in lines if line.endswith("\n")])
        records = [own for row in store.rows.values() for own in row.values()]
        known = {own["task"]: own["content"] for own in records}
        inputs = {task.id: len(task.test) for task in tasks}
        for one in map(Record.model_validate, records):
            if len(one.test) != inputs.get(one.task, len(one.test)):
                raise ValueError(f"{len(one.test)} answers of {one.task}")
            _ = [_ranked(entries) for entries in one.test]
        changed = differences(store.head["config"], config) if resume else []
    except (FileNotFoundError, NotADirectoryError):
        store, known, changed = Store(path), {}, []
    except (OSError, ValueError, LookupError, TypeError, AttributeError, TaskError) as error:
        raise DataError(f"{path}: is not what arctrm keeps of answers ({error})") from error
    if not resume and not store.rows:
        return Store(path)
    if not resume:
        raise DataError(f"{path}: holds answers of an interrupted run; add --resume, or delete it")
    if not store.head:
        raise DataError(f"{path.parent}: holds nothing unfinished; leave out --resume")
    if changed:
        raise CheckpointError(f"{path}: {changed[0]}; resume as it began, or use another --out")
    other = [task.id for task in tasks if known.get(task.id, own := content_of(task)) != own]
    if other:
        raise DataError(f"{path}: task {other[0]} was another one then; restore it")
    return store


def open_folder(out: Path, config: BaseModel, older: Iterable[str] = ()) -> TextIO:
    """Hold a result folder and begin it: the record of this command, none of the `older` files."""
    if (out / "checkpoints").is_dir():
        raise DataError(f"{out}: is the folder of a training run; choose another --out")
    held = hold(out)
    with disk_errors(out):
        for name in older:
            (out / name).unlink(missing_ok=True)
    write_run_record(out, config)
    return held


def content_of(task: Task) -> str:
    """12 hex digits over the demonstrations and the test inputs."""
    text = f"{task.fingerprint()} {[pair.input.tolist() for pair in task.test]}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"


def as_record(task: Task, ranked: Rankings) -> dict[str, Any]:
    """The ranked grids of a task's test inputs as JSON can hold them."""
    return {"test": [[_entry(one) for one in ranked[key]] for key in keys_of([task])]}


def from_records(records: Iterable[Mapping[str, Any]]) -> dict[Key, list[Ranked]]:
    """The rankings that records hold."""
    return {
        Key(record["task"], index): _ranked(own)
        for record in records
        for index, own in enumerate(record["test"])
    }


def write_candidates(path: Path, tasks: Iterable[Task], ranked: Rankings) -> None:
    """Write the ranked grids of every test input of `tasks`, the best first:

    {task id: [for each test input: [{"grid": [[int]], "q": float, "views": {source: [int]},
               "reader_scores": [float], "inverse_scores": [float], "broken": [str]}, ...]]}

    `views`: those under which each source proposed the grid; scores: nats, one for each view of the
    judge (null: minus infinity), none where it was not judged.
    """
    content = {task.id: as_record(task, ranked)["test"] for task in tasks}
    text = json.dumps(content, separators=(",", ":"))
    write_bytes_atomically(path, gzip.compress(text.encode(), mtime=0))


def read_candidates(path: Path) -> dict[str, list[list[Ranked]]]:
    """What `write_candidates` wrote, by task id and test input."""
    try:
        content = read_json(path).items()
        return {task: list(map(_ranked, inputs)) for task, inputs in content}
    except (OSError, ValueError, TypeError, AttributeError, TaskError) as error:
        problem = f"no candidates of arctrm eval --set evaluation.keep_candidates=true ({error})"
        raise DataError(f"{path}: {problem}") from error


def _entry(one: Ranked) -> dict[str, Any]:
    scores = {name: getattr(one, name) for name in SCORES}
    return {
        "grid": one.grid.tolist(),
        "q": one.mean_q if math.isfinite(one.mean_q) else None,
        "views": {source: list(views) for source, views in one.views_by.items()},
        **{name: [s if math.isfinite(s) else None for s in own] for name, own in scores.items()},
        "broken": list(one.broken),
    }


def _ranked(entries: Iterable[Entry | Mapping[str, Any]]) -> list[Ranked]:
    found = []
    nats = lambda score: -math.inf if score is None else score
    for one in map(Entry.model_validate, entries):
        scores = {name: tuple(map(nats, getattr(one, name))) for name in SCORES}
        more: dict[str, Any] = {"views_by": one.views, "broken": one.broken, **scores}
        found.append(Ranked(parse_grid(one.grid, "a grid"), 0, nats(one.q), **more))
    return counted(found)


def write_submission(out: Path, tasks: Sequence[Task], ranked: Rankings) -> None:
    """Write submission.json, two grids for every test input of `tasks`, in one step, in the ARC
    Prize (Kaggle) format:

    {task id: [{"attempt_1": [[0, 1], ...], "attempt_2": [[...], ...]}, ... one per test input]}
    """
    content = {}
    for name, found in submitted(sorted(tasks, key=lambda task: task.id), ranked).items():
        lists = [[grid.tolist() for grid in own] for own in found]
        content[name] = [dict(zip(ATTEMPT_NAMES, own, strict=True)) for own in lists]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(out / SUBMISSION, json.dumps(content).encode())


def submitted(tasks: Iterable[Task], ranked: Rankings) -> dict[str, list[tuple[Grid, Grid]]]:
    """attempt_1 and attempt_2 at every test input, by task id."""
    found = {}
    for task in tasks:
        both = zip(keys_of([task]), task.test, strict=True)
        found[task.id] = [attempts(ranked[key], pair.input) for key, pair in both]
    return found


def predictions(tasks: Iterable[Task], ranked: Rankings) -> dict[str, list[list[Grid]]]:
    """What is scored: the two grids that are submitted, and those that come after them."""
    found = {}
    for task in tasks:
        both = zip(keys_of([task]), task.test, strict=True)
        found[task.id] = [[one.grid for one in ranked[key]] or [pair.input] for key, pair in both]
    return found


def read_submission(path: Path) -> dict[str, list[tuple[Grid, Grid]]]:
    """Task id -> (attempt_1, attempt_2) for each test input."""
    content, name = load_json(path), ""
    found: dict[str, list[tuple[Grid, Grid]]] = {}
    try:
        for name, entry in content.items():
            found[name] = []
            for i, own in enumerate(entry):
                two = (parse_grid(own[a], f"{path}: {name}[{i}].{a}") for a in ATTEMPT_NAMES)
                found[name].append((next(two), next(two)))
        return found
    except (AttributeError, TypeError, LookupError) as error:
        what = f"{name} is no part of a submission; expected a list of attempt_1 and attempt_2"
        raise DataError(f"{path}: {what} of each test input") from error
