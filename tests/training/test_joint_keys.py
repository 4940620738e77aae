"""The ten keys of the older pipeline's file: each has its effect."""

import json
import re
from dataclasses import replace
from math import ceil

import pytest
import torch
from joint_parts import FORMS, make, new_config, process, small_base, small_tasks
from runs import numbers_of, plain, refused

from arctrm.config import DataConfig
from arctrm.data.build import build
from arctrm.errors import ConfigError, OverlapError
from arctrm.training import joint
from arctrm.training.checkpoints import latest_checkpoint, read_meta
from arctrm.training.joint import joint_stage
from arctrm.training.joint_data import mean_sequences, with_data_path
from arctrm.training.optimisers import FlatGradients, Optimisers

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {
    "trm.hidden_size": 16,
    "reader.hidden_size": 16,
    "reader.num_layers": 1,
    "coupling.draft": False,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_tasks):
    tasks = [replace(t, test=t.demonstrations[:1]) for t in small_tasks(num_tasks=3)]
    return write_tasks(tmp_path_factory.mktemp("data") / "mine", tasks)


# -- data_path


def test_a_bundled_name_replaces_the_subsets_and_nothing_is_evaluated():
    shipped = {
        "data.subsets": ["training", "evaluation"],
        "data.test_set": "evaluation",
        "data.weights": {"evaluation": 2.0, "training": 3.0},
    }
    data = with_data_path(new_config({**shipped, "data_path": "training"})).data
    assert (data.subsets, data.test_set, data.weights) == (("training",), None, {"training": 3.0})
    data = with_data_path(new_config({**shipped, "data_path": "evaluation"})).data
    assert (data.subsets, data.test_set) == (("evaluation",), "evaluation")
    assert data.weights == {"evaluation": 2.0}


def test_without_data_path_nothing_changes():
    config = new_config()
    assert with_data_path(config) is config


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_or_a_file_of_tasks_is_trained_on(folder, tmp_path, what):
    path = folder if what == "folder" else folder / "task_1.json"
    changes = {**QUICK, "data_path": str(path), "training.schedule.max_steps": 1}
    joint.run(new_config(changes), tmp_path, False)
    meta = read_meta(latest_checkpoint(tmp_path))
    wanted = ("task_0", "task_1", "task_2") if what == "folder" else ("task_1",)
    assert meta.task_ids == wanted
    assert meta.config["data"]["subsets"] == [str(path)]
    joint.run(new_config({**changes, "training.schedule.max_steps": 2}), tmp_path, True)


def test_a_built_set_is_opened_with_what_it_was_built_from(folder, tmp_path):
    source = DataConfig(subsets=(str(folder), "training"), test_set=str(folder), max_tasks=2)
    build(source, tmp_path / "set")
    changes = {**QUICK, "data_path": str(tmp_path / "set"), "training.schedule.max_steps": 1}
    resolved = with_data_path(new_config(changes))
    assert resolved.data.subsets == source.subsets
    assert resolved.data.test_set == str(folder)
    assert with_data_path(resolved) == resolved
    joint.run(new_config(changes), tmp_path / "run", False)
    assert len(read_meta(latest_checkpoint(tmp_path / "run")).task_ids) == 4
    assert "mine (2 tasks)" in plain(joint.describe(new_config(changes)))


def test_a_built_set_and_another_data_path_contradict_each_other(folder, tmp_path):
    build(DataConfig(subsets=(str(folder),), test_set=None), tmp_path / "set")
    config = new_config({"data_path": str(tmp_path / "set"), "data.path": tmp_path / "other"})
    text = refused(ConfigError, lambda: with_data_path(config))
    assert str(tmp_path / "set") in text
    assert str(tmp_path / "other") in text


def test_the_guard_stays_on_for_a_named_test_set(tmp_path, write_tasks):
    tasks = [replace(t, test=t.demonstrations[-1:]) for t in small_tasks(num_tasks=2)]
    evaluated = write_tasks(tmp_path / "evaluated", tasks[:1])
    leaking = replace(tasks[1], demonstrations=tasks[1].demonstrations + tasks[0].test)
    write_tasks(tmp_path / "leaking", [leaking])
    subsets = [str(evaluated), str(tmp_path / "leaking")]
    config = new_config({**QUICK, "data.subsets": subsets, "data.test_set": subsets[0]})
    text = refused(OverlapError, lambda: joint.run(config, tmp_path / "run", False))
    assert "task_1" in text
    alone = new_config({**QUICK, "data_path": subsets[1], "training.schedule.max_steps": 1})
    joint.run(alone, tmp_path / "run", False)


# -- llama_model, llama_frozen, trm_checkpoint: test_joint_hub, test_joint_step, test_starting


def test_trm_hidden_size_and_trm_halt_max_steps_are_trms(tmp_path):
    changes = {"trm_hidden_size": 64, "trm_halt_max_steps": 3, "trm.hidden_size": 64}
    stage = joint_stage(new_config(changes), small_base(), process())
    assert stage.model.trm.config.hidden_size == 64
    assert stage.model.trm.config.halt_max_steps == 3
    assert stage.model.adapters["draft"].project.weight.shape[0] == 64


@pytest.mark.parametrize(("batch_size", "expected"), [(2, 2), (6, 6), (7, 6), (400, 32)])
def test_batch_size_bounds_the_sequences_which_come_in_twos(batch_size, expected):
    _, step = make({**QUICK, "batch_size": batch_size})
    assert step.stream.num_sequences == expected
    assert step.stream.draw().sequences.shape[0] == expected


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_max_attempts_is_how_often_reader_and_trm_take_turns(attempts):
    _, step = make({**QUICK, "max_attempts": attempts})
    assert len(step.attempts(step.stream.draw())) == attempts


