"""Every kind of bad input is one sentence that says where it is and what is allowed."""

import gzip
import json
import os

import pytest

from arctrm import system
from arctrm.data.parse import load_json, parse_grid, parse_task
from arctrm.errors import TaskError

GRID = [[1, 2], [3, 4]]
PAIR = {"input": GRID, "output": GRID}


def message(call, *arguments):
    with pytest.raises(TaskError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


BAD_GRIDS = {
    "ragged": ([[1, 2], [3]], ["row 1", "1 cells", "row 0 has 2"]),
    "colour 10": ([[1, 2], [3, 10]], ["row 1 column 1", "0..9", "10"]),
    "negative": ([[1, -1]], ["row 0 column 1", "-1"]),
    "huge": ([[10**400]], ["row 0 column 0", "0..9"]),
    "string": ([[1, "2"]], ["row 0 column 1", '"2"']),
    "float": ([[1, 2.0]], ["row 0 column 1", "2.0"]),
    "boolean": ([[True, 1]], ["row 0 column 0", "true"]),
    "null": ([[1, None]], ["row 0 column 1", "null"]),
    "nested": ([[[1]]], ["row 0 column 0", "[1]"]),
    "no rows": ([], ["an empty grid", "30x30"]),
    "empty row": ([[]], ["an empty grid"]),
    "31 rows": ([[0]] * 31, ["31x1", "30x30"]),
    "31 columns": ([[0] * 31], ["1x31"]),
    "31x31": ([[0] * 31] * 31, ["31x31"]),
    "not a list": ("1 2 3", ["a list of rows", "1 2 3"]),
    "one bad row": ([[1], {"a": 1}], ["a list of rows"]),
}


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_a_bad_grid_is_refused_with_its_place(name):
    grid, expected = BAD_GRIDS[name]
    text = message(parse_grid, grid, "tasks/0a.json: train[1].output")
    assert text.startswith("tasks/0a.json: train[1].output")
    for part in expected:
        assert part in text


def test_a_good_grid_keeps_its_cells_up_to_30x30():
    rows = [[(r * c) % 10 for c in range(30)] for r in range(30)]
    grid = parse_grid(rows, "x")
    assert grid.tolist() == rows
    assert grid.dtype.name == "uint8"


BAD_TASKS = {
    "list": ([PAIR], ["is not an ARC task"]),
    "no train": ({"test": [PAIR]}, ["is not an ARC task", '"test"']),
    "escape as key": ({"\x1b[2J": 1}, ['"\\u001b[2J"']),
    "half a surrogate pair as key": ({"\ud800": 1}, ['"\\ud800"']),
    "train no list": ({"train": PAIR, "test": [PAIR]}, ['"train" must be a list']),
    "no demonstrations": ({"train": [], "test": [PAIR]}, ["train", "at least one"]),
    "no test": ({"train": [PAIR]}, ["test", "at least one"]),
    "no test input": ({"train": [PAIR], "test": []}, ["test", "at least one"]),
    "pair no object": ({"train": [PAIR, 3], "test": [PAIR]}, ["train[1]", "3"]),
    "no input": ({"train": [{"output": GRID}], "test": [PAIR]}, ["train[0]", '"input"']),
    "no output": ({"train": [{"input": GRID}], "test": [PAIR]}, ["train[0]", 'no "output"']),
    "bad test output": (
        {"train": [PAIR], "test": [{"input": GRID, "output": [[11]]}]},
        ["test[0].output row 0 column 0"],
    ),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_bad_task_is_refused_with_its_place(name):
    task, expected = BAD_TASKS[name]
    text = message(parse_task, task, "0a", "tasks/0a.json")
    assert text.startswith("tasks/0a.json: ")
    for part in expected:
        assert part in text


@pytest.mark.parametrize("test", [{"input": GRID}, {"input": GRID, "output": None}])
def test_a_test_output_may_be_missing(test):
    task = parse_task({"train": [PAIR], "test": [test]}, "0a", "x")
    assert task.test[0].output is None
    assert not task.has_answers


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, gzip.compress(b"", mtime=0)]
)
def test_what_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "0a.json"
    path.write_bytes(content)
    text = message(load_json, path)
    assert text.startswith(f"{path}: is not JSON")
    assert "give a JSON file, plain (.json) or gzipped (.json.gz)" in text


def test_gzip_is_known_by_its_content(tmp_path):
    path = tmp_path / "map.json"
    path.write_bytes(gzip.compress(b"{}", mtime=0))
    assert load_json(path) == {}


@pytest.mark.parametrize("packed", [True, False])
def test_more_json_than_the_limit_is_not_read(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(system, "MAX_BYTES", 2**20)
    path = tmp_path / "map.json.gz"
    content = b" " * 2**20 + b"{}"
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert "more than 1 MiB; split" in message(load_json, path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:5] + data])
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    path = tmp_path / "map.json.gz"
    path.write_bytes(damage(gzip.compress(json.dumps({"a": PAIR}).encode())))
    assert message(load_json, path).startswith(f"{path}: cannot be read")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("folder.json", "gone.json", "never.json", "pipe.json"):
        assert "cannot be read" in message(load_json, tmp_path / name)
