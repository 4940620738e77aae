"""The base set: every pair that is trained on, once, in two flat arrays and a page of JSON.

Views are drawn on the fly, so nothing is multiplied on disk: ARC-AGI-1 is about 1 MB whatever
`num_aug` says. A set on disk is a folder of `cells.npy`, `pairs.npy` (memory-mapped) and
`meta.json`; it is written aside and renamed, so a folder that exists is complete.
"""

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from arctrm.config.base import StrictModel
from arctrm.data.task import Grid, Pair, Task
from arctrm.data.views import fixed_colours
from arctrm.errors import DataError, ResourceError

VERSION = 1
"""Of the folder's layout; a set of another version is refused and has to be built again."""

PAIR_COLUMNS = (
    "task",
    "subset",
    "is_test",
    "in_offset",
    "in_height",
    "in_width",
    "out_offset",
    "out_height",
    "out_width",
)

FILES = {"cells.npy", "pairs.npy", "meta.json"}
"""What the folder of a built set holds, and nothing else."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BaseSetMeta(StrictModel):
    """What the two arrays of a base set mean."""

    version: int = VERSION
    """Layout version of the folder."""

    task_ids: tuple[str, ...]
    """Task id of each value of the pairs' column `task`."""

    in_test_set: tuple[bool, ...]
    """Per task: whether it is evaluated, so that only its demonstrations are here."""

    fixed_colours: tuple[int, ...]
    """Per task: bit c set = no view may move colour c."""

    subsets: tuple[str, ...]
    """Label (bundled name or file stem) of each value of the pairs' column `subset`."""

    test_set: str | None
    """Label of the evaluated subset."""

    num_aug: int
    """Number of distinct views of each task that training may draw; 0 = unbounded."""

    fingerprint: str
    """sha256 over cells, pairs and task ids."""

    counts: dict[str, dict[str, int]]
    """Subset label -> number of tasks, demonstrations, test_pairs that it contributes."""

    built_from: dict[str, Any] = Field(default_factory=dict)
    """The `[data]` keys that decided the content, as given."""


@dataclass(frozen=True)
class BaseSet:
    """All grids flattened row-major (`cells`, uint8 [num_cells]) and where each pair's grids lie
    (`pairs`, int32 [num_pairs, 9], columns `PAIR_COLUMNS`).
    """

    cells: np.ndarray
    pairs: np.ndarray
    meta: BaseSetMeta

    @property
    def num_tasks(self) -> int:
        """Number of tasks, test set included."""
        return len(self.meta.task_ids)

    @property
    def num_pairs(self) -> int:
        """Number of pairs that are trained on."""
        return len(self.pairs)

    @property
    def num_bytes(self) -> int:
        """Size of both arrays."""
        return self.cells.nbytes + self.pairs.nbytes

    def pair(self, index: int) -> Pair:
        """The pair in row `index` of `pairs`."""
        row = self.pairs[index]
        return Pair(self._grid(*row[3:6]), self._grid(*row[6:9]))

    def task_fingerprints(self) -> list[str]:
        """Per task: `Task.fingerprint` of its demonstrations in the first subset that holds it.

        (A later subset may bring more pairs of the same task, which its file does not show.)
        """
        demonstrations: list[dict[int, list[Pair]]] = [{} for _ in range(self.num_tasks)]
        for index, (task, subset, is_test) in enumerate(self.pairs[:, :3].tolist()):
            if not is_test:
                demonstrations[task].setdefault(subset, []).append(self.pair(index))
        firsts = [found[min(found)] if found else [] for found in demonstrations]
        return [Task("", tuple(pairs)).fingerprint() for pairs in firsts]

    def _grid(self, offset: int, height: int, width: int) -> Grid:
        return np.asarray(self.cells[offset : offset + height * width]).reshape(height, width)


def base_set_from_tasks(
    tasks_by_subset: dict[str, list[Task]],
    test_set: str | None,
    num_aug: int,
    built_from: dict[str, Any] | None = None,
) -> BaseSet:
    """Collect the demonstrations of all tasks and the known test pairs of those not in `test_set`.

    Tasks with the same id are one task, its pairs deduplicated by content; a task that occurs in
    the test set never contributes a test pair, whichever subset it comes from.
    """
    test_ids = {task.id for task in tasks_by_subset[test_set]} if test_set is not None else set()
    ids = sorted({task.id for tasks in tasks_by_subset.values() for task in tasks})
    subsets = tuple(tasks_by_subset)
    rows, grids, demonstrations = _collect(tasks_by_subset, test_ids, ids)
    cells = np.concatenate([grid.ravel() for grid in grids]) if grids else np.zeros(0, np.uint8)
    pairs = np.array(rows, dtype=np.int32).reshape(-1, len(PAIR_COLUMNS))
    meta = BaseSetMeta(
        task_ids=tuple(ids),
        in_test_set=tuple(task_id in test_ids for task_id in ids),
        fixed_colours=tuple(_fixed_bits(task_id, demonstrations[task_id]) for task_id in ids),
        subsets=subsets,
        test_set=test_set,
        num_aug=num_aug,
        fingerprint=fingerprint(cells, pairs, ids),
        counts={label: _counts(pairs, index) for index, label in enumerate(subsets)},
        built_from=built_from or {},
    )
    return BaseSet(cells, pairs, meta)