def test_lr_is_the_rate_of_adamw():
    stage = joint_stage(new_config({**QUICK, "lr": 0.25}), small_base(), process())
    FlatGradients(list(stage.model.parameters()))
    config = new_config({**QUICK, "lr": 0.25}).training.optimiser
    optimisers = Optimisers(stage.model, config)
    optimisers.step(0.5)
    assert {group["lr"] for group in optimisers.all["adamw"].param_groups} == {0.125}


# -- epochs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_epochs_are_passes_over_the_pairs(form, grad_accum):
    changes = {**QUICK, **FORMS[form], "epochs": 3, "training.grad_accum": grad_accum}
    base = small_base()
    stage = joint_stage(new_config(changes), base, process())
    assert base.num_pairs == 20
    assert stage.num_steps == ceil(3 * 20 / (4 * grad_accum))


def test_where_the_budgets_hold_fewer_sequences_their_mean_is_measured():
    _, step = make({**QUICK, "batch_size": 30})
    stream = step.stream
    stream.trm_tokens = 200
    torch.manual_seed(8)
    state = torch.get_rng_state()
    mean = mean_sequences(stream, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert mean_sequences(stream, seed=1) == mean
    assert 2 <= mean < 12
    drawn = [int((stream.draw().sequences[:, -1, 5] > 0).sum()) for _ in range(60)]
    assert sum(drawn) / 60 == pytest.approx(mean, rel=0.3)


def test_epochs_end_the_run_and_a_resumed_one_at_the_same_step(folder, tmp_path):
    changes = {
        **QUICK,
        "data_path": str(folder),
        "epochs": 1,
        "coupling.draft": True,
        "coupling.drafted_pairs": 3,
        "training.checkpoint_every_steps": 2,
        "training.keep_last": 9,
        "training.log_every": 1,
    }
    config = new_config(changes)
    joint.run(config, tmp_path / "run", False)
    assert read_meta(latest_checkpoint(tmp_path / "run")).step == 4  # 15 pairs, 4 at once
    before = numbers_of(tmp_path / "run")
    assert before[-1]["step"] == 4
    (tmp_path / "run" / "checkpoints" / "step_00000004").rename(tmp_path / "aside")
    joint.run(config, tmp_path / "run", True)
    assert read_meta(latest_checkpoint(tmp_path / "run")).step == 4
    assert numbers_of(tmp_path / "run") == before
    for name in ("model.safetensors", "trainer.safetensors", "rank_0.safetensors"):
        again = tmp_path / "run" / "checkpoints" / "step_00000004" / name
        assert again.read_bytes() == (tmp_path / "aside" / name).read_bytes()
    joint.run(new_config({**changes, "epochs": 2}), tmp_path / "run", True)  # it may go on
    assert read_meta(latest_checkpoint(tmp_path / "run")).step == 8
    record = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert record["epochs"] == 2


def test_the_dry_run_names_the_epochs(folder):
    text = plain(joint.describe(new_config({**QUICK, "data_path": str(folder), "epochs": 7})))
    assert "7 epochs" in text


# -- heard_pairs


@pytest.fixture(scope="module")
def tested(tmp_path_factory, write_tasks):
    """Three tasks of five demonstrations and one test pair."""
    return write_tasks(tmp_path_factory.mktemp("data") / "tested", small_tasks(3, num_tests=1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test_set": "itself"}, r"0 of its 15 pairs .*data\.test_set = .*tested.*; add a set"),
        (
            {"test_pair_weight": 0},
            r"all 3 test pairs have data\.test_pair_weight = 0.*; set that above",
        ),
        ({"held_out": 3}, r"0 of its 15 pairs .*data\.held_out = 3"),
    ],
    ids=["evaluated", "weight", "held out"],
)
def test_heard_test_pairs_without_any_are_refused_before_anything_is_trained(
    tested, tmp_path, changes, said
):
    data = {"subsets": [str(tested)], "test_set": None, **changes}
    if data["test_set"] == "itself":
        data["test_set"] = str(tested)
    both = {**QUICK, "coupling.heard_pairs": "test"}
    both |= {f"data.{key}": value for key, value in data.items()}
    for act in (lambda c: joint.run(c, tmp_path / "run", False), joint.describe):
        text = refused(ConfigError, lambda act=act: act(new_config(both)))
        assert re.search(said, text)
        assert text.endswith("or set coupling.heard_pairs = 'all'")
    assert not (tmp_path / "run").exists()
    joint.describe(new_config({**both, "coupling.heard_pairs": "all"}))
    joint.describe(new_config({**both, "coupling.context": False}))  # nothing to hear anyway


def test_test_pairs_of_a_subset_without_weight_are_not_heard(tested, tmp_path, write_tasks):
    shown = write_tasks(tmp_path / "shown", small_tasks(num_tasks=5, seed=1, num_tests=1)[3:])
    changes = {"data.subsets": [str(tested), str(shown)], "data.test_set": str(shown)}
    changes |= {"data.weights": {"tested": 0.0}, "coupling.heard_pairs": "test"}
    text = refused(ConfigError, lambda: joint.describe(new_config({**QUICK, **changes})))
    assert "all 3 test pairs" in text
    assert "data.weights = {'tested': 0.0}" in text
