"""Grids and tasks as pictures in the terminal. `arctrm data show` prints them.

Every cell shows its digit on its colour, so that the same output can be read without colours
(NO_COLOR, a log file). Wide cells are two characters, which looks square; where a pair would not
fit on 80 columns that way, cells are one character.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from arctrm.console import ARC_PALETTE, console, note
from arctrm.data.overlap import describe, find_overlaps
from arctrm.data.sources import load_tasks, nearest
from arctrm.data.task import Grid, Pair, Task

MAX_WIDE = 16  # up to this width cells are wide: two grids side by side fit on 80 columns
_CELLS = [
    Style(color="white" if colour in {0, 1, 2, 6, 9} else "black", bgcolor=shade)
    for colour, shade in enumerate(ARC_PALETTE)
]


def grid_text(grid: Grid, wide: bool | None = None) -> Text:
    """The grid as digits on ARC_PALETTE; `wide` (default: by its width) = two characters a cell."""
    end = " " if wide or (wide is None and grid.shape[1] <= MAX_WIDE) else ""
    rows = (Text().join(Text(f"{c}{end}", _CELLS[c]) for c in row) for row in grid.tolist())
    return Text("\n", no_wrap=True, overflow="crop").join(rows)


def grid_panel(grid: Grid, title: str, wide: bool | None = None) -> RenderableType:
    """The grid under a heading of its title and size."""
    height, width = grid.shape
    panel = Table.grid()
    panel.add_row(Text.assemble((title, "bold"), (f" {height}x{width}", "dim"), no_wrap=True))
    panel.add_row(grid_text(grid, wide))
    return panel


def side_by_side(renderables: Iterable[RenderableType]) -> RenderableType:
    """Left to right, going on below where the terminal is too narrow."""
    return Columns(list(renderables), padding=(0, 3))


def pair_row(pair: Pair, title: str, wide: bool | None = None) -> RenderableType:
    """Input -> output of one pair (if known); below it where both do not fit side by side, since a
    cropped grid would look whole.
    """
    shown = grid_panel(pair.input, title, wide)
    if pair.output is None:
        return shown
    output = grid_panel(pair.output, "output", wide)
    row = Table.grid(padding=(0, 1))
    row.add_row(shown, Text("\n→"), output)
    return _RowOrStack(row, Group(shown, Text("↓"), output))


@dataclass(frozen=True)
class _RowOrStack:
    row: RenderableType
    stack: RenderableType  # where the console is not wide enough for all of the row

    def _chosen(self, console: Console, options: ConsoleOptions) -> RenderableType:
        needed = Measurement.get(console, options.update(max_width=1000), self.row).maximum
        return self.row if needed <= options.max_width else self.stack

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._chosen(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._chosen(console, options))


def task_picture(task: Task) -> RenderableType:
    """A whole task: demonstrations, then each test pair (with its answer where the task has it)."""
    pairs = (*task.demonstrations, *task.test)
    grids = [grid for pair in pairs for grid in (pair.input, pair.output) if grid is not None]
    wide = max(grid.shape[1] for grid in grids) <= MAX_WIDE
    shown, asked = (
        side_by_side(pair_row(pair, f"{name} {n}", wide) for n, pair in enumerate(own, 1))
        for name, own in (("demonstration", task.demonstrations), ("test", task.test))
    )
    return Group(Text(task.id, "bold underline"), shown, Text(), asked, Text())


def show(
    source: str, task_ids: Sequence[str] = (), statistics: bool = False, limit: int = 5
) -> list[Task]:
    """Print the named tasks of a source, else its first `limit`, else (only) its statistics; gives
    the tasks that it printed.
    """
    tasks = load_tasks(source)
    by_id = {task.id: task for task in tasks}
    chosen = task_ids or ([] if statistics else list(by_id)[:limit])
    shown = [by_id[nearest(task_id, by_id, source)] for task_id in chosen]
    for task in shown:
        console().print(task_picture(task))
    if statistics:
        table = Table("", "tasks", f"of {len(tasks):,}", title=source, title_justify="left")
        for split in ("evaluation", "evaluation2"):  # what would leak if it were trained on
            overlaps = find_overlaps({source: tasks}, load_tasks(split), split)
            count = f"{len({overlap.task_id for overlap in overlaps}):,}"
            table.add_row(f"with test content of {split}", count, describe(overlaps))
        console().print(table)
    elif not task_ids and len(tasks) > limit:
        note(f"{limit} of {len(tasks)} tasks; name task ids to see others")
    return shown
