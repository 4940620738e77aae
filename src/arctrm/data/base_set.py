"""The base set: every pair that is trained on, once. `arctrm data build` makes it.

Two flat arrays; views are drawn on the fly, so ARC-AGI-1 is about 1 MB whatever `num_aug` says. On
disk a set is a folder with one file, replaced in one step, with ids and counts in its metadata.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from arctrm.config.base import StrictModel
from arctrm.config.data import DataConfig
from arctrm.data.overlap import check, describe, find_overlaps, refused
from arctrm.data.sources import load_tasks, subset_label
from arctrm.data.task import (
    MAX_SIDE,
    NUM_COLOURS,
    Grid,
    Pair,
    Task,
    held_out_ids,
    pair_key,
    training_pairs,
)
from arctrm.data.views import fixed_colours
from arctrm.errors import DataError
from arctrm.system import TEMPORARY, clear_abandoned, disk_errors, write_bytes_atomically

FILE = "base.safetensors"
_PLACE = ("offset", "height", "width")
PAIR_COLUMNS = ("task", "subset", "is_test", *(f"{s}_{p}" for s in ("in", "out") for p in _PLACE))


class BaseSetMeta(StrictModel):
    """What the two arrays of a base set mean."""

    version: Literal[2] = 2
    task_ids: tuple[str, ...]  # Task id of each value of the pairs' column `task`
    in_test_set: tuple[bool, ...]  # per task: evaluated, so that only its demonstrations are here
    fixed_colours: tuple[int, ...]  # per task: bit c set = no view may move colour c
    subsets: tuple[str, ...]
    """Label (bundled name or file stem) of each value of the pairs' column `subset`."""
    test_set: str | None  # label of the evaluated subset
    num_aug: int  # distinct views of each task that training may draw; 0 = unbounded
    fingerprint: str  # sha256 over cells, pairs and task ids
    counts: dict[str, dict[str, int]]
    """Subset label -> number of tasks, demonstrations, test_pairs that it contributes."""
    built_from: dict[str, Any] = Field(default_factory=dict)
    """The `[data]` keys that decided the content, as given."""


@dataclass(frozen=True)
class BaseSet:
    """All pairs of grids that are trained on."""

    cells: np.ndarray  # uint8 [num_cells]: all grids flattened row-major
    pairs: np.ndarray  # int32 [num_pairs, 9]: where each pair's grids lie; columns `PAIR_COLUMNS`
    meta: BaseSetMeta

    @property
    def num_tasks(self) -> int:
        """Tasks, test set included."""
        return len(self.meta.task_ids)

    @property
    def num_pairs(self) -> int:
        """Pairs that are trained on."""
        return len(self.pairs)

    def pair(self, index: int) -> Pair:
        """The pair in row `index` of `pairs`."""
        places = self.pairs[index, 3:].reshape(2, 3).tolist()
        return Pair(*(self.cells[i : i + h * w].reshape(h, w) for i, h, w in places))

    def labelled_pairs(self) -> Iterator[tuple[str, str, Pair]]:
        """(task id, subset label, pair) of every pair."""
        for index, (task, subset) in enumerate(self.pairs[:, :2].tolist()):
            yield self.meta.task_ids[task], self.meta.subsets[subset], self.pair(index)

    def task_fingerprints(self) -> list[str]:
        """Per task: that of its demonstrations in the first subset that holds it."""
        demonstrations: list[dict[int, list[Pair]]] = [{} for _ in range(self.num_tasks)]
        for index, (task, subset, is_test) in enumerate(self.pairs[:, :3].tolist()):
            if not is_test:
                demonstrations[task].setdefault(subset, []).append(self.pair(index))
        firsts = [found[min(found)] if found else [] for found in demonstrations]
        return [Task("", tuple(pairs)).fingerprint() for pairs in firsts]


def prepare(config: DataConfig) -> BaseSet:
    """The base set of `config`: opened where `config.path` holds one, else built (there)."""
    path = config.path
    if path is None or not (path / FILE).is_file():
        return build(config, path)[0]
    base = open_base_set(path)
    for key, wanted in _built_from(config).items():
        if (got := base.meta.built_from.get(key)) != wanted:
            both = f"data.{key} = {got!r}, but the configuration says {wanted!r}"
            raise DataError(f"{path} was built with {both}; build it again, or elsewhere")
    return replace(base, meta=base.meta.model_copy(update={"num_aug": config.num_aug}))


