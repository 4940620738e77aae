"""The base set: content round trip, the split rule, strict opening, atomic writing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from arctrm.data.base_set import (
    PAIR_COLUMNS,
    base_set_from_tasks,
    open_base_set,
    write_base_set,
)
from arctrm.data.task import Pair, Task
from arctrm.errors import DataError
from helpers import grid

ONE = Pair(grid([1, 2]), grid([3]))
TWO = Pair(grid([4], [5]), grid([6, 6]))
THREE = Pair(grid([7]), grid([8]))
OPEN = Pair(grid([9]))


def same(pair, other):
    return np.array_equal(pair.input, other.input) and np.array_equal(pair.output, other.output)


def pairs_of(base, **wanted):
    rows = [dict(zip(PAIR_COLUMNS, row, strict=True)) for row in base.pairs.tolist()]
    return [
        base.pair(index)
        for index, row in enumerate(rows)
        if all(row[column] == value for column, value in wanted.items())
    ]


def test_pairs_come_back_as_they_went_in():
    base = base_set_from_tasks({"s": [Task("a", (ONE, TWO), (THREE,))]}, None, 0)
    assert base.pairs.dtype == np.int32
    assert base.cells.dtype == np.uint8
    assert all(map(same, [base.pair(index) for index in range(3)], (ONE, TWO, THREE)))
    assert base.pairs[:, PAIR_COLUMNS.index("is_test")].tolist() == [0, 0, 1]
    assert base.meta.counts == {"s": {"tasks": 1, "demonstrations": 2, "test_pairs": 1}}


def test_a_test_set_task_gives_no_test_pair_whatever_subset_it_comes_from():
    task = Task("a", (ONE,), (TWO,))
    base = base_set_from_tasks({"eval": [task], "train": [task, Task("b", (THREE,))]}, "eval", 0)
    assert base.meta.task_ids == ("a", "b")
    assert base.meta.in_test_set == (True, False)
    assert all(map(same, pairs_of(base, task=0), (ONE,)))
    assert base.num_pairs == 2


def test_tasks_of_one_id_are_one_task_with_each_pair_once():
    tasks = {"s": [Task("a", (ONE,), (THREE, OPEN))], "more": [Task("a", (TWO, ONE, THREE))]}
    base = base_set_from_tasks(tasks, None, 0)
    assert base.num_tasks == 1
    assert all(map(same, pairs_of(base, subset=0), (ONE, THREE)))
    assert all(map(same, pairs_of(base, subset=1), (TWO,)))


def test_the_fingerprint_is_stable_and_sees_every_cell_and_id():
    def fingerprint(pair=ONE, task_id="a"):
        return base_set_from_tasks({"s": [Task(task_id, (pair,))]}, None, 0).meta.fingerprint

    changed = Pair(grid([1, 3]), grid([3]))
    turned = Pair(grid([1], [2]), grid([3]))
    assert fingerprint() == fingerprint(Pair(ONE.input.copy(), ONE.output.copy()))
    assert (
        len({fingerprint(), fingerprint(changed), fingerprint(turned), fingerprint(ONE, "b")}) == 4
    )


@pytest.fixture
def base():
    return base_set_from_tasks({"s": [Task("a", (ONE, TWO), (THREE,))]}, None, 7, {"seed": [1]})


def test_a_written_set_opens_equal(base, tmp_path):
    write_base_set(base, tmp_path / "deep" / "set")
    opened = open_base_set(tmp_path / "deep" / "set")
    assert opened.meta == base.meta
    assert np.array_equal(opened.cells, base.cells)
    assert np.array_equal(opened.pairs, base.pairs)
    assert all(map(same, [opened.pair(index) for index in range(3)], (ONE, TWO, THREE)))
    assert [(task, label) for task, label, _ in opened.labelled_pairs()] == [("a", "s")] * 3


def test_an_older_set_is_replaced_and_nothing_is_left_beside_it(base, tmp_path):
    path = tmp_path / "set"
    write_base_set(base_set_from_tasks({"s": [Task("old", (ONE,))]}, None, 0), path)
    write_base_set(base, path)
    assert open_base_set(path).meta.task_ids == ("a",)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_a_built_set_is_never_replaced(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    write_base_set(base, tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("mine")
    for name in ("file", "folder", "set"):
        with pytest.raises(DataError, match="choose another folder"):
            write_base_set(base, tmp_path / name)
    for name in ("file", "folder/notes.txt", "set/notes.txt"):
        assert (tmp_path / name).read_text() == "mine"


LIMITED = """
import os, resource, signal, sys
from pathlib import Path
from arctrm.data.base_set import base_set_from_tasks, write_base_set
from arctrm.data.sources import load_tasks
from arctrm.errors import UserError
from helpers import grid
base = base_set_from_tasks({"training": load_tasks("training", max_tasks=100)}, None, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if sys.argv[2] == "refused":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
else:  # the process is killed in the middle of writing
    signal.signal(signal.SIGXFSZ, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
try:
    write_base_set(base, Path(sys.argv[1]))
except UserError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["refused", "killed"])
@pytest.mark.parametrize("older", [True, False])
def test_a_write_that_ends_halfway_leaves_the_older_set_or_nothing(base, tmp_path, end, older):
    path = tmp_path / "set"
    if older:
        write_base_set(base, path)
    command = [sys.executable, "-c", LIMITED, str(path), end]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if end == "refused":
        assert run.stderr.startswith("refused: "), run.stderr
    else:
        assert run.returncode == -9, run.stderr
    if older:
        assert open_base_set(path).meta == base.meta
    else:
        assert not (path / "base.safetensors").exists()
    write_base_set(base, path)
    assert [file.name for file in path.iterdir()] == ["base.safetensors"]


def rewrite(path, meta=None, **arrays):
    with safe_open(path, "np") as file:
        known = {name: file.get_tensor(name) for name in ("cells", "pairs")}
        stored = json.loads(file.metadata()["meta"])
    path.write_bytes(save(known | arrays, {"meta": json.dumps(stored | (meta or {}))}))


DAMAGE = {
    "short": (lambda path: os.truncate(path, 300), "not a readable data set"),
    "empty": (lambda path: os.truncate(path, 0), "not a readable data set"),
    "no meta": (
        lambda path: path.write_bytes(save({"cells": np.zeros(1)})),
        "not a readable data set",
    ),
    "no file": (lambda path: path.unlink(), "holds no built data set"),
    "version": (lambda path: rewrite(path, {"version": 99}), "not a readable data set.*version"),
    "a key": (lambda path: rewrite(path, {"more": 1}), "not a readable data set"),
    "content": (
        lambda path: rewrite(path, cells=np.zeros(11, np.uint8)),
        "not the ones it was written with",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_set_is_refused_in_one_sentence(base, tmp_path, name):
    damage, expected = DAMAGE[name]
    write_base_set(base, tmp_path / "set")
    damage(tmp_path / "set" / "base.safetensors")
    with pytest.raises(DataError, match=expected) as caught:
        open_base_set(tmp_path / "set")
    assert "\n" not in str(caught.value)
