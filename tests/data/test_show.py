"""`data show`: digits without colours, ARC_PALETTE with them, nothing wider than the terminal."""

import json
import os
import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from arctrm.cli.data import write_printed
from arctrm.console import ARC_PALETTE, console
from arctrm.data import show as data_show
from arctrm.data.render import grid_panel, grid_text, side_by_side, task_table
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import DataError


def plain(renderable, width=80):
    console = Console(width=width, no_color=True, record=True, file=StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.fixture
def shown(monkeypatch):
    """Run `show` and return what it printed."""

    def run(*arguments, **options):
        console = Console(width=100, record=True, file=StringIO())
        monkeypatch.setattr(data_show, "console", lambda: console)
        data_show.show(*arguments, **options)
        return console.export_text()

    return run


def test_without_colours_a_grid_is_its_digits():
    grid = np.array([[0, 1], [8, 9]], np.uint8)
    assert plain(grid_text(grid)).split() == ["0", "1", "8", "9"]
    assert plain(grid_text(grid, wide=False)).split() == ["01", "89"]


def test_every_cell_has_its_colour_of_the_palette():
    text = grid_text(np.arange(10, dtype=np.uint8).reshape(2, 5))
    shades = [span.style.bgcolor.name for span in text.spans]
    assert shades == list(ARC_PALETTE)


def test_a_pair_of_full_grids_fits_on_80_columns():
    grid = np.full((30, 30), 5, np.uint8)
    lines = plain(task_table(Task("full", (Pair(grid, grid),), (Pair(grid, grid),)))).splitlines()
    assert sum("5" * 30 in line for line in lines) == 60
    assert sum(line.count("5" * 30) for line in lines) == 120
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [30, 45, 62])
def test_on_a_narrow_terminal_the_output_is_below_and_not_cropped(width):
    grid = np.full((30, 30), 5, np.uint8)
    text = plain(task_table(Task("full", (Pair(grid, grid),), (Pair(grid, None),))), width)
    assert text.count("5" * 30) == 90
    assert "↓" in text
    assert "→" not in text


def test_side_by_side_goes_on_below_where_there_is_no_room():
    panels = [grid_panel(np.full((2, 10), 1, np.uint8), f"grid {n}") for n in range(6)]
    text = plain(side_by_side(panels))
    assert all(f"grid {n} 2x10" in text for n in range(6))
    assert "grid 5" not in text.splitlines()[0]


def test_predictions_are_shown_as_attempts():
    (task,) = load_tasks("arc1:007bbfb7")
    guess = np.array([[1, 2], [3, 4]], np.uint8)
    text = plain(task_table(task.without_answers(), [[guess, guess]]))
    assert "attempt_1 2x2" in text
    assert "attempt_2 2x2" in text


def test_answers_are_shown_only_where_the_task_has_them():
    (task,) = load_tasks("arc1:007bbfb7")
    with_answer, without = plain(task_table(task)), plain(task_table(task.without_answers()))
    assert with_answer.count("output 9x9") == 6
    assert without.count("output 9x9") == 5


def test_show_prints_the_first_tasks_up_to_the_limit(shown):
    text = shown("training", limit=2)
    assert [task.id in text for task in load_tasks("training", max_tasks=3)] == [True, True, False]


def test_show_prints_the_named_tasks(shown):
    text = shown("training", ["a85d4709", "007bbfb7"])
    assert "a85d4709" in text
    assert "007bbfb7" in text
    assert "00d62c1b" not in text


def test_an_unknown_id_suggests_near_ones(shown):
    with pytest.raises(DataError, match=r"training has no task '007bbfb8'.*near ones are 007bbfb7"):
        shown("training", ["007bbfb8"])


def test_statistics_count_the_canvases_and_report_the_overlap(shown):
    text = shown("training", statistics=True)
    for part in ("1,302", "416", "63.0%", "canvas cells of a pair", "█", "40853293"):
        assert part in text
    histogram = [line.split("│") for line in text.splitlines() if "█" in line]
    assert sum(int(cells[2].replace(",", "")) for cells in histogram) == 1302 + 416


def test_statistics_of_tasks_without_answers(shown, tmp_path):
    pair = {"input": [[1]], "output": [[2]]}
    path = tmp_path / "odd [name].json"
    path.write_text(json.dumps({"train": [pair], "test": [{"input": [[3]]}]}))
    text = shown(str(path), statistics=True)
    assert "odd [name].json" in text
    assert "100.0%" in text


NO_ROOM = """
import resource, sys
from pathlib import Path
from arctrm.cli.data import write_printed
from arctrm.console import console
from arctrm.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_printed(lambda: console().print("1 2 3 " * 100), Path(sys.argv[1]))
except UserError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("older", [None, "older"])
def test_out_without_room_leaves_no_half_written_file(tmp_path, older):
    path = tmp_path / "tasks.txt"
    if older is not None:
        path.write_text(older)
    command = [sys.executable, "-c", NO_ROOM, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr.startswith(f"refused: {tmp_path}: "), run.stderr
    assert "choose another --out" in run.stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ([older] if older else [])


def test_out_writes_into_a_pipe_or_through_a_link_and_does_not_replace_it(tmp_path):
    """The pipe stands for every device: a rename onto /dev/full would succeed as root."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "file")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        write_printed(lambda: console().print("1 2 3"), path)
    assert os.read(reader, 100).split() == [b"1", b"2", b"3"]
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert (tmp_path / "file").read_text().split() == ["1", "2", "3"]