def build(config: DataConfig, out: Path | None = None) -> tuple[BaseSet, Table]:
    """Build the base set of `config` (in the folder `out`); a report of what went in."""
    # 1. The tasks of every source, under its label.
    tasks: dict[str, list[Task]] = {}
    for source in config.subsets:
        label = subset_label(source)
        if label in tasks:
            raise DataError(f"data.subsets: two are named {label!r}; rename one of the files")
        tasks[label] = load_tasks(source, max_tasks=config.max_tasks)
    test_label = None if config.test_set is None else subset_label(config.test_set)
    others = tasks.keys() - {test_label}
    # 2. Named exclusions. The test set stays whole: evaluation shows its demonstrations anyway.
    exclude = {(label, t.id) for label in others for t in tasks[label] if t.id in config.exclude}
    without = lambda drop: {
        label: [t for t in own if (label, t.id) not in drop] for label, own in tasks.items()
    }
    tasks = without(exclude)
    # 3. The validation set of each subset loses its test pairs.
    for label in others:
        chosen = held_out_ids((task.id for task in tasks[label]), config.held_out)
        tasks[label] = [replace(t, test=()) if t.id in chosen else t for t in tasks[label]]
    # 4. The overlap guard: test content of the test set is refused, or left out.
    tests = tasks[test_label] if test_label else []
    if test_label and config.unseen_test_set:
        tests = [replace(t, test=(*t.demonstrations, *t.test)) for t in tests]
        tasks[test_label] = []
    overlaps = find_overlaps(tasks, tests, test_label) if tests else []
    bad = refused(overlaps, test_label, config.allow_overlap)
    if not config.drop_overlap:
        check(overlaps, test_label, config.allow_overlap)
    drop = {(overlap.subset, overlap.task_id) for overlap in bad}
    tasks = without(drop)
    if not any(tasks.values()):
        raise DataError(f"data.subsets = {list(config.subsets)}: no task is left to train on")
    # 5. Two arrays, and a file if somebody wants one.
    base = base_set_from_tasks(tasks, test_label, config.num_aug, _built_from(config))
    if out is not None:
        write_base_set(base, out)
    remarks = {
        "left out by data.exclude": ", ".join(sorted({task_id for _, task_id in exclude})),
        "left out by data.drop_overlap": f"{len({i for _, i in drop})} tasks" if drop else "",
        "overlaps that may be trained on": describe(o for o in overlaps if o not in set(bad)),
    }
    where = f" in {out}" if out else ""
    report = Table(
        *("subset", "tasks", "demonstrations", "test pairs"),
        title=f"{base.num_tasks:,} tasks, {base.num_pairs:,} pairs{where}",
        caption="\n".join(f"{k}: {v}" for k, v in remarks.items() if v),
    )
    for label, counts in base.meta.counts.items():
        report.add_row(label, *(f"{count:,}" for count in counts.values()))
    return base, report


def _built_from(config: DataConfig) -> dict[str, Any]:
    """The keys that decide the content of a base set, as JSON gives them back."""
    keys = {"subsets", "test_set", "exclude", "allow_overlap", "drop_overlap", "max_tasks"}
    keys |= {"held_out", "unseen_test_set"}
    return config.model_dump(mode="json", include=keys)


