"""results.json of `baseline`: interrupted, resumed, never lost, never mixed."""

import json
from dataclasses import replace

import pytest
from baseline_runs import answered, config

from arctrm.errors import CheckpointError, DataError
from arctrm.solving import baseline
from arctrm.solving.baseline import run


def without_times(results: dict) -> dict:
    for record in results["tasks"].values():
        del record["seconds"]
    return {**results, "git_revision": None}  # of this checkout, which may move on


def interrupt_at(monkeypatch, number):
    """Ctrl-C while task `number` (from 0) is answered."""
    answer_task, count = baseline.answer_task, iter(range(100))

    def interrupted(*arguments):
        if next(count) == number:
            raise KeyboardInterrupt
        return answer_task(*arguments)

    monkeypatch.setattr(baseline, "answer_task", interrupted)


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    done, settings, tmp_path, monkeypatch
):
    path = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 6 tasks, which are in"):
            run(settings, path, False)
    assert len(json.loads(path.read_text())["tasks"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)  # four are left
        resumed = answered(settings, path, resume=True)
    full, full_path = done
    assert without_times(resumed) == without_times(json.loads(full_path.read_text()))
    assert list(resumed) == list(full)
    assert (tmp_path / "submission.json").read_bytes() == full_path.with_name(
        "submission.json"
    ).read_bytes()


def test_a_finished_run_may_be_given_more_tasks_and_smaller_batches(settings, trained, tmp_path):
    path = tmp_path / "results.json"
    small = config(trained.folder, checkpoint=settings.checkpoint, evaluation={"max_tasks": 1})
    first = answered(small, path)
    reader = {"batch_size": 2}
    more = answered(
        config(trained.folder, checkpoint=settings.checkpoint, reader=reader), path, resume=True
    )
    assert len(first["tasks"]) == 1
    assert len(more["tasks"]) == len(trained.known)
    assert first["tasks"].items() <= more["tasks"].items()
    assert more["config"]["reader"]["batch_size"] == 2


def test_results_are_not_lost_without_resume(done, settings):
    _, path = done
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"results.json: holds the results of an earlier run"):
        run(settings, path, False)
    with pytest.raises(DataError, match=r"submission.json: is the submission of another run"):
        run(settings, path.with_name("other.json"), False)
    assert path.read_bytes() == before
    assert not path.with_name("other.json").exists()


def test_only_the_same_run_is_resumed(
    done, settings, trained, trained_reader, write_tasks, tmp_path
):
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match="there are no results to resume"):
        run(settings, path, True)
    path.write_bytes(done[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"results.json: views = 3 there, 4 now"):
        run(settings.model_copy(update={"views": 4}), path, True)
    changed = [replace(trained.known[0], demonstrations=trained.known[1].demonstrations)]
    saved = json.loads(path.read_text())
    folder = write_tasks(tmp_path / "tasks", changed)
    saved["config"]["evaluation"]["test_set"] = str(folder)
    path.write_text(json.dumps(saved))
    with pytest.raises(DataError, match="was another one when it was answered"):
        run(config(folder, checkpoint=settings.checkpoint), path, True)


def test_other_weights_do_not_go_on_with_a_run(done, settings, tmp_path):
    path = tmp_path / "results.json"
    saved = json.loads(done[1].read_text())
    saved["model"]["weights"] = "0" * 12
    path.write_text(json.dumps(saved))
    with pytest.raises(DataError, match="was begun with other weights"):
        run(settings, path, True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tasks": {}}', '{"config": {}, "tasks": []}'])
def test_a_damaged_results_file_is_refused(settings, tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match="is not a results file of baseline"):
        run(settings, path, True)
    assert path.read_text() == text