def training_pairs(task: Task, in_test_set: bool) -> Iterator[tuple[Pair, bool]]:
    """The (pair, is_test) of a task that may be trained on: the one place that decides it."""
    for pair in task.demonstrations:
        yield pair, False
    if not in_test_set:
        for pair in task.test:
            if pair.output is not None:
                yield pair, True


def fingerprint(cells: np.ndarray, pairs: np.ndarray, ids: list[str] | tuple[str, ...]) -> str:
    """sha256 over the content of a base set."""
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(cells).data)
    digest.update(np.ascontiguousarray(pairs).data)
    digest.update("\n".join(ids).encode())
    return digest.hexdigest()


def pair_key(pair: Pair) -> tuple[Any, ...]:
    """A hashable value that is equal exactly where two pairs have the same content."""
    output = None if pair.output is None else (pair.output.shape, pair.output.tobytes())
    return pair.input.shape, pair.input.tobytes(), output


def _collect(
    tasks_by_subset: dict[str, list[Task]], test_ids: set[str], ids: list[str]
) -> tuple[list[tuple[int, ...]], list[Grid], dict[str, list[Pair]]]:
    """Rows of `pairs`, the grids in the order of their offsets, the demonstrations by task id."""
    index_of = {task_id: index for index, task_id in enumerate(ids)}
    demonstrations: dict[str, list[Pair]] = {task_id: [] for task_id in ids}
    rows: list[tuple[int, ...]] = []
    grids: list[Grid] = []
    seen: set[tuple[Any, ...]] = set()
    offset = 0
    for subset, tasks in enumerate(tasks_by_subset.values()):
        for task in tasks:
            for pair, is_test in training_pairs(task, task.id in test_ids):
                key = (task.id, pair_key(pair))
                if key in seen or pair.output is None:
                    continue
                seen.add(key)
                middle = offset + pair.input.size
                places = (offset, *pair.input.shape, middle, *pair.output.shape)
                rows.append((index_of[task.id], subset, int(is_test), *places))
                grids += [pair.input, pair.output]
                offset = middle + pair.output.size
                if not is_test:
                    demonstrations[task.id].append(pair)
    return rows, grids, demonstrations


def _fixed_bits(task_id: str, demonstrations: list[Pair]) -> int:
    fixed = fixed_colours(Task(task_id, tuple(demonstrations)))
    return sum(1 << int(colour) for colour in np.flatnonzero(fixed))


def _counts(pairs: np.ndarray, subset: int) -> dict[str, int]:
    own = pairs[pairs[:, 1] == subset]
    num_test = int(own[:, 2].sum())
    num_tasks = len(np.unique(own[:, 0]))
    return {"tasks": num_tasks, "demonstrations": len(own) - num_test, "test_pairs": num_test}


def open_base_set(path: Path) -> BaseSet:
    """Open a built set, memory-mapped.

    Raises:
        DataError: no built set there, another version, or files that do not belong together.

    """
    if not (path / "meta.json").is_file():
        raise DataError(f"{path} holds no built data set; build one with `arctrm data build`")
    try:
        meta = BaseSetMeta.model_validate_json((path / "meta.json").read_text())
        cells = np.load(path / "cells.npy", mmap_mode="r")
        pairs = np.load(path / "pairs.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError, ValidationError) as error:
        raise DataError(
            f"{path} is not a readable data set ({_first_line(error)}); build it again"
        ) from error
    if meta.version != VERSION:
        raise DataError(
            f"{path} has data set version {meta.version}, this arctrm reads version {VERSION}; "
            "build it again"
        )
    if fingerprint(cells, pairs, meta.task_ids) != meta.fingerprint:
        raise DataError(
            f"{path}: cells.npy and pairs.npy are not the ones that meta.json describes; "
            "build it again"
        )
    return BaseSet(cells, pairs, meta)


def write_base_set(base: BaseSet, path: Path) -> None:
    """Write a set aside, then rename it into place; an older built set there is replaced.

    Raises:
        DataError: `path` is something else than a built set, or cannot be written to.
        ResourceError: the disk is full; nothing half-written is left.

    """
    if not _is_replaceable(path):
        raise DataError(
            f"{path} exists and is not (or not only) a built data set; choose another folder"
        )
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        _write(aside / "cells.npy", _npy_bytes(base.cells))
        _write(aside / "pairs.npy", _npy_bytes(base.pairs))
        _write(aside / "meta.json", base.meta.model_dump_json(indent=1).encode())
        _move_into_place(aside, path)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ResourceError(
                f"{path}: no room for the data set of {base.num_bytes / 1e6:.1f} MB "
                f"({error.strerror}); free some disk space or choose another folder"
            ) from error
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; "
            "choose another --out (or data.path)"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_replaceable(path: Path) -> bool:
    """Whether writing to `path` can lose nothing but an older data set."""
    if not path.exists():
        return True
    return path.is_dir() and {file.name for file in path.iterdir()} in (set(), FILES)


def _move_into_place(aside: Path, path: Path) -> None:
    if not path.exists():
        os.replace(aside, path)
        return
    old = aside.with_suffix(".old")
    os.replace(path, old)
    try:
        os.replace(aside, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _npy_bytes(array: np.ndarray) -> bytes:
    """Through memory, because `np.save` on a full disk raises an error without an errno."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
