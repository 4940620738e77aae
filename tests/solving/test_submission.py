"""The submission file: round trip, completeness, atomic writing, sentences for bad files."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import DataError, ResourceError, TaskError
from arctrm.solving.submission import check_complete, read_submission, submission, write_submission

A, B = np.array([[1, 2, 3]], np.uint8), np.array([[0], [9]], np.uint8)


def task(task_id: str, num_test: int) -> Task:
    return Task(task_id, (Pair(A, B),), tuple(Pair(A) for _ in range(num_test)))


def test_a_submission_survives_the_round_trip(tmp_path):
    predictions = {"b": [(A, B), (B, B)], "a": [(np.full((30, 30), 9, np.uint8), A)]}
    path = tmp_path / "new folder" / "submission.json"
    write_submission(path, submission(predictions))
    back = read_submission(path)
    assert list(back) == ["a", "b"]
    for task_id, per_input in predictions.items():
        assert len(back[task_id]) == len(per_input)
        for written, read in zip(per_input, back[task_id], strict=True):
            for before, after in zip(written, read, strict=True):
                assert after.dtype == np.uint8
                np.testing.assert_array_equal(before, after)


def test_the_file_has_the_form_that_kaggle_reads(tmp_path):
    write_submission(tmp_path / "s.json", submission({"a": [(A, B)]}))
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text) == {"a": [{"attempt_1": [[1, 2, 3]], "attempt_2": [[0], [9]]}]}


def test_a_submission_for_every_bundled_evaluation_task_is_complete():
    tasks = load_tasks("evaluation")
    content = submission({t.id: [(p.input, p.input) for p in t.test] for t in tasks})
    check_complete(content, tasks)
    assert sum(map(len, content.values())) == 419


@pytest.mark.parametrize("entries", [[], [(A, B)], [(A, B)] * 3])
def test_an_unanswered_test_input_is_refused_by_the_name_of_its_task(entries):
    content = submission({"whole": [(A, B)], "partly": entries})
    with pytest.raises(DataError, match=r"task partly has 2 test inputs"):
        check_complete(content, [task("whole", 1), task("partly", 2)])


def test_a_missing_task_or_an_empty_attempt_is_refused():
    with pytest.raises(DataError, match="task gone has 1 test inputs"):
        check_complete({}, [task("gone", 1)])
    with pytest.raises(DataError, match="task half"):
        check_complete({"half": [{"attempt_1": [[1]], "attempt_2": []}]}, [task("half", 1)])


def test_a_full_disk_leaves_the_older_submission_and_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "submission.json"
    write_submission(path, submission({"a": [(A, B)]}))
    before = path.read_bytes()

    def full_disk(self: Path, *args, **kwargs) -> int:
        with self.open("wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(ResourceError, match=r"submission\.json: cannot be written \(No space left"):
        write_submission(path, submission({"a": [(B, B)]}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_older_submission_is_replaced(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        told = lambda *args, name=name, real=real: (done.append(name), real(*args))
        monkeypatch.setattr(os, name, told)
    write_submission(tmp_path / "submission.json", submission({"a": [(A, B)]}))
    assert done == ["fsync", "replace", "fsync"]  # the file, and then the folder that names it


def test_who_is_reading_the_older_submission_still_reads_it_whole(tmp_path):
    path = tmp_path / "submission.json"
    write_submission(path, submission({"a": [(A, B)]}))
    before = path.read_text()
    with path.open() as reader:
        write_submission(path, submission({"a": [(B, B)]}))
        assert reader.read() == before != path.read_text()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="choose another --out"):
        write_submission(tmp_path / "file" / "submission.json", {})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[]", DataError, "is not a submission"),
        ('{"a": {}}', DataError, "a: expected a list with one entry per test input"),
        ('{"a": [{"attempt_1": [[1]]}]}', DataError, r"a\[0\]: expected an object with"),
        ('{"a": [{"attempt_1": [[1]], "attempt_2": [[]]}]}', TaskError, r"a\[0\]\.attempt_2"),
        ('{"a": [{"attempt_1": [[1]], "attempt_2": [[10]]}]}', TaskError, r"a\[0\]\.attempt_2"),
        ('{"a"', TaskError, "not JSON"),
    ],
)
def test_a_bad_submission_is_refused_with_its_place(tmp_path, text, error, message):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_submission(path)
