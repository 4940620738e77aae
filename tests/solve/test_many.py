"""`solve` over many tasks: every task is answered into one submission, whatever happens."""

import json

import numpy as np
import pytest

from arctrm.config import SolveConfig
from arctrm.errors import TaskError
from arctrm.solve import solve as room
from arctrm.solve.many import solve
from arctrm.solve.results import read_submission


def quick(trained, out=None, **top) -> SolveConfig:
    """Each task ends soon by itself."""
    tables = {"inference": {"views": 3, "dtype": "float32"}, "judge": {"scoring_views": 2}}
    tables["adaptation"] = {"max_steps": 1, "tokens_per_batch": 256}
    given = {"budget": 0.2, "checkpoint": trained.run, "out": out, **tables, **top}
    return SolveConfig.model_validate(given)


def watched(monkeypatch, failing=None, error=None):
    """The tasks that `answer_first` sees; it raises at the task `failing`."""
    seen, original = [], room.answer_first

    def recorded(answers):
        seen.append(answers.session.task)
        if answers.session.task.id == failing:
            raise error
        return original(answers)

    monkeypatch.setattr(room, "answer_first", recorded)
    return seen


def test_a_folder_is_answered_into_one_submission_and_no_answer_is_handed_on(
    trained, write_tasks, tmp_path, capsys, monkeypatch
):
    seen = watched(monkeypatch)
    tasks = [trained.known[0], *trained.others[:2]]
    folder = write_tasks(tmp_path / "tasks", tasks)
    solve(quick(trained, tmp_path / "out"), str(folder), check=True)
    submitted = read_submission(tmp_path / "out/submission.json")
    assert {name: len(own) for name, own in submitted.items()} == {t.id: len(t.test) for t in tasks}
    said = " ".join(capsys.readouterr().out.split())
    assert f"of {sum(len(t.test) for t in tasks)} test inputs with a known answer solved" in said
    assert {task.id for task in seen} == set(submitted)
    assert all(pair.output is None for task in seen for pair in task.test)


def test_an_interrupt_keeps_what_was_answered(trained, write_tasks, tmp_path, monkeypatch):
    watched(monkeypatch, trained.others[1].id, KeyboardInterrupt)
    folder = write_tasks(tmp_path / "tasks", trained.others)
    with pytest.raises(KeyboardInterrupt):
        solve(quick(trained, tmp_path / "out"), str(folder))
    assert list(read_submission(tmp_path / "out/submission.json")) == [trained.others[0].id]


def test_a_task_that_fails_is_answered_by_its_inputs_and_the_others_go_on(
    trained, write_tasks, tmp_path, monkeypatch, capsys
):
    watched(monkeypatch, trained.others[0].id, IndexError("out of range"))
    folder = write_tasks(tmp_path / "tasks", trained.others[:2])
    with pytest.raises(IndexError):
        solve(quick(trained, tmp_path / "first"), str(folder))
    solve(quick(trained, tmp_path / "out", keep_going=True), str(folder))
    submitted = read_submission(tmp_path / "out/submission.json")
    assert list(submitted) == [task.id for task in trained.others[:2]]
    for pair, grids in zip(trained.others[0].test, submitted[trained.others[0].id], strict=True):
        assert all(np.array_equal(grid, pair.input) for grid in grids)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{trained.others[0].id}: failed (IndexError: out of range)" in said


def test_a_bad_task_ends_the_run_before_anything_is_written(trained, write_tasks, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks", trained.others[:1])
    (folder / "bad.json").write_text('{"train": [], "test": []}')
    with pytest.raises(TaskError, match=r"bad\.json"):
        solve(quick(trained, tmp_path / "out"), str(folder))
    assert not (tmp_path / "out").exists()
    solve(quick(trained, tmp_path / "out", keep_going=True), str(folder))
    assert list(read_submission(tmp_path / "out/submission.json")) == [trained.others[0].id]
    assert "bad.json" in "".join(capsys.readouterr().err.split())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(trained, tmp_path, capsys):
    solve(quick(trained, tmp_path / "out"), str(trained.folder), dry_run=True)
    assert "reader and trm" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_for_scripts_stdout_has_a_line_of_json_for_each_task(trained, capsys):
    solve(quick(trained), str(trained.folder), json=True, check=True, verbose=True)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["task"] for line in lines] == [task.id for task in trained.known]
    assert all("right" in answer for line in lines for answer in line["answers"])
    assert "test inputs with a known answer solved" in err
    solve(quick(trained), str(trained.folder), json=True, dry_run=True)
    assert capsys.readouterr().out == ""
