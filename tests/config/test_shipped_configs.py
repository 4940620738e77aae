import json
import tomllib
from pathlib import Path

import pytest

import arctrm
from arctrm.config import BaselineConfig, EvalConfig, JointConfig, PretrainConfig, SolveConfig
from arctrm.config.data import KNOWN_LEAKS
from arctrm.config.load import load_config
from arctrm.data.sources import load_tasks
from arctrm.data.task import held_out_ids

CONFIGS = Path(arctrm.__file__).parent / "configs"
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
    "pretrain_trm": PretrainConfig,
    "smoke": PretrainConfig,
    "solve": SolveConfig,
}


def test_every_shipped_config_is_tested_here():
    assert sorted(path.stem for path in CONFIGS.glob("*.toml")) == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_config_loads_with_the_model_of_its_command(name):
    load_config(MODELS[name], [CONFIGS / f"{name}.toml"])


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
    assert load_config(MODELS[name], [CONFIGS / f"{name}.toml"]) == MODELS[name]()


def test_the_trunk_of_the_one_hour_runs_is_that_of_the_bundled_weights():
    bundled = json.loads((BUNDLED / "checkpoint.json").read_text())["config"]
    stored = bundled.get("trunk", bundled.get("reader"))
    for name in ("arc1_1h", "arc2_1h"):
        trunk = load_config(JointConfig, [CONFIGS / f"{name}.toml"]).trunk
        for key, value in trunk.model_dump().items():
            assert stored.get(key, value) == value, key


def test_the_one_hour_run_leaves_out_the_known_leaks_and_the_first_training_tasks_by_hash():
    config = load_config(JointConfig, [CONFIGS / "arc1_1h.toml"])
    held_out = held_out_ids((task.id for task in load_tasks("training")), 60)
    assert sorted(config.data.exclude) == sorted({*KNOWN_LEAKS, *held_out})


def test_smoke_and_debug_are_small_enough_for_a_cpu():
    for name in ("smoke", "debug"):
        config = load_config(PretrainConfig, [CONFIGS / f"{name}.toml"])
        assert config.trunk.hidden_size <= 64
        assert (config.training.schedule.max_steps or 1000) <= 60
        table = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
        assert table["data"]["max_tasks"] <= 30
