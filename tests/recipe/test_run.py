"""A recipe end to end on a CPU: stages, scores, record; interrupted, it goes on exactly."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from arctrm.cli.app import run_app
from arctrm.config import JointConfig
from arctrm.errors import CheckpointError, ConfigError
from arctrm.recipe.run import run
from arctrm.recipe.stages import describe
from arctrm.training import joint, loop
from arctrm.training.checkpoints import (
    latest_checkpoint,
    read_meta,
    read_model,
    resolve_checkpoint,
)
from arctrm.training.starting import origin

CONFIG = Path(__file__).parents[2] / "configs" / "arc1_1h.toml"
STEPS = {"reader": 4, "trm": 3, "joint": 3}
TRAINING = {"tokens_per_batch": 2048, "checkpoint_every_steps": 2, "keep_last": 9, "log_every": 1}
SCHEDULE = {"schedule": {"max_steps": 1, "warmup_steps": 0}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory, small_tasks, write_tasks):
    folder = str(write_tasks(tmp_path_factory.mktemp("tasks") / "known", small_tasks[:3]))
    narrow = {"hidden_size": 16, "num_heads": 2}
    sizes = {"num_context_slots": 2, "adapter_heads": 2, "drafted_pairs": 4, "draft_every": 3}
    return JointConfig.model_validate(
        {
            "batch_size": 4,
            "data": {"subsets": [folder], "test_set": folder, "num_aug": 4},
            "trm": {**narrow, "num_layers": 1, "H_cycles": 1, "L_cycles": 1, "halt_max_steps": 2},
            "reader": {**narrow, "num_layers": 1, "scaling": {"share": 0.3}},
            "coupling": {**sizes, "reader_tokens_per_batch": 4096},
            "training": {**TRAINING, **SCHEDULE},
            "recipe": {
                "max_steps": 10,
                "reader": 0.4,
                "trm": 0.3,
                "joint": 0.3,
                "reader_training": {**TRAINING, **SCHEDULE},
                "trm_training": {**TRAINING, **SCHEDULE},
                "evaluation": {
                    "evaluation": {"test_set": folder, "max_tasks": 1, "ablate": ["no-trm"]},
                    "inference": {"views": 1},
                    "reader": {"rank": "votes"},
                },
            },
        }
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "whole"
    run(config, out, False)
    return out


def learned(out):
    names = ("model.safetensors", "trainer.safetensors")
    return {
        stage: [(latest_checkpoint(out / stage) / name).read_bytes() for name in names]
        for stage in STEPS
    }


def record(out):
    return json.loads((out / "recipe.json").read_text())


def test_every_stage_is_a_run_and_the_folder_is_its_last(whole):
    for stage, steps in STEPS.items():
        assert latest_checkpoint(whole / stage).name == f"step_{steps:08d}"
        assert len((whole / stage / "metrics.jsonl").read_text().splitlines()) == steps
    assert resolve_checkpoint(whole) == latest_checkpoint(whole / "joint")
    started_from = json.loads((whole / "joint" / "config.json").read_text())["config"]
    assert started_from["reader_checkpoint"] == str(whole / "reader")
    assert json.loads((whole / "config.json").read_text())["config"]["recipe"]["max_steps"] == 10


def test_a_stage_whose_time_went_before_its_warm_up_was_over_is_named(config, tmp_path, capsys):
    table = config.model_dump()
    for name, warmup in (("reader_training", 0), ("trm_training", 10**6)):
        table["recipe"][name]["schedule"]["warmup_steps"] = warmup
    table["recipe"] |= {"max_steps": None, "budget": "3s", "evaluate": False}
    run(JointConfig.model_validate(table), tmp_path / "out", False)
    said = " ".join(capsys.readouterr().err.split())
    made = read_meta(latest_checkpoint(tmp_path / "out" / "trm")).step
    assert f"recipe: trm made {made} optimiser steps in its 1 s, fewer than its warm-up of" in said
    assert "raise recipe.budget, or this stage's share" in said
    assert "reader made" not in said
    assert "joint made" not in said


def test_the_checkpoint_says_how_its_parts_were_trained(whole):
    """What starts from it says the joint run, too, of a part that was trained in it."""
    meta = read_meta(latest_checkpoint(whole / "joint"))
    run = {"step": 3, "elapsed": meta.elapsed, "git_revision": meta.git_revision}
    for kind in ("reader", "trm"):
        own, said = read_meta(latest_checkpoint(whole / kind)), meta.notes["parts"][kind]
        assert said == origin(own, kind)
        assert (said["step"], said["training"]) == (STEPS[kind], own.config["training"])
        for frozen in (False, True):
            later = meta.model_copy(update={"config": meta.config | {"llama_frozen": frozen}})
            is_still = frozen and kind == "reader"
            assert origin(later, kind) == (said if is_still else said | {"joined_before": [run]})


def test_the_record_says_what_it_was_what_it_cost_and_what_came_out(whole, config):
    told = record(whole)
    assert list(told["stages"]) == [*STEPS, "eval"]
    assert told["total"]["seconds"] == pytest.approx(
        sum(row["seconds"] for row in told["stages"].values())
    )
    assert (told["seed"], told["gpus"], told["total"]["dollars"]) == (0, 0, 0)
    assert len(told["config_sha256"]) == 64
    assert set(told["scores"]) == {"everything", "no-trm"}
    scores = json.loads((whole / "eval" / "scores.json").read_text())
    assert told["scores"]["everything"]["task_fraction"] == scores["task_fraction"]


def run_until_interrupted(config, out, stage, monkeypatch):
    """Ctrl-C comes after the second step of a stage."""
    step = loop.train_step

    def interrupted(job):
        step(job)
        if job.out.name == stage and job.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"saved step 2 in .*--resume goes on"):
        run(config, out, False)
    monkeypatch.undo()


def test_an_interrupt_in_a_stage_goes_on_exactly_through_the_later_ones(
    whole, config, tmp_path, monkeypatch
):
    out = tmp_path / "cut"
    run_until_interrupted(config, out, "trm", monkeypatch)
    assert not (out / "joint").exists()
    before = record(out)["stages"]
    with pytest.raises(CheckpointError, match=r"already holds a run \(reader, trm\); add --resume"):
        run(config, out, False)
    moved = out.rename(tmp_path / "moved")
    assert run_app(["joint", "--resume", "--out", str(moved)]) == 0
    assert learned(moved) == learned(whole)
    after = record(moved)["stages"]
    assert after["reader"] == before["reader"]
    assert after["trm"]["seconds"] > before["trm"]["seconds"]


def test_a_finished_recipe_trains_nothing_more_but_a_longer_one_goes_on(
    whole, config, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(whole, tmp_path / "again")
    run(config, out, True)
    assert record(out)["stages"] == record(whole)["stages"]
    assert "no-trm" in capsys.readouterr().out
    longer = config.recipe.model_copy(update={"max_steps": 17, "evaluate": False})
    run(config.model_copy(update={"recipe": longer}), out, True)
    assert latest_checkpoint(out / "joint").name == "step_00000005"
    assert latest_checkpoint(out / "reader").name == "step_00000004"
    assert record(out)["scores"] is None


def test_an_interrupted_evaluation_says_how_to_go_on(whole, config, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "again")
    content = record(out) | {"evaluated": False}
    (out / "recipe.json").write_text(json.dumps(content))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("arctrm.solving.parts.answer_all", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"finished stages are kept; .*--resume goes on"):
        run(config, out, True)


def test_folders_of_other_runs_are_refused(whole, config, tmp_path):
    with pytest.raises(CheckpointError, match="no recipe to resume; leave out --resume"):
        run(config, tmp_path / "new", True)
    with pytest.raises(CheckpointError, match="already holds a run without a recipe"):
        run(config, whole / "joint", True)
    with pytest.raises(CheckpointError, match="holds the stages of a recipe"):
        joint.run(config, whole, False)


def test_a_recipe_without_test_pairs_to_be_heard_stops_before_its_first_stage(config, tmp_path):
    coupling = config.coupling.model_copy(update={"heard_pairs": "test"})
    deaf = config.model_copy(update={"coupling": coupling})
    for act in (lambda: run(deaf, tmp_path / "out", False), lambda: describe(deaf, tmp_path)):
        with pytest.raises(ConfigError, match=r"coupling\.heard_pairs = 'test'") as refused:
            act()
        assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit_stops_a_recipe_before_its_first_stage(
    whole, config, tmp_path
):
    """The joint stage would refuse it, too: after the stages before it."""
    recipe = config.recipe.model_copy(update={"trm": 0.0, "joint": 0.6})
    reader = config.reader.model_copy(update={"hidden_size": 32})
    changes = {"recipe": recipe, "reader": reader, "trm_checkpoint": whole}
    with pytest.raises(CheckpointError, match="made for a reader of width 16") as refused:
        run(config.model_copy(update=changes), tmp_path / "out", False)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()

    words = ["joint", "--config", str(CONFIG), "--set", f"trm_checkpoint={whole}", "--dry-run"]
    with pytest.raises(CheckpointError, match=r"trm\.hidden_size = 16 there, 512 here"):
        run_app([*words, "--set", "data.max_tasks=3", "--out", str(tmp_path / "dry")])


def test_a_dry_run_shows_the_stages_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "dry"
    sets = ["--set", "recipe.budget=20m", "--set", "recipe.readers=2"]
    words = ["--config", str(CONFIG), *sets, "--dry-run"]
    assert run_app(["joint", *words, "--set", "data.max_tasks=3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for part in ("reader2", "576 s", "48 s", "adapters: draft", "parameters"):
        assert part in shown
    assert not out.exists()


def test_a_recipe_may_train_an_ensemble(config, tmp_path, monkeypatch):
    """Interrupted in the second reader, it goes on; the checkpoint holds both as they were trained,
    and what they score is said with the second and without.
    """
    answering = config.recipe.evaluation
    chosen = answering.evaluation.model_copy(update={"ablate": ("no-ensemble",)})
    reader = answering.reader.model_copy(update={"rank": "experts", "scoring_views": 2})
    answering = answering.model_copy(update={"evaluation": chosen, "reader": reader})
    shares = {"readers": 2, "reader": 0.7, "trm": 0.0, "evaluation": answering}
    settings = config.model_copy(
        update={"recipe": config.recipe.model_copy(update=shares), "llama_frozen": True}
    )
    out = tmp_path / "two"
    run_until_interrupted(settings, out, "reader2", monkeypatch)
    run(settings, out, True)
    told = record(out)
    assert list(told["stages"]) == ["reader", "reader2", "joint", "eval"]
    assert set(told["scores"]) == {"everything", "no-ensemble"}
    assert json.loads((out / "eval" / "scores.json").read_text())["readers"] == 2
    joint_run = latest_checkpoint(out / "joint")
    weights = read_model(joint_run, ema=True)
    readers = [latest_checkpoint(out / name) for name in ("reader", "reader2")]
    for folder, prefix in zip(readers, ("reader.", "ensemble.0."), strict=True):
        for name, tensor in read_model(folder, ema=True).items():
            assert torch.equal(weights[prefix + name], tensor), prefix + name
    first, second = (read_model(folder, ema=True)["puzzle_emb.weights"] for folder in readers)
    assert not torch.equal(first, second)
    parts = read_meta(joint_run).notes["parts"]
    assert {name: part["seed"] for name, part in parts.items()} == {
        "reader": 0,
        "ensemble.0": 10_000,
    }
