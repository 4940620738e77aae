"""`baseline` of the tiny reader: what is written, and that only scoring sees the answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from baseline_runs import answered, config, prompts_of
from rich.console import Console

from arctrm.config import EvalConfig
from arctrm.data.parse import parse_grid
from arctrm.data.task import Pair
from arctrm.data.views import View
from arctrm.reader.grid_text import parse_grid_text
from arctrm.solving import evaluate
from arctrm.solving.baseline import describe
from arctrm.solving.evaluate import load
from arctrm.solving.submission import check_complete, read_submission

# -- what is written


def test_every_task_has_prompts_candidates_grids_seconds_and_tokens(done, trained):
    results, _ = done
    assert list(results["tasks"]) == [task.id for task in trained.known]
    for task in trained.known:
        record = results["tasks"][task.id]
        assert record["seconds"] >= 0
        assert len(record["test"]) == len(task.test)
        prompts = [prompt for test in record["test"] for prompt in test["prompts"]]
        assert len(prompts) == 3 * len(task.test)
        assert record["tokens"]["prompt"] == sum(prompt["prompt_tokens"] for prompt in prompts)
        candidates = [candidate for prompt in prompts for candidate in prompt["candidates"]]
        assert record["tokens"]["new"] == sum(candidate["new_tokens"] for candidate in candidates)
    assert any(test["attempts"] for record in results["tasks"].values() for test in record["test"])


def test_prompts_show_the_input_and_grids_are_the_exact_inverse_of_what_was_written(done, trained):
    results, _ = done
    inputs = {(t.id, i): pair.input for t in trained.known for i, pair in enumerate(t.test)}
    turned = 0
    for task_id, index, prompt in prompts_of(results):
        view = View(prompt["dihedral"], tuple(prompt["colours"]))
        query = inputs[task_id, index]
        assert np.array_equal(
            parse_grid_text(prompt["prompt"].partition("input")[2]), view.apply(query)
        )
        for candidate in prompt["candidates"]:
            if candidate["grid"] is not None:
                turned += view.dihedral > 0
                written = parse_grid_text(candidate["text"])
                assert np.array_equal(written, view.apply(parse_grid(candidate["grid"], "grid")))
    assert turned


def test_the_submission_answers_every_test_input(done, trained):
    results, path = done
    check_complete(json.loads(path.with_name("submission.json").read_text()), trained.known)
    submitted = read_submission(path.with_name("submission.json"))
    for task in trained.known:
        for pair, test, grids in zip(
            task.test, results["tasks"][task.id]["test"], submitted[task.id], strict=True
        ):
            kept = [attempt["grid"] for attempt in test["attempts"]]
            expected = [kept[0], kept[-1]] if kept else [pair.input.tolist()] * 2
            assert [grid.tolist() for grid in grids] == expected


@pytest.mark.parametrize(
    "reader",
    [{}, {"min_probability": 0.2}, {"rank": "experts", "scoring_views": 2}],
    ids=["greedy", "threshold", "experts"],
)
def test_the_tiny_reader_answers_as_in_eval(trained, tiny_reader, tmp_path, reader):
    """But for the invariants, which are no work of the model."""
    answered(config(trained.folder, checkpoint=tiny_reader, reader=reader), tmp_path / "a.json")
    settings = {
        "checkpoint": tiny_reader,
        "evaluation": {"test_set": str(trained.folder)},
        "inference": {"views": 3, "invariant_weight": 0.0},
        "reader": {"rank": "votes", **reader},
    }
    evaluate.run(EvalConfig.model_validate(settings), tmp_path / "eval")
    both = [tmp_path / "submission.json", tmp_path / "eval" / "submission.json"]
    assert both[0].read_bytes() == both[1].read_bytes()


def test_attempts_bounds_the_grids_that_are_kept_and_scored(trained, tiny_reader, tmp_path, capsys):
    one = config(trained.folder, checkpoint=tiny_reader, views=8, attempts=1)
    results = answered(one, tmp_path / "results.json")
    for record in results["tasks"].values():
        assert all(len(test["attempts"]) <= 1 for test in record["test"])
    assert list(results["scores"]["task_fraction"]) == ["pass@1"]
    assert "pass@2" not in capsys.readouterr().out
    for grids in read_submission(tmp_path / "submission.json").values():
        assert all(np.array_equal(*pair) for pair in grids)


def test_demonstrations_that_a_checkpoint_has_no_room_for_are_noted(
    trained, trained_reader, tmp_path
):
    reader = trained_reader(steps=5, sequence="task", max_pairs=2)
    settings = config(trained.folder, checkpoint=reader, views=1, evaluation={"max_tasks": 2})
    results = answered(settings, tmp_path / "results.json")
    for task in trained.known[:2]:
        notes = results["tasks"][task.id]["notes"]
        dropped = f"{len(task.demonstrations) - 1} of {len(task.demonstrations)} demonstrations"
        assert len(notes) == len(task.test)
        assert dropped in notes[0]


# -- answers


def test_answers_change_nothing_but_what_scoring_says(
    done, trained, settings, write_tasks, tmp_path
):
    """Test outputs become what is submitted first: all of it is then right."""
    results, path = done
    submitted = read_submission(path.with_name("submission.json"))
    tasks = [
        replace(
            task,
            test=tuple(
                Pair(pair.input, grids[0])
                for pair, grids in zip(task.test, submitted[task.id], strict=True)
            ),
        )
        for task in trained.known
    ]
    folder = write_tasks(tmp_path / "tasks", tasks)
    other = answered(config(folder, checkpoint=settings.checkpoint), tmp_path / "results.json")
    assert (tmp_path / "submission.json").read_bytes() == path.with_name(
        "submission.json"
    ).read_bytes()
    for task_id, record in results["tasks"].items():
        for test, changed in zip(record["test"], other["tasks"][task_id]["test"], strict=True):
            assert test["prompts"] == changed["prompts"]
            assert [{**a, "correct": None} for a in test["attempts"]] == [
                {**a, "correct": None} for a in changed["attempts"]
            ]
            assert [a["correct"] for a in changed["attempts"][:1]] in ([True], [])
    assert other["scores"]["pair_fraction"]["pass@1"] == 1  # also where the input is submitted


def test_correct_says_whether_a_grid_is_the_answer(done, trained):
    results, _ = done
    for task in trained.known:
        for pair, test in zip(task.test, results["tasks"][task.id]["test"], strict=True):
            for attempt in test["attempts"]:
                assert attempt["correct"] is (attempt["grid"] == pair.output.tolist())


def test_without_answers_nothing_is_scored_and_everything_submitted(
    done, trained, settings, write_kaggle, tmp_path, capsys
):
    challenges, _ = write_kaggle(tmp_path / "kaggle", trained.known)
    blind = config(challenges, checkpoint=settings.checkpoint)
    results = answered(blind, tmp_path / "results.json")
    assert results["scores"] is None
    assert "nothing is scored" in " ".join(capsys.readouterr().err.split())
    for record in results["tasks"].values():
        assert all(a["correct"] is None for test in record["test"] for a in test["attempts"])
    assert (tmp_path / "submission.json").read_bytes() == done[1].with_name(
        "submission.json"
    ).read_bytes()


# -- what would run


def test_the_dry_run_counts_and_loads_no_hub_model(trained, tiny_reader, tmp_path):
    for given in ({"checkpoint": tiny_reader}, {"hub": {"name": "Qwen/Qwen2.5-0.5B"}}):
        table = describe(config(trained.folder, **given), tmp_path / "results.json", False)
        console = Console(width=200, record=True)
        console.print(table)
        text = console.export_text()
        assert "6, 6" in text
        assert "18 (3 views)" in text
    assert list(tmp_path.iterdir()) == []


def test_tasks_are_loaded_without_answers(settings):
    tasks, known = load(settings)
    assert all(pair.output is None for task in tasks for pair in task.test)
    assert all(grid is not None for grids in known.values() for grid in grids)
