"""`eval` answers every test input with one checkpoint; only scoring reads the answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from accelerate import Accelerator
from rich.console import Console

from arctrm.config import EvalConfig
from arctrm.data.task import Pair
from arctrm.errors import CheckpointError, DataError, UserError
from arctrm.solving import scoring
from arctrm.solving.answering import Workers, answer_all, ask, rank
from arctrm.solving.evaluate import describe, load, run
from arctrm.solving.submission import check_complete, read_submission
from arctrm.solving.vote import attempts
from arctrm.solving.weights import load_solver


def config(checkpoint, test_set, views=4, seed=0, **evaluation) -> EvalConfig:
    return EvalConfig.model_validate(
        {
            "seed": seed,
            "checkpoint": checkpoint,
            "evaluation": {"test_set": str(test_set), **evaluation},
            "inference": {
                "views": views,
                "steps": 2,
                "tokens_per_batch": 4096,
                "dtype": "float32",
            },
        }
    )


def read(out):
    return {
        name: json.loads((out / name).read_text())
        for name in ("scores.json", "submission.json", "config.json")
    }


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """One evaluation of the known tasks: scores, and the folder it wrote."""
    out = tmp_path_factory.mktemp("eval") / "not" / "there"
    return run(config(trained.run, trained.folder), out), out


# -- what is written


def test_the_scores_are_written_by_name_with_what_they_belong_to(evaluated, trained):
    scores, out = evaluated
    written = read(out)["scores.json"]
    for name in ("task_fraction", "pair_fraction", "whole_task"):
        assert list(written[name]) == ["pass@1", "pass@2", "pass@10"]
        assert written[name]["pass@2"] == getattr(scores, name)[2]
    assert written["checkpoint"].startswith(str(trained.run))
    assert (written["views"], written["steps"], written["seed"]) == (4, 2, 0)
    assert written["blank_task_embedding"] is False
    assert written["seconds_per_task"] > 0
    assert set(written["tasks"]) == {task.id for task in trained.known}


def test_the_submission_answers_every_test_input_with_two_grids(evaluated, trained):
    _, out = evaluated
    check_complete(read(out)["submission.json"], trained.known)
    for grids in read_submission(out / "submission.json").values():
        assert all(len(pair) == 2 for pair in grids)


def test_the_run_is_recorded_beside_its_scores(evaluated, trained):
    _, out = evaluated
    record = read(out)["config.json"]
    assert record["config"]["checkpoint"] == str(trained.run)
    assert record["git_revision"]
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "scores.json",
        "submission.json",
    ]


def test_the_scores_are_those_of_the_submission(evaluated, trained):
    scores, out = evaluated
    submitted = read_submission(out / "submission.json")
    solved = [
        any(scoring.is_right(grid, pair.output) for grid in grids)
        for task in trained.known
        for pair, grids in zip(task.test, submitted[task.id], strict=True)
    ]
    assert scores.pair_fraction[2] == pytest.approx(np.mean(solved))


def test_a_test_input_that_nothing_answers_is_scored_as_it_is_submitted(
    trained, tmp_path, write_tasks, monkeypatch
):
    """By its own input, which is the answer of one task and of the right size in all."""
    same = [
        replace(task, test=tuple(replace(pair, output=pair.input) for pair in task.test))
        for task in trained.known[:1]
    ]
    tasks = same + [t for t in trained.known[1:] if t.test[0].input.shape == t.test[0].output.shape]
    folder = write_tasks(tmp_path / "tasks", tasks)
    monkeypatch.setattr("arctrm.solving.pool.answer", lambda *_: [])
    scores = run(config(trained.run, folder), tmp_path / "out")
    submitted = read_submission(tmp_path / "out" / "submission.json")
    for task, row in zip(tasks, sorted(scores.tasks, key=lambda r: r.id), strict=True):
        verdicts = scoring.judge(submitted[task.id], [pair.output for pair in task.test])
        assert row.solved == sum(map(any, verdicts))
    assert (scores.task_fraction[1], scores.task_fraction[10]) == (1 / len(tasks),) * 2
    assert scores.shape_accuracy == 1


def test_a_model_that_is_right_scores_one(trained, tmp_path, monkeypatch):
    """The whole path from candidates to scores.json, with the candidates made right."""
    from arctrm.solving import pool
    from arctrm.solving.vote import Candidate

    truth = {(t.id, i): p.output for t in trained.known for i, p in enumerate(t.test)}

    def right(solver, queries, inference, advance, guides):
        return [(query.key, Candidate(truth[query.key], 0.0)) for query in queries]

    monkeypatch.setattr(pool, "answer", right)
    scores = run(config(trained.run, trained.folder), tmp_path)
    assert scores.task_fraction == {1: 1.0, 2: 1.0, 10: 1.0}
    assert scores.whole_task[2] == scores.pair_fraction[2] == 1.0


def test_the_same_seed_writes_the_same_submission(evaluated, trained, tmp_path):
    _, out = evaluated
    for name, seed in (("same", 0), ("other", 5)):
        run(config(trained.run, trained.folder, seed=seed), tmp_path / name)
    submissions = [read(folder)["submission.json"] for folder in (out, tmp_path / "same")]
    assert submissions[0] == submissions[1]
    assert read(tmp_path / "other")["submission.json"] != submissions[0]


# -- answers stay apart


def test_loaded_tasks_carry_no_answers(trained):
    tasks, known = load(config(trained.run, trained.folder))
    assert [task.id for task in tasks] == [task.id for task in trained.known]
    assert all(pair.output is None for task in tasks for pair in task.test)
    for task in trained.known:
        for answer, pair in zip(known[task.id], task.test, strict=True):
            assert np.array_equal(answer, pair.output)


def test_test_outputs_change_the_scores_and_nothing_else(evaluated, trained, tmp_path, write_tasks):
    """Make attempt_1 the answer of every task: the submission stays, the score becomes 1."""
    scores, out = evaluated
    submitted = read_submission(out / "submission.json")
    assert scores.task_fraction[1] < 1
    tampered = [
        replace(
            task,
            test=tuple(
                Pair(pair.input, grids[0])
                for pair, grids in zip(task.test, submitted[task.id], strict=True)
            ),
        )
        for task in trained.known
    ]
    folder = write_tasks(tmp_path / "tampered", tampered)
    again = run(config(trained.run, folder), tmp_path / "out")
    assert (tmp_path / "out/submission.json").read_bytes() == (out / "submission.json").read_bytes()
    assert again.task_fraction[1] == 1


def test_test_outputs_change_no_candidate(trained):
    """Even if answers were left in the tasks, nothing on the way to the candidates reads them."""
    settings = config(trained.run, trained.folder)
    workers = Workers(Accelerator())
    solver = load_solver(trained.run, settings.inference, workers.accelerator.device)
    tasks = [*trained.known, *trained.others]
    found = [
        answer_all(solver, ask(solver, version, settings, workers), settings, workers)
        for version in (tasks, [task.without_answers() for task in tasks])
    ]
    assert found[0].keys() == found[1].keys()
    for key, candidates in found[0].items():
        assert len(candidates) == len(found[1][key]) == 4
        for a, b in zip(candidates, found[1][key], strict=True):
            assert a.q == b.q
            assert (a.grid is None) == (b.grid is None)
            assert a.grid is None or np.array_equal(a.grid, b.grid)


# -- which tasks


def test_tasks_can_be_chosen_and_bounded(trained):
    ids = [task.id for task in trained.known]
    tasks, known = load(config(trained.run, trained.folder, tasks=[ids[4], ids[1]]))
    assert [task.id for task in tasks] == [ids[1], ids[4]] == list(known)
    tasks, known = load(config(trained.run, trained.folder, max_tasks=2))
    assert [task.id for task in tasks] == ids[:2] == list(known)


def test_an_unknown_task_id_is_refused_before_anything_runs(trained, tmp_path):
    settings = config(trained.run, trained.folder, tasks=["ffffffff"])
    with pytest.raises(DataError, match=r"evaluation\.tasks names 'ffffffff'"):
        run(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_kaggle_file_without_answers_is_answered_and_not_scored(
    trained, write_kaggle, tmp_path, capsys
):
    challenges, _ = write_kaggle(tmp_path / "kaggle", trained.known)
    assert run(config(trained.run, challenges), tmp_path / "out") is None
    content = json.loads((tmp_path / "out/submission.json").read_text())
    check_complete(content, trained.known)
    assert not (tmp_path / "out/scores.json").exists()
    assert "nothing is scored" in " ".join(capsys.readouterr().err.split())


def test_a_solutions_file_scores_a_kaggle_file(evaluated, trained, write_kaggle, tmp_path):
    challenges, solutions = write_kaggle(tmp_path / "kaggle", trained.known)
    settings = config(trained.run, challenges, solutions=str(solutions))
    scores = run(settings, tmp_path / "out")
    assert scores == evaluated[0]
    assert (tmp_path / "out/submission.json").read_bytes() == (
        evaluated[1] / "submission.json"
    ).read_bytes()


def test_a_solutions_file_that_is_not_there_is_refused(trained, write_kaggle, tmp_path):
    challenges, _ = write_kaggle(tmp_path / "kaggle", trained.known)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        run(config(trained.run, challenges, solutions="nowhere.json"), tmp_path / "out")


def test_unknown_tasks_are_answered_from_the_mean_and_said_to_be(
    trained, write_tasks, tmp_path, capsys
):
    folder = write_tasks(tmp_path / "others", [trained.known[0], *trained.others])
    run(config(trained.run, folder), tmp_path / "out")
    check_complete(
        json.loads((tmp_path / "out/submission.json").read_text()),
        [trained.known[0], *trained.others],
    )
    assert "3 of 4 tasks are not in the id map" in " ".join(capsys.readouterr().err.split())


# -- other checkpoints


def test_per_view_models_answer_known_tasks_and_fall_back_for_others(
    trained, trained_per_view, write_tasks, tmp_path
):
    tasks = [trained.known[0], *trained.others]
    folder = write_tasks(tmp_path / "mixed", tasks)
    settings = config(trained_per_view, folder, views=100)
    workers = Workers(Accelerator())
    solver = load_solver(trained_per_view, settings.inference, workers.accelerator.device)
    found = answer_all(solver, ask(solver, tasks, settings, workers), settings, workers)
    assert {key: len(candidates) for key, candidates in found.items()} == {(tasks[0].id, 0): 8}
    run(settings, tmp_path / "out")
    submitted = read_submission(tmp_path / "out/submission.json")
    for task in trained.others:
        for pair, grids in zip(task.test, submitted[task.id], strict=True):
            assert all(np.array_equal(grid, pair.input) for grid in grids)


def test_a_reference_file_answers(reference_file, small_tasks, write_tasks, tmp_path):
    tasks = [replace(small_tasks[0], id="00576224"), small_tasks[1]]
    folder = write_tasks(tmp_path / "tasks", tasks)
    scores = run(config(reference_file, folder, views=3), tmp_path / "out")
    assert scores.num_tasks == 2
    check_complete(json.loads((tmp_path / "out/submission.json").read_text()), tasks)


def test_a_checkpoint_that_cannot_be_used_leaves_nothing_behind(trained, tmp_path):
    with pytest.raises(CheckpointError):
        run(config(tmp_path / "nowhere", trained.folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path, monkeypatch):
    from arctrm.solving import parts

    monkeypatch.setattr(parts, "ask", lambda *given: pytest.fail("work was done"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out"):
        run(config(trained.run, trained.folder), tmp_path / "out")


# -- votes, dry run


def test_every_test_input_is_ranked_even_without_candidates(trained):
    tasks = trained.others
    ranked = rank(tasks, {}, seed=0)
    assert set(ranked) == {(task.id, i) for task in tasks for i in range(len(task.test))}
    fallback = tasks[0].test[0].input
    assert attempts(ranked[tasks[0].id, 0], fallback) == (fallback, fallback)


def test_a_dry_run_counts_and_answers_nothing(trained, monkeypatch, tmp_path):
    from arctrm.solving import pool

    monkeypatch.setattr(pool, "answer", lambda *given: pytest.fail("a query was answered"))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(config(trained.run, trained.folder, views=7), tmp_path))
    text = console.export_text()
    assert "6, 6" in text
    assert "42 (7 views)" in text


def test_the_folder_of_a_training_run_is_not_written_to(trained, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("the run's record")
    with pytest.raises(DataError, match="training run"):
        run(EvalConfig.model_validate({"checkpoint": str(trained.run)}), folder)
    assert (folder / "config.json").read_text() == "the run's record"


def test_an_older_score_does_not_stay_beside_a_new_submission(trained, tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    unknown = tmp_path / "tasks"
    unknown.mkdir()
    grid = {"input": [[1]], "output": [[2]]}
    (unknown / "a.json").write_text(json.dumps({"train": [grid], "test": [{"input": [[1]]}]}))
    inference = {"views": 1, "steps": 1}
    evaluation = {"test_set": str(unknown)}
    given = {"checkpoint": str(trained.run), "evaluation": evaluation, "inference": inference}
    assert run(EvalConfig.model_validate(given), tmp_path) is None
    assert (tmp_path / "submission.json").exists()
    assert not (tmp_path / "scores.json").exists()


def test_a_task_without_a_test_input_is_refused(tmp_path):
    pairs = [{"input": [[1]], "output": [[2]]}] * 2
    (tmp_path / "map.json").write_text(json.dumps({"a": pairs}))
    with pytest.raises(UserError, match="task a has no test input"):
        load(EvalConfig.model_validate({"evaluation": {"test_set": str(tmp_path / "map.json")}}))
