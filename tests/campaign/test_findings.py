"""What the campaigns have found: each input once crashed, hung, or printed more than a sentence."""

import errno
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from arctrm.cli import LONGEST, describe_error
from arctrm.config import PretrainConfig, SolveConfig, TrackingConfig
from arctrm.config.load import load_config
from arctrm.data.base_set import (
    PAIR_COLUMNS,
    base_set_from_tasks,
    open_base_set,
    write_base_set,
)
from arctrm.data.sources import load_tasks
from arctrm.errors import CheckpointError, ConfigError, DataError, ResourceError, TaskError
from arctrm.model.reference import reference_views
from arctrm.solve.results import open_store, read_candidates
from arctrm.system import hold
from arctrm.train.tracking import Tracker
from helpers import random_task

DIGITS = "9" * 5000
PAIR = {"input": [[1]], "output": [[2]]}
TASK = {"train": [PAIR], "test": [PAIR]}


def sentence(error: BaseException) -> str:
    said, code = describe_error(error)
    assert code == 2, said
    assert said.isprintable()
    assert len(said) <= LONGEST + len("error: ")
    return said


@pytest.mark.parametrize(
    "override",
    [
        *("budget=" + "[" * 3000, "budget=" + "{a=" * 2000, f"budget={DIGITS}"),
        *(f"budget=0x{DIGITS}", "a." * 1000 + "a=1", "x" * 5000 + "=1", "x" * 5000),
        *(
            "inference.\x1b[31mviews=1",
            "\u202e=1",
            "judge=[[[]]]",
            "budget=" + "[" * 300 + "]" * 300,
        ),
    ],
    ids=lambda override: override[:12].replace("\x1b", "ESC"),
)
def test_an_override_of_any_shape_is_refused_in_one_sentence(override):
    with pytest.raises(ConfigError) as caught:
        load_config(SolveConfig, (), [override])
    sentence(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a." * 1000 + "a = 1",
        "a = " + "[" * 3000,
        "a = " + "{b = " * 1000,
        f"seed = {DIGITS}",
        f"seed = 0x{DIGITS}",
    ],
    ids=["key of 1,000 parts", "lists", "tables", "digits", "hexadecimal digits"],
)
def test_a_toml_file_that_is_deep_or_long_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, [tmp_path / "a.toml"])
    sentence(caught.value)


@pytest.mark.parametrize("text", ["true", "[" * 5000, '{"config": {"seed": 1e999}}'])
def test_a_record_that_is_none_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="not such a run's record") as caught:
        load_config(PretrainConfig, record=tmp_path / "config.json")
    sentence(caught.value)


@pytest.mark.parametrize("data", [b"\xb4\n", b"[" * 5000 + b"\n", b'{"step": NaN}\n', b"[]\n"])
def test_metrics_that_are_none_are_refused_in_one_sentence(tmp_path, data):
    (tmp_path / "metrics.jsonl").write_bytes(data)
    with pytest.raises(CheckpointError, match="not metrics") as caught:
        Tracker(tmp_path, TrackingConfig(), {}, resume_step=1).__enter__()
    sentence(caught.value)


def test_identifiers_that_are_deep_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "identifiers.json").write_text("[" * 5000)
    with pytest.raises(CheckpointError, match="nested too deep") as caught:
        reference_views(tmp_path / "step_1", 3)
    sentence(caught.value)


ENTRY = {"grid": [[1]], "q": 0.5, "views": {"trm": [0]}, "reader_scores": [], "inverse_scores": []}
ENTRY |= {"broken": []}
RECORD = {"row": "everything", "task": "a", "content": "", "seconds": 1.0, "test": [[ENTRY]]}
ODD_ENTRIES = [
    *({"grid": [[-1]]}, {"grid": [[1], [2, 3]]}, {"grid": [[1e999]]}, {"grid": 1}, {"q": "x"}),
    *({"views": 3}, {"views": {"trm": [None]}}, {"broken": 0}, {"reader_scores": [1e999]}),
]


