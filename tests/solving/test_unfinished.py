"""`eval` in parts: an interruption keeps what is answered, and resumed it ends as it would have."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from arctrm.cli.app import run_app
from arctrm.config import EvalConfig
from arctrm.errors import CheckpointError, ConfigError, DataError
from arctrm.solving import parts
from arctrm.solving.evaluate import load, run
from arctrm.solving.kept import KEPT, read_candidates
from arctrm.solving.unfinished import UNFINISHED
from arctrm.solving.weights import load_solver
from arctrm.training.checkpoints import export_bundle, latest_checkpoint

FILES = ("submission.json", "ablations.json", KEPT)
VIEWS = 2


@pytest.fixture(autouse=True, scope="module")
def two_tasks_at_once():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parts, "PROMPTS_AT_ONCE", 2 * VIEWS)
        yield


@pytest.fixture(scope="module")
def bundle(joined, tmp_path_factory):
    """Weights that other tests do not train on."""
    out = tmp_path_factory.mktemp("bundle") / "hybrid"
    return export_bundle(latest_checkpoint(joined()), out)


@pytest.fixture(scope="module")
def config(bundle, trained):
    return config_of(bundle, trained.folder)


def config_of(checkpoint, folder, **evaluation):
    evaluation = {"test_set": str(folder), "ablate": ["no-trm"], **evaluation}
    return EvalConfig.model_validate(
        {
            "checkpoint": checkpoint,
            "evaluation": {"keep_candidates": True, **evaluation},
            "inference": {"views": VIEWS, "steps": 1, "dtype": "float32"},
            "reader": {"rank": "experts", "scoring_views": 2},
        }
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an evaluation that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(config, out)
    return out


def interrupted(config, out, after, monkeypatch, resume=False):
    """An evaluation that is stopped when it asks for its part number `after`."""
    asked = []
    ask = parts.ask

    def stopping(solver, tasks, *rest):
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append([task.id for task in tasks])
        return ask(solver, tasks, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(parts, "ask", stopping)
        with pytest.raises(KeyboardInterrupt) as stop:
            run(config, out, resume)
    return asked, str(stop.value)


def same(out, whole, exactly=True):
    """Not `exactly` where other tasks were answered together: batches round otherwise."""
    for name in FILES if exactly else FILES[:2]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (out, whole)]
    assert all(own.pop("seconds_per_task") > 0 for own in scores)
    assert scores[0] == scores[1]


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(config, whole, tmp_path, monkeypatch):
    assert not (whole / UNFINISHED).exists()
    first, said = interrupted(config, tmp_path / "out", 1, monkeypatch)
    assert f"stopped after 2 of 6 tasks, which are kept in {tmp_path / 'out'}" in said
    assert "--resume" in said
    assert not (tmp_path / "out" / "scores.json").exists()
    second, said = interrupted(config, tmp_path / "out", 1, monkeypatch, resume=True)
    assert "stopped after 4 of 6 tasks" in said
    scores = run(config, tmp_path / "out", True)
    assert scores.num_tasks == 6
    same(tmp_path / "out", whole)
    assert len({*first[0], *second[0]}) == 4  # nothing is answered twice
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_all_at_once_answers_the_same(config, whole, tmp_path, monkeypatch):
    """But for rounding: a batch holds other prompts."""
    monkeypatch.setattr(parts, "PROMPTS_AT_ONCE", 1000)
    run(config, tmp_path / "out")
    same(tmp_path / "out", whole, exactly=False)
    all_kept = [read_candidates(folder / KEPT) for folder in (tmp_path / "out", whole)]
    for name, inputs in all_kept[0].items():
        for own, others in zip(inputs, all_kept[1][name], strict=True):
            for one, other in zip(own, others, strict=True):
                assert np.array_equal(one.grid, other.grid)
                assert one.views_by == other.views_by
                assert one.reader_scores == pytest.approx(other.reader_scores, abs=1e-3)


def test_the_ablations_of_a_single_part_can_be_interrupted(config, whole, tmp_path, monkeypatch):
    """What is answered without them is scored and kept."""
    monkeypatch.setattr(parts, "PROMPTS_AT_ONCE", 1000)
    rank_all = parts.rank_all

    def stopping(*arguments):
        if arguments[-1] == "no-trm":
            raise KeyboardInterrupt
        return rank_all(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(parts, "rank_all", stopping)
        with pytest.raises(KeyboardInterrupt, match="6 of 6 tasks"):
            run(config, out)
    assert (out / "submission.json").read_bytes() == (whole / "submission.json").read_bytes()
    run(config, out, True)
    same(out, whole, exactly=False)


def test_a_line_that_was_torn_is_answered_again(config, whole, tmp_path, monkeypatch):
    interrupted(config, tmp_path / "out", 1, monkeypatch)
    file = tmp_path / "out" / UNFINISHED
    text = file.read_text()
    assert len(text.splitlines()) == 1 + 2 * 2  # two tasks, each in two rows
    file.write_text(text[:-20])
    run(config, tmp_path / "out", True)
    same(tmp_path / "out", whole, exactly=False)


def test_what_is_kept_is_not_lost_by_accident(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=f"{out}: holds no unfinished evaluation"):
        run(config, out, True)
    interrupted(config, out, 0, monkeypatch)  # nothing is answered, so nothing would be lost
    interrupted(config, out, 1, monkeypatch)
    before = (out / UNFINISHED).read_bytes()
    with pytest.raises(DataError, match=r"add --resume to go on with it, delete it") as refused:
        run(config, out)
    assert refused.value.exit_code == 2
    assert (out / UNFINISHED).read_bytes() == before


def test_another_configuration_other_weights_and_other_tasks_are_refused(
    config, trained, tmp_path, write_tasks, monkeypatch, joined
):
    out = tmp_path / "out"
    tasks = write_tasks(tmp_path / "tasks", trained.known)
    config = config_of(config.checkpoint, tasks)
    interrupted(config, out, 1, monkeypatch)
    before = (out / UNFINISHED).read_bytes()
    with pytest.raises(CheckpointError, match="seed = 0 there, 3 now"):
        run(config.model_copy(update={"seed": 3}), out, True)
    other = export_bundle(latest_checkpoint(joined(coupled=False)), tmp_path / "other")
    with pytest.raises(DataError, match="was begun with other weights"):
        run(config.model_copy(update={"checkpoint": other}), out, True)
    moved = shutil.copytree(config.checkpoint, tmp_path / "moved")
    assert (out / UNFINISHED).read_bytes() == before
    file = tasks / f"{json.loads(before.splitlines()[1])['task']}.json"
    old = file.read_text()
    content = json.loads(old)
    content["test"][0]["input"][0][0] = (content["test"][0]["input"][0][0] + 1) % 10
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="was another one when it was answered"):
        run(config, out, True)
    file.write_text(old)
    assert run(config.model_copy(update={"checkpoint": moved}), out, True).num_tasks == 6


def test_a_file_of_something_else_is_refused(config, tmp_path):
    (tmp_path / UNFINISHED).write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(DataError, match="is not what arctrm eval keeps"):
        run(config, tmp_path, True)


def test_more_tasks_and_other_ablations_may_be_asked_for_on_resume(
    config, whole, trained, bundle, tmp_path, monkeypatch
):
    few = config_of(bundle, trained.folder, max_tasks=4, ablate=[])
    interrupted(few, tmp_path / "out", 1, monkeypatch)
    run(config, tmp_path / "out", True)
    same(tmp_path / "out", whole, exactly=False)


def test_fewer_tasks_may_be_asked_for_and_the_others_stay_answered(
    config, whole, trained, bundle, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    answered, _ = interrupted(config, out, 2, monkeypatch)
    one = config_of(bundle, trained.folder, tasks=[answered[0][0]])
    assert run(one, out, True).num_tasks == 1
    again, _ = interrupted(config, out, 0, monkeypatch, resume=True)
    assert again == []
    run(config, out, True)
    same(out, whole)
    assert not (out / UNFINISHED).exists()


def test_an_evaluation_that_adapts_keeps_nothing(bundle, trained, tmp_path, monkeypatch):
    adapting = config_of(bundle, trained.folder, adapt_steps=1)
    _, said = interrupted(adapting, tmp_path / "out", 1, monkeypatch)
    assert said == ""
    assert not (tmp_path / "out" / UNFINISHED).exists()
    with pytest.raises(ConfigError, match="what was adapted is not kept"):
        run(adapting, tmp_path / "out", True)
    run(adapting, tmp_path / "out")


def test_large_tasks_come_first_and_swapped_ones_stay_together(config, trained):
    tasks, _ = load(config)
    solver = load_solver(config.checkpoint, config.inference, torch.device("cpu"))
    split = parts._parts(tasks, solver, config)
    assert [len(part) for part in split] == [2, 2, 2]
    sizes = [sum(pair.input.size for pair in task.test) for part in split for task in part]
    assert sizes == sorted(sizes, reverse=True)
    swapped = config.evaluation.model_copy(update={"ablate": ("swap-context",)})
    together = config.model_copy(update={"evaluation": swapped})
    assert parts._parts(tasks, solver, together) == [tasks]
    assert parts._parts([], solver, together) == []


def test_resume_takes_the_configuration_from_the_folder(
    config, whole, tmp_path, monkeypatch, capsys
):
    interrupted(config, tmp_path / "out", 1, monkeypatch)
    assert run_app(["eval", "--resume", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert re.search(r"answered before\s+│ 2", capsys.readouterr().out)
    assert run_app(["eval", "--resume", "--out", str(tmp_path / "out")]) == 0
    same(tmp_path / "out", whole)
    with pytest.raises(ConfigError, match="name its folder with --out"):
        run_app(["eval", "--resume"])
    with pytest.raises(ConfigError, match="--resume contradicts --submission"):
        run_app(["eval", "--resume", "--submission", str(whole), "--out", str(tmp_path / "out")])
