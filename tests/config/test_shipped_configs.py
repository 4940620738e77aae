import json
from pathlib import Path

import pytest
import tomli

import arctrm
from arctrm.config import BaselineConfig, EvalConfig, JointConfig, PretrainConfig, SolveConfig
from arctrm.config.data import KNOWN_LEAKS
from arctrm.config.load import load_config
from arctrm.data.sources import load_tasks
from arctrm.data.task import held_out_ids

CONFIGS = Path(__file__).parents[2] / "configs"
BUNDLED = Path(arctrm.__file__).parent / "bundled"
MODELS = {
    "arc1_1h": JointConfig,
    "arc2_1h": JointConfig,
    "baseline": BaselineConfig,
    "debug": PretrainConfig,
    "eval": EvalConfig,
    "joint": JointConfig,
    "joint_llama": JointConfig,
    "pretrain": PretrainConfig,
    "pretrain_reader": PretrainConfig,
    "smoke": PretrainConfig,
    "solve": SolveConfig,
}


def test_every_shipped_config_is_tested_here():
    assert sorted(path.stem for path in CONFIGS.glob("*.toml")) == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_config_loads_with_the_model_of_its_command(name):
    load_config(MODELS[name], [CONFIGS / f"{name}.toml"], environ={})


@pytest.mark.parametrize("name", MODELS)
def test_every_key_of_a_shipped_config_has_a_comment(name):
    lines = (CONFIGS / f"{name}.toml").read_text().splitlines()
    keys = [line for line in lines if "=" in line and not line.startswith("#")]
    assert keys
    for number, line in enumerate(lines):
        if line in keys:
            assert "#" in line or lines[number - 1].startswith("#"), line


@pytest.mark.parametrize("name", ["baseline", "eval", "solve"])
def test_the_configs_of_baseline_eval_and_solve_say_what_the_defaults_are(name):
    """Their values are the defaults, so that reading them tells what runs without a file."""
    assert load_config(MODELS[name], [CONFIGS / f"{name}.toml"], environ={}) == MODELS[name]()


def known_to(older, newer):
    """The part of `newer` that `older` has, too."""
    return {
        key: known_to(value, newer[key]) if isinstance(value, dict) else newer[key]
        for key, value in older.items()
        if key in newer
    }


def test_the_pretrain_config_is_what_trained_the_bundled_trm():
    """But for the data that is not bundled and the length of the run, and before it was joined."""
    bundled = json.loads((BUNDLED / "checkpoint.json").read_text())
    recipe = {key: bundled["notes"]["parts"]["trm"][key] for key in ("data", "training")}
    config = load_config(PretrainConfig, [CONFIGS / "pretrain.toml"], environ={})
    shipped = config.model_dump(mode="json")
    known = {key: known_to(recipe[key], shipped[key]) for key in recipe}  # fields may be newer
    recipe = {key: {k: recipe[key][k] for k in known[key]} for key in recipe}
    for settings in (recipe, known):
        settings["data"]["subsets"] = settings["data"]["subsets"][:2]
        settings["data"]["weights"].pop("concept_arc", None)
        del settings["training"]["schedule"]["budget"]
        del settings["training"]["log_every"]
    assert known == recipe
    own = bundled["config"]["trm"] | {"halt_max_steps": shipped["trm"]["halt_max_steps"]}
    assert known_to(own, shipped["trm"]) == own


def test_the_reader_of_the_recipe_is_that_of_the_bundled_weights():
    bundled = json.loads((BUNDLED / "checkpoint.json").read_text())
    config = load_config(JointConfig, [CONFIGS / "arc1_1h.toml"], environ={})
    shipped = config.model_dump(mode="json")
    assert known_to(bundled["config"]["reader"], shipped["reader"]) == bundled["config"]["reader"]
    trained = bundled["notes"]["parts"]["reader"]["training"]["optimiser"]
    assert shipped["recipe"]["reader_training"]["optimiser"] == trained


def test_the_recipe_leaves_out_the_known_leaks_and_the_first_training_tasks_by_hash():
    config = load_config(JointConfig, [CONFIGS / "arc1_1h.toml"], environ={})
    held_out = held_out_ids((task.id for task in load_tasks("training")), 60)
    assert sorted(config.data.exclude) == sorted({*KNOWN_LEAKS, *held_out})


def test_smoke_and_debug_are_small_enough_for_a_cpu():
    for name in ("smoke", "debug"):
        config = load_config(PretrainConfig, [CONFIGS / f"{name}.toml"], environ={})
        assert config.trm.hidden_size <= 64
        assert (config.training.schedule.max_steps or 1000) <= 60
        table = tomli.loads((CONFIGS / f"{name}.toml").read_text())
        assert table["data"]["max_tasks"] <= 30
