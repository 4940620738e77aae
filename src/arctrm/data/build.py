"""`arctrm data build`: sources -> guard -> base set, in memory or in a folder."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.markup import escape
from rich.table import Table

from arctrm.config.data import DataConfig
from arctrm.data.dataset import BaseSet, base_set_from_tasks, open_base_set, write_base_set
from arctrm.data.overlap import Overlap, check, describe, find_overlaps, refused
from arctrm.data.sources import load_tasks, subset_label
from arctrm.data.task import Task, held_out_ids
from arctrm.errors import DataError


@dataclass(frozen=True)
class BuildReport:
    """What a build took in, left out and cost."""

    counts: dict[str, dict[str, int]]
    """Subset label -> tasks, demonstrations, test_pairs that it contributes."""

    tasks: int
    pairs: int
    bytes: int
    """Of both arrays, in memory and (but for 200 bytes of headers and the JSON) on disk."""

    seconds: float
    excluded: tuple[str, ...]
    """Ids of `data.exclude` that were found and left out."""

    dropped: tuple[str, ...]
    """Ids that `data.drop_overlap` left out."""

    harmless: tuple[Overlap, ...]
    """Overlaps that are trained on: allowed by name, or within the test set's demonstrations."""

    path: Path | None

    def __rich__(self) -> Table:
        return self.table()

    def table(self) -> Table:
        """The report as the command prints it."""
        table = Table(title=escape(self._title()), title_justify="left", caption_justify="left")
        table.add_column("subset")
        for name in ("tasks", "demonstrations", "test pairs"):
            table.add_column(name, justify="right")
        for label, counts in self.counts.items():
            table.add_row(escape(label), *(f"{counts[key]:,}" for key in counts))
        table.caption = escape("\n".join(self._remarks()))
        return table

    def _title(self) -> str:
        where = f" in {self.path}" if self.path else ""
        size = f"{self.tasks:,} tasks, {self.pairs:,} pairs, {self.bytes / 1e6:.1f} MB"
        return f"{size}{where}, {self.seconds:.1f} s"

    def _remarks(self) -> Iterable[str]:
        if self.excluded:
            yield f"left out by data.exclude: {', '.join(self.excluded)}"
        if self.dropped:
            yield f"left out by data.drop_overlap: {len(self.dropped)} tasks"
        if self.harmless:
            yield f"overlaps that may be trained on: {describe(self.harmless)}"


def build(config: DataConfig, out: Path | None = None) -> tuple[BaseSet, BuildReport]:
    """Build the base set of `config`; written to the folder `out`, without it only in memory.

    Raises:
        TaskError, DataError: a source cannot be used, or nothing is left to train on.
        OverlapError: a subset holds test content of the test set.
        ResourceError: the disk is full.

    """
    start = perf_counter()
    tasks, excluded = _exclude(_load(config), config)
    tasks, dropped, harmless = _guard(_hold_out(tasks, config), config)
    if not any(tasks.values()):
        raise DataError(f"data.subsets = {list(config.subsets)}: no task is left to train on")
    base = base_set_from_tasks(tasks, _test_label(config), config.num_aug, _built_from(config))
    if out is not None:
        write_base_set(base, out)
        base = open_base_set(out)
    report = BuildReport(
        counts=base.meta.counts,
        tasks=base.num_tasks,
        pairs=base.num_pairs,
        bytes=base.num_bytes,
        seconds=perf_counter() - start,
        excluded=excluded,
        dropped=dropped,
        harmless=harmless,
        path=out,
    )
    return base, report


def prepare(config: DataConfig) -> BaseSet:
    """The base set of `config`: opened where `config.path` holds one, else built (there).

    Raises:
        DataError: the set at `config.path` was built from something else.

    """
    if config.path is None or not (config.path / "meta.json").is_file():
        return build(config, config.path)[0]
    base = open_base_set(config.path)
    wanted = _built_from(config)
    for key, value in wanted.items():
        if base.meta.built_from.get(key) != value:
            raise DataError(
                f"{config.path} was built with data.{key} = {base.meta.built_from.get(key)!r}, "
                f"but the configuration says {value!r}; build it again or choose another data.path"
            )
    meta = base.meta.model_copy(update={"num_aug": config.num_aug})
    return BaseSet(base.cells, base.pairs, meta)


def _load(config: DataConfig) -> dict[str, list[Task]]:
    tasks: dict[str, list[Task]] = {}
    for source in config.subsets:
        label = subset_label(source)
        if label in tasks:
            raise DataError(
                f"data.subsets: {source!r} is named {label!r}, as is another subset; "
                "name each source once, and rename the file if two have the same name"
            )
        tasks[label] = load_tasks(source, max_tasks=config.max_tasks)
    return tasks


def _exclude(
    tasks: dict[str, list[Task]], config: DataConfig
) -> tuple[dict[str, list[Task]], tuple[str, ...]]:
    """Leave `data.exclude` out, except from the test set: it stays whole, and evaluation gives its
    demonstrations anyway.
    """
    ids, test_label = set(config.exclude), _test_label(config)
    drop = {
        (label, task.id)
        for label, subset in tasks.items()
        for task in subset
        if label != test_label and task.id in ids
    }
    return _without(tasks, drop), tuple(sorted({task_id for _, task_id in drop}))


def _hold_out(tasks: dict[str, list[Task]], config: DataConfig) -> dict[str, list[Task]]:
    """Drop the test pairs of `data.held_out` tasks of each subset but the test set."""
    kept: dict[str, list[Task]] = {}
    for label, subset in tasks.items():
        count = 0 if label == _test_label(config) else config.held_out
        chosen = held_out_ids((task.id for task in subset), count)
        kept[label] = [replace(t, test=()) if t.id in chosen else t for t in subset]
    return kept


def _guard(
    tasks: dict[str, list[Task]], config: DataConfig
) -> tuple[dict[str, list[Task]], tuple[str, ...], tuple[Overlap, ...]]:
    test_label = _test_label(config)
    if test_label is None:
        return tasks, (), ()
    overlaps = find_overlaps(tasks, tasks[test_label], test_label)
    bad = refused(overlaps, test_label, config.allow_overlap)
    if not config.drop_overlap:
        check(overlaps, test_label, config.allow_overlap)
    drop = {(overlap.subset, overlap.task_id) for overlap in bad}
    harmless = tuple(overlap for overlap in overlaps if overlap not in set(bad))
    return _without(tasks, drop), tuple(sorted({task_id for _, task_id in drop})), harmless


def _without(tasks: dict[str, list[Task]], drop: set[tuple[str, str]]) -> dict[str, list[Task]]:
    return {
        label: [task for task in subset if (label, task.id) not in drop]
        for label, subset in tasks.items()
    }


def _test_label(config: DataConfig) -> str | None:
    return None if config.test_set is None else subset_label(config.test_set)


def _built_from(config: DataConfig) -> dict[str, Any]:
    """The keys that decide the content of a base set, as JSON gives them back."""
    keys = {"subsets", "test_set", "exclude", "allow_overlap", "drop_overlap", "max_tasks"}
    keys |= {"held_out"} if config.held_out else set()  # older sets do not name it
    return config.model_dump(mode="json", include=keys)
