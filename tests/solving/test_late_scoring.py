"""`eval --submission`: what was answered without solutions is scored when they are there."""

import json

import numpy as np
import pytest
from rich.console import Console

from arctrm.config import EvalConfig
from arctrm.data.sources import load_tasks
from arctrm.errors import DataError
from arctrm.solving import late_scoring
from arctrm.solving.submission import submission, write_submission


def as_json(pairs, outputs):
    return [
        {"input": pair.input.tolist(), **({"output": pair.output.tolist()} if outputs else {})}
        for pair in pairs
    ]


@pytest.fixture
def tasks():
    """Six tasks, one of them with two test inputs."""
    chosen = load_tasks("training", max_tasks=60)
    return sorted(chosen, key=lambda task: (-len(task.test), task.id))[:6]


@pytest.fixture
def folder(tasks, tmp_path):
    """Challenges and solutions in files that do not belong together by name."""
    challenges = {
        task.id: {"train": as_json(task.demonstrations, True), "test": as_json(task.test, False)}
        for task in tasks
    }
    solutions = {task.id: [pair.output.tolist() for pair in task.test] for task in tasks}
    (tmp_path / "challenges.json").write_text(json.dumps(challenges))
    (tmp_path / "answers.json").write_text(json.dumps(solutions))
    return tmp_path


def attempts_of(tasks):
    """Right first, right second, wrong, in turn over the test inputs."""
    found, number = {}, 0
    for task in tasks:
        found[task.id] = []
        for pair in task.test:
            wrong = (pair.output + 1) % 10
            kinds = ((pair.output, wrong), (wrong, pair.output), (wrong, wrong))
            found[task.id].append(kinds[number % 3])
            number += 1
    return found


def config_of(folder, **more):
    return EvalConfig.model_validate(
        {
            "submission": folder,
            "evaluation": {
                "test_set": str(folder / "challenges.json"),
                "solutions": str(folder / "answers.json"),
            },
            **more,
        }
    )


def test_a_submission_is_scored_by_the_solutions_that_came_later(tasks, folder, tmp_path):
    attempts = attempts_of(tasks)
    write_submission(folder / "submission.json", submission(attempts))
    before = (folder / "submission.json").read_bytes()
    scores = late_scoring.run(config_of(folder), folder)
    pairs = [pair for task in tasks for pair in attempts[task.id]]
    known = [pair.output for task in tasks for pair in task.test]
    right = np.array(
        [[np.array_equal(a, k) for a in two] for two, k in zip(pairs, known, strict=True)]
    )
    assert scores.pair_fraction[1] == pytest.approx(right[:, 0].mean())
    assert scores.pair_fraction[2] == pytest.approx(right.any(1).mean())
    assert 0 < scores.pair_fraction[1] < scores.pair_fraction[2] < 1
    written = json.loads((folder / "scores.json").read_text())
    assert list(written["task_fraction"]) == ["pass@1", "pass@2"]
    assert written["task_fraction"]["pass@2"] == scores.task_fraction[2]
    assert written["num_pairs"] == len(known) > written["num_tasks"] == 6
    assert (folder / "submission.json").read_bytes() == before


def test_tasks_that_are_not_answered_are_not_solved(tasks, folder, capsys):
    right = {task.id: [(pair.output, pair.output) for pair in task.test] for task in tasks[:2]}
    write_submission(folder / "submission.json", submission(right))
    scores = late_scoring.run(config_of(folder), folder / "scores")
    assert scores.task_fraction == {1: 2 / 6, 2: 2 / 6, 10: 2 / 6}
    assert "4 of 6 tasks are not in the submission: not solved" in capsys.readouterr().err


def test_the_dry_run_counts_and_writes_nothing(tasks, folder, capsys):
    write_submission(folder / "submission.json", submission(attempts_of(tasks[:4])))
    before = sorted(folder.iterdir())
    Console(width=100).print(late_scoring.describe(config_of(folder)))
    assert "6, 4" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


def test_a_submission_for_other_inputs_is_refused_before_anything_is_written(tasks, folder):
    attempts = attempts_of(tasks)
    attempts[tasks[0].id] = attempts[tasks[0].id][:1]
    write_submission(folder / "submission.json", submission(attempts))
    number = len(tasks[0].test)
    with pytest.raises(DataError, match=f"{tasks[0].id} has 1 entries, but {number} test inputs"):
        late_scoring.run(config_of(folder), folder / "scores")
    write_submission(folder / "submission.json", submission({"ffffffff": attempts[tasks[1].id]}))
    with pytest.raises(DataError, match=r"answers none of the 6 tasks of .*challenges.json"):
        late_scoring.run(config_of(folder), folder / "scores")
    assert not (folder / "scores").exists()


def test_without_known_answers_nothing_is_scored_or_written(tasks, folder):
    write_submission(folder / "submission.json", submission(attempts_of(tasks)))
    (folder / "answers.json").unlink()
    config = EvalConfig.model_validate(
        {
            "submission": folder / "submission.json",
            "evaluation": {"test_set": str(folder / "challenges.json")},
        }
    )
    with pytest.raises(DataError, match="no known answer; give a solutions file"):
        late_scoring.run(config, folder / "scores")
    assert not (folder / "scores").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"checkpoint": "runs/a"}, "checkpoint"),
        ({"evaluation": {"ablate": ["no-trm"]}}, "evaluation.ablate"),
        ({"evaluation": {"adapt_steps": 3}}, "evaluation.adapt_steps"),
        ({"evaluation": {"adapt_budget": "9s"}}, "evaluation.adapt_budget"),
        ({"evaluation": {"keep_candidates": True}}, "evaluation.keep_candidates"),
    ],
)
def test_what_would_need_weights_is_refused_beside_a_submission(more, named):
    with pytest.raises(ValueError, match=f"'s.json' is scored as it is, but {named} is set"):
        EvalConfig.model_validate({"submission": "s.json", **more})
