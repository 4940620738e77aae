"""`eval` answers every test input with one set of weights; only scoring reads the answers."""

import json
from dataclasses import replace

import pytest

from arctrm.config import EvalConfig
from arctrm.data.task import Pair
from arctrm.errors import CheckpointError, ConfigError, DataError, UserError
from arctrm.solve import evaluate as module
from arctrm.solve.evaluate import evaluate
from arctrm.solve.results import (
    CANDIDATES,
    SUBMISSION,
    UNFINISHED,
    read_candidates,
    read_submission,
)
from helpers import as_json, write_tasks
from hub_models import hub_solver

VIEWS, TRM_VIEWS = 3, 2
ABLATIONS = ["no-reader", "no-trm", "no-coupling"]


def config(checkpoint, test_set, out, **more) -> EvalConfig:
    evaluation = {"test_set": str(test_set), "keep_candidates": True}
    return EvalConfig.model_validate(
        {
            "checkpoint": checkpoint,
            "out": out,
            "evaluation": evaluation | more.pop("evaluation", {}),
            "inference": {"views": VIEWS, "trm_views": TRM_VIEWS, "dtype": "float32"},
            "judge": {"scoring_views": 2} | more.pop("judge", {}),
            **more,
        }
    )


@pytest.fixture(scope="module")
def settings(trained, tmp_path_factory):
    """Everything, and every ablation."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return config(trained.run, trained.folder, out, evaluation={"ablate": ABLATIONS})


@pytest.fixture(scope="module")
def scores(settings):
    return evaluate(settings)


def read(out, name):
    return json.loads((out / name).read_text())


def elsewhere(settings, out, **evaluation):
    own = settings.evaluation.model_copy(update=evaluation)
    return settings.model_copy(update={"out": out, "evaluation": own})


# -- what is written


def test_scores_submission_and_record_are_written(settings, scores, trained):
    told = read(settings.out, "scores.json")
    assert told["task_fraction"]["pass@2"] == scores.task_fraction[2]
    assert told["num_tasks"] == len(trained.known)
    assert told["voices"] == ["reader", "trm"]
    assert (told["views"], told["steps"], told["seed"]) == (VIEWS, 3, 0)
    assert 1 <= told["avg_trm_steps"] <= 3
    assert told["judge"]["scoring_views"] == 2
    assert told["seconds_per_task"] > 0
    assert read(settings.out, "config.json")["config"]["inference"]["views"] == VIEWS
    submitted = read_submission(settings.out / "submission.json")
    assert {name: len(own) for name, own in submitted.items()} == {
        task.id: len(task.test) for task in trained.known
    }
    assert not (settings.out / UNFINISHED).exists()


def test_the_submission_is_what_is_scored(settings, scores, trained, tmp_path):
    again = config(None, trained.folder, tmp_path, evaluation={"keep_candidates": False})
    for given in (settings.out, settings.out / "submission.json"):
        out = tmp_path / given.name
        late = evaluate(again.model_copy(update={"submission": given, "out": out}))
        for k in (1, 2):
            assert late.task_fraction[k] == scores.task_fraction[k]
        assert late.cell_accuracy == scores.cell_accuracy
    told = read(out, "scores.json")
    assert set(told["task_fraction"]) == {"pass@1", "pass@2"}


def test_a_page_shows_every_task_and_what_the_folder_has(settings, scores, trained, tmp_path):
    told = []
    for name, given in (("whole", settings.out), ("bare", settings.out / "submission.json")):
        if name == "bare":  # and one task is not answered
            answered = json.loads(given.read_text(encoding="utf-8"))
            answered.pop(trained.known[0].id)
            given = tmp_path / "alone.json"
            given.write_text(json.dumps(answered), encoding="utf-8")
        page = tmp_path / "pages" / f"{name}.html"
        again = config(None, trained.folder, tmp_path / name)
        evaluate(again.model_copy(update={"submission": given}), report=page)
        told.append(page.read_text(encoding="utf-8"))
    for html in told:
        assert all(f'id="{task.id}"' in html for task in trained.known)
    whole, bare = told
    assert all(f"<td>{row}</td>" in whole and f"<td>{row}</td>" not in bare for row in ABLATIONS)
    assert "by votes" in whole
    assert "by votes," not in bare


def test_both_voices_propose_and_every_row_leaves_out_what_it_says(settings, scores):
    rows = read(settings.out, "ablations.json")
    assert list(rows) == ["everything", *ABLATIONS]
    assert rows["everything"]["task_fraction"] == read(settings.out, "scores.json")["task_fraction"]
    kept = read_candidates(settings.out / CANDIDATES)
    sources = {
        source for inputs in kept.values() for own in inputs for r in own for source in r.votes_by
    }
    assert sources == {"reader", "trm", "joint"}
    for own in (own for inputs in kept.values() for own in inputs):
        wrote, refined, alone = (
            [view for one in own for view in one.views_by.get(name, ())]
            for name in ("reader", "joint", "trm")
        )
        first = [view for view in wrote if view < TRM_VIEWS]
        assert sorted(first) == sorted(refined)  # each draft of TRM's views is refined
        assert sorted(alone) == [*range(TRM_VIEWS)]
        assert sum(one.votes for one in own) == len(wrote) + TRM_VIEWS


@pytest.mark.parametrize(
    ("row", "expected"),
    [("no-reader", {"trm"}), ("no-trm", {"reader"}), ("no-coupling", {"reader", "trm"})],
)
def test_an_ablation_asks_only_who_is_left(settings, tmp_path, monkeypatch, row, expected):
    found, judges = {}, {}
    real = module.rank

    def spied(solver, tasks, candidates, config, judge):
        sources = {one.source for own in candidates.values() for one in own}
        name = ["everything", row][len(found)]
        found[name], judges[name] = sources, judge
        return real(solver, tasks, candidates, config, judge)

    monkeypatch.setattr(module, "rank", spied)
    few = elsewhere(settings, tmp_path / "out", ablate=(row,), max_tasks=1)
    evaluate(few)
    assert found["everything"] == {"reader", "trm", "joint"}
    assert found[row] == expected
    assert (judges[row] is None) == (row == "no-reader")


def test_in_another_context_trm_hears_what_is_read_of_the_next_task(
    settings, trained, tmp_path, monkeypatch, hub_model
):
    other = elsewhere(settings, tmp_path / "out", ablate=("other-context",), max_tasks=2)
    with pytest.raises(ConfigError, match="needs a checkpoint with a hub model, and two tasks"):
        evaluate(other)
    heard, real = [], module.refine
    spied = lambda refiner, mine, *more, **how: (
        heard.append(mine) or real(refiner, mine, *more, **how)
    )
    monkeypatch.setattr(module, "refine", spied)
    few = {"views": 1, "steps": 1}
    inference = other.inference.model_copy(update=few)
    solver = hub_solver(hub_model)
    evaluate(other.model_copy(update={"inference": inference}), solver=solver)
    (own, mixed), (a, b) = heard, sorted(trained.known, key=lambda task: task.id)[:2]
    shown = lambda asked: {q.key.task: {p.input.tobytes() for p in q.pairs} for q in asked}
    inputs = lambda task: {p.input.tobytes() for p in task.demonstrations}
    assert shown(own) == {a.id: inputs(a), b.id: inputs(b)}
    assert shown(mixed) == {a.id: inputs(b), b.id: inputs(a)}
    assert set(read(other.out, "ablations.json")) == {"everything", "other-context"}


def test_a_held_out_answer_changes_no_byte_and_the_seed_gives_the_same_again(
    settings, scores, trained, tmp_path
):
    changed = [
        replace(task, test=tuple(Pair(p.input, (p.output + 1) % 10) for p in task.test))
        for task in trained.known
    ]
    folder = write_tasks(tmp_path / "tasks", changed)
    other = elsewhere(settings, tmp_path / "out", test_set=str(folder), ablate=())
    evaluate(other)
    for name in (SUBMISSION, CANDIDATES):
        assert (tmp_path / "out" / name).read_bytes() == (settings.out / name).read_bytes()


# -- tasks


def test_a_kaggle_file_without_answers_is_answered_and_scored_when_solutions_come(
    settings, scores, trained, tmp_path, capsys
):
    challenges = {task.id: as_json(task.without_answers()) for task in trained.known}
    solutions = {task.id: [p.output.tolist() for p in task.test] for task in trained.known}
    (tmp_path / "arc_challenges.json").write_text(json.dumps(challenges))
    (tmp_path / "known.json").write_text(json.dumps(solutions))
    given = {"test_set": str(tmp_path / "arc_challenges.json"), "ablate": ()}
    assert evaluate(elsewhere(settings, tmp_path / "blind", **given)) is None
    assert "nothing is scored" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "blind/scores.json").exists()
    assert read_submission(tmp_path / "blind/submission.json").keys() == challenges.keys()
    own = {"solutions": str(tmp_path / "known.json"), "keep_candidates": False}
    blind = tmp_path / "blind"
    late = config(None, given["test_set"], tmp_path / "late", submission=blind, evaluation=own)
    assert evaluate(late).task_fraction[2] == scores.task_fraction[2]


# -- interruptions


def interrupted(settings, monkeypatch, after, resume=False):
    """An evaluation that is stopped when it ranks for the time number `after`."""
    real, seen = module.rank, []

    def stopping(*arguments):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(arguments[1][0].id)
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, "rank", stopping)
        with pytest.raises(KeyboardInterrupt) as stop:
            evaluate(settings, resume=resume)
    return seen, str(stop.value)


@pytest.fixture
def one_task_at_once(monkeypatch):
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", VIEWS)


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    settings, scores, tmp_path, monkeypatch, one_task_at_once
):
    own = elsewhere(settings, tmp_path / "out", ablate=("no-trm",))
    first, said = interrupted(own, monkeypatch, 3)  # a task, and another in one of two rows
    assert f"stopped after 2 of 4 tasks, which are kept in {tmp_path / 'out'}" in said
    assert "--resume" in said
    assert not (tmp_path / "out/scores.json").exists()
    with pytest.raises(DataError, match="holds answers of an interrupted run"):
        evaluate(own)
    second, _ = interrupted(own, monkeypatch, 2, resume=True)
    assert evaluate(own, resume=True).task_fraction == scores.task_fraction
    answered = [*first, *second]
    assert len(set(answered)) == 3  # of two tasks nothing is answered twice
    assert (tmp_path / "out/submission.json").read_bytes() == (
        settings.out / "submission.json"
    ).read_bytes()
    rows, before = read(tmp_path / "out", "ablations.json"), read(settings.out, "ablations.json")
    assert rows == {name: before[name] for name in ("everything", "no-trm")}
    assert not (tmp_path / "out" / UNFINISHED).exists()


# -- refusals


def test_a_finished_evaluation_is_not_overwritten(settings, scores):
    before = {path.name: path.read_bytes() for path in settings.out.iterdir()}
    late = config(None, settings.evaluation.test_set, settings.out, submission=settings.out)
    for resume, own in ((False, settings), (True, settings), (False, late)):
        with pytest.raises(DataError, match=r"holds scores\.json of a finished run.*--resume"):
            evaluate(own, resume=resume)
    assert {path.name: path.read_bytes() for path in settings.out.iterdir()} == before


def test_a_dry_run_counts_and_answers_nothing(settings, tmp_path, capsys):
    assert evaluate(elsewhere(settings, tmp_path / "out"), dry_run=True) is None
    assert not (tmp_path / "out").exists()
    told = " ".join(capsys.readouterr().out.split())
    assert f"({VIEWS} views)" in told
    assert "supervision steps" in told


def test_what_cannot_be_used_leaves_nothing_behind(settings, trained, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError):
        evaluate(elsewhere(settings, out).model_copy(update={"checkpoint": tmp_path / "nowhere"}))
    with pytest.raises(DataError, match=r"evaluation\.tasks names 'ffffffff'"):
        evaluate(elsewhere(settings, out, tasks=("ffffffff",)))
    with pytest.raises(ConfigError, match="give --out"):
        evaluate(settings.model_copy(update={"out": None}))
    assert not out.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        evaluate(elsewhere(settings, tmp_path / "file"))


def test_the_folder_of_a_training_run_is_not_written_to(settings, trained):
    before = sorted(path.name for path in trained.run.iterdir())
    with pytest.raises(DataError, match="training run"):
        evaluate(elsewhere(settings, trained.run))
    assert sorted(path.name for path in trained.run.iterdir()) == before


def test_a_submission_of_other_tasks_is_refused(settings, scores, trained, tmp_path):
    folder = write_tasks(tmp_path / "others", trained.others)
    own = {"keep_candidates": False}
    late = config(None, folder, tmp_path / "late", submission=settings.out, evaluation=own)
    with pytest.raises(DataError, match="answers none of the tasks"):
        evaluate(late)
    doubled = [replace(task, test=task.test * 2) for task in trained.known]
    folder = write_tasks(tmp_path / "doubled", doubled)
    own = late.evaluation.model_copy(update={"test_set": str(folder)})
    with pytest.raises(DataError, match="other test inputs of"):
        evaluate(late.model_copy(update={"evaluation": own}))


def test_one_seed_and_one_number_of_threads_give_the_same_bytes_twice(settings, scores, tmp_path):
    again = elsewhere(settings, tmp_path / "again")
    evaluate(again)
    for name in (CANDIDATES, "submission.json", "ablations.json"):
        assert (again.out / name).read_bytes() == (settings.out / name).read_bytes(), name
