"""Grids and tasks in the terminal.

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

from arctrm.console import ARC_PALETTE
from arctrm.data.task import Grid, Pair, Task

MAX_WIDE = 16
"""Grids up to this width get wide cells: two of them side by side fit on 80 columns."""

_UNBOUNDED = 1000
_DARK_COLOURS = {0, 1, 2, 6, 9}
_CELLS = [
    Style(color="white" if colour in _DARK_COLOURS else "black", bgcolor=shade)
    for colour, shade in enumerate(ARC_PALETTE)
]


def grid_text(grid: Grid, wide: bool | None = None) -> Text:
    """The grid as digits on ARC_PALETTE; `wide` (default: by its width) = two characters a cell."""
    wide = grid.shape[1] <= MAX_WIDE if wide is None else wide
    text = Text(no_wrap=True, overflow="crop")
    for number, row in enumerate(grid.tolist()):
        if number:
            text.append("\n")
        for colour in row:
            text.append(f"{colour} " if wide else str(colour), _CELLS[colour])
    return text


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
    """Input -> output of one pair; the input alone where the output is not known.

    The output goes below where both do not fit side by side: a cropped grid would look whole.
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
    """`row` where the console is wide enough for all of it, else `stack`."""

    row: RenderableType
    stack: RenderableType

    def _chosen(self, console: Console, options: ConsoleOptions) -> RenderableType:
        needed = Measurement.get(console, options.update(max_width=_UNBOUNDED), self.row).maximum
        return self.row if needed <= options.max_width else self.stack

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._chosen(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._chosen(console, options))


def task_table(task: Task, predictions: Sequence[Sequence[Grid]] | None = None) -> RenderableType:
    """A whole task: demonstrations, then each test pair (with its answer where the task has it).

    Args:
        task: what to show; pass `task.without_answers()` to hide the answers.
        predictions: per test input the grids attempt_1, attempt_2, shown beside it.

    """
    grids = [grid for pair in (*task.demonstrations, *task.test) for grid in _grids(pair)]
    wide = max(grid.shape[1] for grid in grids) <= MAX_WIDE
    shown = [
        pair_row(pair, f"demonstration {number}", wide)
        for number, pair in enumerate(task.demonstrations, 1)
    ]
    rows: list[RenderableType] = [Text(task.id, "bold underline"), side_by_side(shown)]
    for index, pair in enumerate(task.test):
        title = f"test {index + 1}" if len(task.test) > 1 else "test"
        parts = [pair_row(pair, title, wide)]
        if predictions is not None:
            attempts = enumerate(predictions[index], 1)
            parts += [grid_panel(grid, f"attempt_{number}", wide) for number, grid in attempts]
        rows += [Text(), side_by_side(parts)]
    return Group(*rows, Text())


def _grids(pair: Pair) -> list[Grid]:
    return [pair.input] if pair.output is None else [pair.input, pair.output]
