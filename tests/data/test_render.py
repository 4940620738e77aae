"""Pictures of grids and `data show`: digits without colours, the palette with them, whole grids."""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from arctrm.console import ARC_PALETTE, console
from arctrm.data.render import grid_text, show, task_picture
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import DataError

FULL = np.full((30, 30), 5, np.uint8)


def plain(renderable, width=80):
    console = Console(width=width, no_color=True, record=True, file=StringIO())
    console.print(renderable)
    return console.export_text()


def shown(*arguments, **options):
    with console().capture() as captured:
        show(*arguments, **options)
    return captured.get()


def test_without_colours_a_grid_is_its_digits():
    grid = np.array([[0, 1], [8, 9]], np.uint8)
    assert plain(grid_text(grid)).split() == ["0", "1", "8", "9"]
    assert plain(grid_text(grid, wide=False)).split() == ["01", "89"]


def test_every_cell_has_its_colour_of_the_palette():
    text = grid_text(np.arange(10, dtype=np.uint8).reshape(2, 5))
    assert [span.style.bgcolor.name for span in text.spans] == list(ARC_PALETTE)


def test_a_pair_of_full_grids_fits_on_80_columns():
    task = Task("full", (Pair(FULL, FULL),), (Pair(FULL, FULL),))
    lines = plain(task_picture(task)).splitlines()
    assert sum("5" * 30 in line for line in lines) == 60
    assert sum(line.count("5" * 30) for line in lines) == 120
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [30, 45, 62])
def test_on_a_narrow_terminal_the_output_is_below_and_not_cropped(width):
    text = plain(task_picture(Task("full", (Pair(FULL, FULL),), (Pair(FULL, None),))), width)
    assert text.count("5" * 30) == 90
    assert "↓" in text
    assert "→" not in text


def test_answers_are_shown_where_there_are_any():
    (task,) = load_tasks("arc1:007bbfb7")
    assert [plain(task_picture(t)).count("output 9x9") for t in (task, task.without_answers())] == [
        6,
        5,
    ]


def test_show_prints_the_first_tasks_up_to_the_limit_or_the_named_ones():
    text = shown("training", limit=2)
    assert [task.id in text for task in load_tasks("training", max_tasks=3)] == [True, True, False]
    text = shown("training", ["a85d4709", "007bbfb7"])
    assert [name in text for name in ("a85d4709", "007bbfb7", "00d62c1b")] == [True, True, False]
    with pytest.raises(DataError, match=r"training has no task '007bbfb8'.*are like 007bbfb7"):
        shown("training", ["007bbfb8"])


@pytest.mark.slow
def test_statistics_report_the_overlap():
    text = shown("training", statistics=True)
    assert all(part in text for part in ("of 400", "evaluation", "40853293"))