def base_set_from_tasks(
    tasks_by_subset: dict[str, list[Task]],
    test_set: str | None,
    num_aug: int,
    built_from: dict[str, Any] | None = None,
) -> BaseSet:
    """Collect the demonstrations of all tasks and the known test pairs of those whose ids are not
    in `test_set`. Tasks with the same id are one task, its pairs deduplicated by content.
    """
    test_ids = {task.id for task in tasks_by_subset[test_set]} if test_set is not None else set()
    ids = sorted({task.id for tasks in tasks_by_subset.values() for task in tasks})
    row_of = {task_id: row for row, task_id in enumerate(ids)}
    demonstrations: dict[str, list[Pair]] = {task_id: [] for task_id in ids}
    rows: list[tuple[int, ...]] = []
    grids: list[Grid] = [np.zeros(0, np.uint8)]
    seen, offset = set(), 0
    for subset, tasks in enumerate(tasks_by_subset.values()):
        for task in tasks:
            for pair, is_test in training_pairs(task, task.id in test_ids):
                key = (task.id, pair_key(pair))
                if key in seen or pair.output is None:
                    continue
                seen.add(key)
                middle = offset + pair.input.size
                places = (offset, *pair.input.shape, middle, *pair.output.shape)
                rows.append((row_of[task.id], subset, int(is_test), *places))
                grids += [pair.input.ravel(), pair.output.ravel()]
                offset = middle + pair.output.size
                if not is_test:
                    demonstrations[task.id].append(pair)
    cells = np.concatenate(grids)
    pairs = np.array(rows, dtype=np.int32).reshape(-1, len(PAIR_COLUMNS))
    fixed = (fixed_colours(Task("", tuple(demonstrations[task_id]))) for task_id in ids)
    counts = {}
    for subset, label in enumerate(tasks_by_subset):
        own = pairs[pairs[:, 1] == subset]
        count, tests = len(np.unique(own[:, 0])), int(own[:, 2].sum())
        counts[label] = dict(tasks=count, demonstrations=len(own) - tests, test_pairs=tests)
    meta = BaseSetMeta(
        task_ids=tuple(ids),
        in_test_set=tuple(task_id in test_ids for task_id in ids),
        fixed_colours=tuple(int(flags @ (1 << np.arange(len(flags)))) for flags in fixed),
        subsets=tuple(tasks_by_subset),
        test_set=test_set,
        num_aug=num_aug,
        fingerprint=_fingerprint(cells, pairs, ids),
        counts=counts,
        built_from=built_from or {},
    )
    return BaseSet(cells, pairs, meta)


def _fingerprint(cells: np.ndarray, pairs: np.ndarray, ids: Iterable[str]) -> str:
    return hashlib.sha256(cells.tobytes() + pairs.tobytes() + "\n".join(ids).encode()).hexdigest()


def write_base_set(base: BaseSet, path: Path) -> None:
    """Write the set to the folder `path`, in place of an older one; nothing else is replaced."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else ["a file"]
    if os.path.lexists(path) and any(n != FILE and not n.startswith(TEMPORARY) for n in names):
        raise DataError(f"{path} is not (or not only) a built data set; choose another folder")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        clear_abandoned(path)
    arrays, meta = {"cells": base.cells, "pairs": base.pairs}, base.meta.model_dump_json()
    write_bytes_atomically(path / FILE, save(arrays, {"meta": meta}))


def _check(cells: np.ndarray, pairs: np.ndarray, meta: BaseSetMeta) -> None:
    """ValueError where a pair lies outside of the cells, or names no task."""
    if (cells.dtype, pairs.dtype) != (np.uint8, np.int32) or pairs.shape[1:] != (
        len(PAIR_COLUMNS),
    ):
        raise ValueError("its arrays are of another kind")
    places, tasks = pairs[:, 3:].reshape(-1, 3).astype(np.int64), len(meta.task_ids)
    ends = places[:, 0] + places[:, 1] * places[:, 2]
    bounds = np.array([tasks, len(meta.subsets), 2])
    is_inside = (ends <= cells.size).all() and (pairs[:, :3] < bounds).all() and (pairs >= 0).all()
    sides = places[:, 1:]
    per_task = {tasks, len(meta.in_test_set), len(meta.fixed_colours)}
    if not (is_inside and ((sides >= 1) & (sides <= MAX_SIDE)).all() and len(per_task) == 1):
        raise ValueError("its pairs lie outside of its cells or tasks")
    if cells.ndim != 1 or (cells >= NUM_COLOURS).any():
        raise ValueError("its cells are no colours")


def open_base_set(path: Path) -> BaseSet:
    """Read a built set."""
    if not (path / FILE).is_file():
        raise DataError(f"{path} holds no built data set; build one with `arctrm data build`")
    try:
        with safe_open(path / FILE, "np") as file:
            meta = BaseSetMeta.model_validate_json((file.metadata() or {})["meta"])
            cells, pairs = file.get_tensor("cells"), file.get_tensor("pairs")
        if _fingerprint(cells, pairs, meta.task_ids) != meta.fingerprint:
            raise ValueError("its arrays are not the ones it was written with")
        _check(cells, pairs, meta)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a readable data set ({reason}); build it again") from error
    return BaseSet(cells, pairs, meta)
