"""`arctrm data show`: tasks in the terminal, and statistics of a source."""

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
from rich.markup import escape
from rich.table import Table

from arctrm.console import console, note
from arctrm.data.canvas import pair_canvas
from arctrm.data.overlap import describe, find_overlaps
from arctrm.data.render import task_table
from arctrm.data.sources import load_tasks
from arctrm.data.task import MAX_SIDE, Pair, Task
from arctrm.errors import DataError

CANVAS_BINS = (25, 50, 100, 150, 200, 300, 400, 600, MAX_SIDE**2)
"""Upper edges, in cells, of the canvas histogram."""

QUANTILES = (0, 0.25, 0.5, 0.75, 1)
BAR_WIDTH = 40
_TEXT_COLUMNS = ("what", "split", "which", "share")


def show(
    source: str, task_ids: Sequence[str] = (), statistics: bool = False, limit: int = 5
) -> None:
    """Print the named tasks of a source, else its first `limit`, else (only) its statistics.

    Raises:
        TaskError, DataError: the source cannot be used, or has no task of that id.

    """
    tasks = load_tasks(source)
    named = _named(tasks, task_ids, source)
    for task in named if task_ids or statistics else tasks[:limit]:
        console().print(task_table(task))
    if statistics:
        for table in statistics_tables(tasks, source):
            console().print(table)
    elif not task_ids and len(tasks) > limit:
        note(f"{limit} of {len(tasks)} tasks; name task ids to see others")


def statistics_tables(tasks: list[Task], source: str) -> list[Table]:
    """Counts and sizes, the canvas histogram, and the overlap with both evaluation splits."""
    pairs = [pair for task in tasks for pair in (*task.demonstrations, *task.test)]
    return [
        _counts(tasks, pairs, source),
        _sizes(pairs),
        _canvases(pairs),
        overlap_table(tasks, source),
    ]


def overlap_table(tasks: list[Task], source: str) -> Table:
    """Which tasks would leak test content of ARC-AGI-1 and -2 evaluation if trained on."""
    table = _table("overlap with test pairs (by content)", "split", "tasks", "which")
    for split in ("evaluation", "evaluation2"):
        overlaps = find_overlaps({source: tasks}, load_tasks(split), split)
        num_tasks = len({overlap.task_id for overlap in overlaps})
        table.add_row(split, f"{num_tasks:,}", escape(describe(overlaps)) or "-")
    return table


def _named(tasks: list[Task], task_ids: Sequence[str], source: str) -> list[Task]:
    by_id = {task.id: task for task in tasks}
    for task_id in task_ids:
        if task_id not in by_id:
            near = get_close_matches(task_id, by_id, n=3, cutoff=0.5)
            raise DataError(
                f"{source} has no task {task_id!r} among its {len(tasks)}; "
                f"{'near ones are' if near else 'its first are'} "
                f"{', '.join(near or list(by_id)[:3])}"
            )
    return [by_id[task_id] for task_id in task_ids]


def _counts(tasks: list[Task], pairs: list[Pair], source: str) -> Table:
    demonstrations = sum(len(task.demonstrations) for task in tasks)
    answered = [pair for task in tasks for pair in task.test if pair.output is not None]
    known = [pair for pair in pairs if pair.output is not None]
    same = sum(pair.output.shape == pair.input.shape for pair in known if pair.output is not None)
    table = _table(source, "what", "number")
    table.add_row("tasks", f"{len(tasks):,}")
    table.add_row("demonstrations", f"{demonstrations:,}")
    table.add_row("test inputs", f"{len(pairs) - demonstrations:,}")
    table.add_row("test outputs known", f"{len(answered):,}")
    table.add_row("pairs of equal input and output size", f"{same / len(known):.1%}")
    return table


def _sizes(pairs: list[Pair]) -> Table:
    inputs = [pair.input.shape for pair in pairs]
    outputs = [pair.output.shape for pair in pairs if pair.output is not None]
    table = _table("grid sizes", "what", "min", "25%", "median", "75%", "max")
    for name, shapes in (("input", inputs), ("output", outputs)):
        sizes = np.array(shapes, dtype=np.int64)
        for measure, values in (
            ("height", sizes[:, 0]),
            ("width", sizes[:, 1]),
            ("cells", sizes.prod(axis=1)),
        ):
            quantiles = np.quantile(values, QUANTILES)
            table.add_row(f"{name} {measure}", *(f"{value:.0f}" for value in quantiles))
    return table


def _canvases(pairs: list[Pair]) -> Table:
    cells = np.array([np.prod(pair_canvas(pair)) for pair in pairs])
    counts = np.bincount(np.searchsorted(CANVAS_BINS, cells), minlength=len(CANVAS_BINS))
    title = f"canvas cells of a pair (mean {cells.mean():.0f} of {MAX_SIDE**2})"
    table = _table(title, "up to", "pairs", "share")
    for edge, count in zip(CANVAS_BINS, counts.tolist(), strict=True):
        bar = "█" * round(BAR_WIDTH * count / counts.max())
        table.add_row(f"{edge}", f"{count:,}", bar)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right")
    return table
