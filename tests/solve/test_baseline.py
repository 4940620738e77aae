"""`baseline`: what is written, what is resumed, and that only scoring sees the answers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from arctrm.config import BaselineConfig, EvalConfig
from arctrm.data.parse import parse_grid
from arctrm.data.task import Pair
from arctrm.data.views import View
from arctrm.errors import CheckpointError, ConfigError, DataError
from arctrm.reader.text import parse_grid_text
from arctrm.solve import baseline as room
from arctrm.solve.baseline import baseline, is_closed
from arctrm.solve.evaluate import evaluate
from arctrm.solve.results import read_submission
from helpers import write_tasks
from hub_models import save_model


def config(out, test_set, **given) -> BaselineConfig:
    evaluation = {"test_set": str(test_set), **given.pop("evaluation", {})}
    content = {"views": 3, "out": out, "evaluation": evaluation, **given}
    return BaselineConfig.model_validate(content)


def answered(settings, **options):
    baseline(settings, **options)
    return json.loads((settings.out / "results.json").read_text())


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """Results of the tiny reader on the tasks that it knows, and their folder."""
    out = tmp_path_factory.mktemp("baseline")
    return answered(config(out, trained.folder, checkpoint=trained.run)), out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), chat=True)


def test_every_task_has_prompts_grids_seconds_and_tokens(done, trained):
    results, out = done
    assert set(results["tasks"]) == {task.id for task in trained.known}
    for task in trained.known:
        record = results["tasks"][task.id]
        assert record["seconds"] >= 0
        assert len(record["test"]) == len(task.test)
        assert len(record["prompts"]) == 3 * len(task.test)
        assert record["new_tokens"] == sum(own["new_tokens"] for own in record["prompts"])
    assert any(test for record in results["tasks"].values() for test in record["test"])
    files = sorted(path.name for path in out.iterdir())
    assert files == ["config.json", "results.json", "submission.json"]


def test_prompts_show_the_input_and_grids_are_the_exact_inverse_of_what_was_written(done, trained):
    results, _ = done
    turned = 0
    for task in trained.known:
        for own in results["tasks"][task.id]["prompts"]:
            view = View(own["dihedral"], tuple(own["colours"]))
            query = view.apply(task.test[own["test"]].input)
            shown = parse_grid_text(own["prompt"].partition("input")[2])
            assert np.array_equal(shown, query)
            if own["grid"] is not None:
                turned += view.dihedral > 0
                written = parse_grid_text(own["text"])
                assert np.array_equal(written, view.apply(parse_grid(own["grid"], "grid")))
    assert turned


def test_the_tiny_reader_answers_as_in_eval(done, trained, tmp_path):
    """But for the judgement and the invariants, which are no votes."""
    settings = {
        "out": tmp_path,
        "checkpoint": trained.run,
        "evaluation": {"test_set": str(trained.folder), "ablate": ["no-trm"]},
        "inference": {"views": 3, "invariant_weight": 0.0},
        "judge": {"scored_candidates": 1, "scoring_views": 1},
    }
    evaluate(EvalConfig.model_validate(settings))
    scores = json.loads((tmp_path / "ablations.json").read_text())["no-trm"]
    for name in ("task_fraction", "pair_fraction"):
        assert scores[name]["pass@1"] == pytest.approx(done[0]["scores"][name]["pass@1"])


def test_attempts_bounds_the_grids_that_are_kept_and_scored(trained, tmp_path, capsys):
    results = answered(config(tmp_path, trained.folder, checkpoint=trained.run, attempts=1))
    assert all(len(test) <= 1 for own in results["tasks"].values() for test in own["test"])
    assert list(results["scores"]["task_fraction"]) == ["pass@1"]
    assert "pass@2" not in capsys.readouterr().out


def test_answers_change_nothing_but_the_scores(done, trained, tmp_path):
    """Test outputs become what is submitted first: all of it is then right."""
    results, out = done
    submitted = read_submission(out / "submission.json")
    tasks = []
    for task in trained.known:
        both = zip(task.test, submitted[task.id], strict=True)
        test = tuple(Pair(pair.input, grids[0]) for pair, grids in both)
        tasks.append(replace(task, test=test))
    folder = write_tasks(tmp_path / "tasks", tasks)
    other = answered(config(tmp_path / "out", folder, checkpoint=trained.run))
    for name, record in results["tasks"].items():
        for key in ("prompts", "test", "content"):
            assert record[key] == other["tasks"][name][key]
    assert other["scores"]["pair_fraction"]["pass@1"] == 1


def test_without_answers_nothing_is_scored_and_everything_submitted(trained, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks", [task.without_answers() for task in trained.known])
    results = answered(config(tmp_path / "out", folder, checkpoint=trained.run, views=1))
    assert results["scores"] is None
    assert "nothing is scored" in " ".join(capsys.readouterr().err.split())
    assert len(read_submission(tmp_path / "out/submission.json")) == len(trained.known)


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    done, trained, tmp_path, monkeypatch
):
    settings = config(tmp_path, trained.folder, checkpoint=trained.run)
    answer_task, asked = room.answer_task, []

    def interrupted(solver, task, config):
        asked.append(task.id)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer_task(solver, task, config)

    monkeypatch.setattr(room, "answer_task", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 4 tasks, which are kept"):
        baseline(settings)
    assert not (tmp_path / "results.json").exists()
    with pytest.raises(DataError, match="add --resume"):
        baseline(settings)
    with pytest.raises(CheckpointError, match="views = 3 then, 4 now"):
        baseline(settings.model_copy(update={"views": 4}), resume=True)
    resumed = answered(settings, resume=True)
    assert len(asked) == 5  # two were left
    for results in (resumed, done[0]):
        for record in results["tasks"].values():
            record["seconds"] = 0.0
    assert resumed["tasks"] == done[0]["tasks"]
    assert resumed["scores"] == done[0]["scores"]


def test_results_are_not_lost_without_resume(done, trained):
    _, out = done
    before = (out / "results.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(DataError, match=r"holds results\.json of a finished run"):
            baseline(config(out, trained.folder, checkpoint=trained.run), resume=resume)
    assert (out / "results.json").read_bytes() == before
    for place in (out / "submission.json", trained.run):
        with pytest.raises(DataError, match="the submission or a training run is there"):
            baseline(config(place, trained.folder))


def test_the_dry_run_counts_and_loads_no_model(trained, tmp_path, capsys):
    for given in ({"checkpoint": trained.run}, {"hub": {"name": "Qwen/Qwen2.5-0.5B"}}):
        baseline(config(tmp_path / "out", trained.folder, **given), dry_run=True)
        assert "(3 views, grid)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", ["grid", "chat"])
def test_a_hub_model_answers_both_ways(model, trained, tmp_path, prompt):
    hub = {"name": str(model), "prompt": prompt}
    given = {"hub": hub, "views": 1, "max_new_tokens": 40, "evaluation": {"max_tasks": 2}}
    results = answered(config(tmp_path, trained.folder, **given))
    assert len(results["tasks"]) == 2
    for record in results["tasks"].values():
        for own in record["prompts"]:
            if prompt == "chat":
                assert "Demonstration 1" in own["prompt"]
                assert own["new_tokens"] <= 40
                assert own["log_probability"] is None
            else:
                assert own["log_probability"] < 0
    assert len(read_submission(tmp_path / "submission.json")) == 2


def test_a_query_that_is_too_long_for_the_model_is_refused(model, trained, tmp_path):
    hub = {"name": str(model), "max_tokens": 5}
    with pytest.raises(ConfigError, match="the query alone takes"):
        baseline(config(tmp_path, trained.folder, hub=hub, views=1))


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("012\n345\n", False),
        ("012\n345\n67", False),
        ("012\n345\n\n", True),
        ("012\n345\nThis is", True),
        ("```\n012\n345\n```", True),
        ("Input:\n012\n345\nso", False),
        ("<think>012\n345\nno", False),
        ("<think>1\nno</think>\n012\n3", False),
        ("<think>1\nno</think>\n012\n345\nDone", True),
        ("so:\n" + "[0, 1],\n" * 30, False),
        ("so:\n" + "[0, 1],\n" * 31, True),  # more rows than a grid may have
        ("", False),
    ],
)
def test_a_text_ends_where_its_grid_is_closed(text, closed):
    assert is_closed(text) is closed