@pytest.mark.parametrize("odd", ODD_ENTRIES, ids=str)
def test_odd_grids_among_candidates_and_answers_are_refused(tmp_path, odd):
    candidates, answers = tmp_path / "a.json.gz", tmp_path / "unfinished.jsonl"
    candidates.write_bytes(gzip.compress(json.dumps({"a": [[ENTRY | odd]]}).encode()))
    with pytest.raises(DataError) as caught:
        read_candidates(candidates)
    sentence(caught.value)
    record = RECORD | {"test": [[ENTRY | odd]]}
    head = {"config": {}, "weights": "", "checkpoint": ""}
    answers.write_text(f"{json.dumps(head)}\n{json.dumps(record)}\n")
    with pytest.raises(DataError) as caught:
        open_store(answers, SolveConfig(), [], resume=True)
    sentence(caught.value)


@pytest.mark.parametrize("odd", [{"seconds": -1}, {"test": []}, {"trm_steps": 3}, {"row": None}])
def test_odd_records_of_answers_are_refused(tmp_path, odd):
    path = tmp_path / "unfinished.jsonl"
    path.write_text(f'{{"config": {{}}}}\n{json.dumps(RECORD | odd)}\n')
    (tmp_path / "a.json").write_text(json.dumps(TASK))
    tasks = load_tasks(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match="is not what arctrm keeps of answers") as caught:
        open_store(path, SolveConfig(), tasks, resume=True)
    sentence(caught.value)


def test_damaged_gzip_is_refused_among_candidates(tmp_path):
    data = bytearray(gzip.compress(json.dumps({"a": [[ENTRY]]}).encode()))
    data[20:24] = b"\xff\xff\xff\xff"
    (tmp_path / "a.json.gz").write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_candidates(tmp_path / "a.json.gz")
    sentence(caught.value)


MEASURED = """
import sys
from pathlib import Path
from arctrm.data.sources import load_tasks
from arctrm.errors import TaskError
try:
    load_tasks(sys.argv[1])
except TaskError as error:
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], error)
"""
BOMBS = {
    "lists": b"[],",
    "ones": b"[0],",
    "tables": b"{},",
    "texts": b'"ab",',
    "spaces": b"          ",
    "numbers": b"999,",
}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, id=name, marks=[pytest.mark.slow] * (name != "ones"))
        for name, part in BOMBS.items()
    ],
)
def test_two_megabytes_that_unpack_to_much_take_little_memory(tmp_path, part):
    noise, path = random.Random(0).randbytes(2**20 * 15 // 8).hex(), tmp_path / "a.json.gz"
    content = f'["{noise}",'.encode() + part * (2**20 * 100 // len(part)) + b"0]"
    path.write_bytes(gzip.compress(content, 6))
    assert 1.8e6 < path.stat().st_size < 2.4e6
    done = subprocess.run([sys.executable, "-c", MEASURED, path], capture_output=True, text=True)
    peak, _, said = done.stdout.partition(" ")
    assert int(peak) < 300 * 1024, done.stderr
    assert "split it into several files" in said or not part.strip()


@pytest.mark.parametrize("part", ["[]", "[0]", "{}", '{"": 0}'])
def test_json_of_many_small_parts_is_refused(tmp_path, part):
    (tmp_path / "a.json").write_text(f"[{','.join([part] * 10**6)}]")
    with pytest.raises(TaskError, match="too many small parts"):
        load_tasks(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("column", "value"), [("in_offset", 10**6), ("in_height", 31), ("out_width", 0), ("task", 9)]
)
def test_a_base_set_whose_pairs_lie_outside_of_it_is_refused(tmp_path, column, value):
    base = base_set_from_tasks({"a": [random_task(np.random.default_rng(0))]}, None, 0)
    base.pairs[0, PAIR_COLUMNS.index(column)] = value
    content = base.cells.tobytes() + base.pairs.tobytes() + b"task"
    meta = base.meta.model_copy(update={"fingerprint": hashlib.sha256(content).hexdigest()})
    write_base_set(replace(base, meta=meta), tmp_path / "set")
    with pytest.raises(DataError, match="outside of its cells or tasks") as caught:
        open_base_set(tmp_path / "set")
    sentence(caught.value)


def test_a_disk_that_has_no_room_for_a_lock_is_told_in_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceError, match="out: the disk is full"):
        hold(tmp_path / "out")
