"""`JointConfig`: older keys say the same as keys of the tables; contradictions in a sentence."""

import json
from pathlib import Path

import pytest

from arctrm.config import JointConfig, JointModelConfig, TrunkConfig
from arctrm.config.load import load_config
from arctrm.errors import ConfigError

OLD = [
    *("data_path", "llama_model", "llama_frozen", "trm_checkpoint", "trm_hidden_size"),
    *("trm_halt_max_steps", "batch_size", "max_attempts", "epochs", "lr"),
]


def load(*overrides, files=()):
    return load_config(JointConfig, files, overrides)


def sentence(*overrides):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_ten_keys_of_the_older_file_are_these():
    assert JointModelConfig is JointConfig
    assert set(OLD) < set(JointConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("trm_hidden_size=64", "trunk.hidden_size"),
        ("trm_halt_max_steps=5", "trm.halt_max_steps"),
        ("lr=0.01", "training.optimiser.adamw_lr"),
    ],
)
def test_an_older_key_fills_in_the_key_that_means_the_same(override, path):
    value = load(override)
    for part in path.split("."):
        value = getattr(value, part)
    assert value == json.loads(override.partition("=")[2])
    name, _, number = override.partition("=")
    assert load(override, f"{path}={number}") == load(override, f"{path}={number}")
    other = sentence(override, f"{path}={32 if 'lr' not in name else 0.5}")
    assert f"{name} = {number} contradicts {path} = " in other


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["max_attempts=0"], ["max_attempts = 0", "equal to 1"]),
        (["epochs=0"], ["epochs = 0", "equal to 1"]),
        (["lr=0"], ["--set lr: ", "adamw_lr = 0", "greater than 0"]),
        (["trm_hidden_size=510"], ["trm_hidden_size", "trunk.num_heads", "use 512"]),
        (["trm_halt_max_steps=0"], ["trm_halt_max_steps", "trm.halt_max_steps = 0"]),
        (["llama_frozen=maybe"], ["llama_frozen", "boolean"]),
        (["hub.name=a/b"], ["llama_model = 'tiny'", "the table hub"]),
        (["llama_frozen=true"], ["llama_frozen = true", "trm_checkpoint"]),
        (["trunk.own_layers=5"], ["trunk.own_layers = 5", "trunk.num_layers = 4"]),
        (["reader_checkpoint=x"], ["llama_model = 'tiny'", "reader_checkpoint = 'x'"]),
        (["llama_model=a/b", "hub.name=c/d"], ["llama_model = a/b", "hub.name = c/d"]),
        (
            ["llama_model=a/b", "llama_frozen=true", "hub.mode=lora"],
            ["llama_frozen = true", "hub.mode = 'lora'"],
        ),
        (
            ["llama_model=a/b", "llama_frozen=false", "hub.mode=frozen"],
            ["llama_frozen = false", "hub.mode = 'frozen'"],
        ),
        (
            ["llama_model=a/b", "hub.mode=full", "hub.dtype=bfloat16"],
            ["hub.dtype = 'bfloat16'", "hub.mode = 'full'"],
        ),
        (["llama_model=a/b", "hub.device_map=auto"], ["hub.device_map = 'auto'", "hub.mode"]),
        (["llama_model=a/b", "coupling.adapter_heads=7"], ["adapter_heads = 7", "use 8"]),
        (["coupling.num_back_vectors=33"], ["coupling.num_back_vectors = 33", "equal to 32"]),
        (
            ["llama_model=a/b", "coupling.reader_tokens_per_batch=4000"],
            ["coupling.reader_tokens_per_batch = 4000", "use 4096", "hub.max_tokens"],
        ),
        (["llama_model=a/b", "reader.inverse_share=0.2"], ["'a/b'", "the table reader"]),
        (["lr=inf"], ["lr = Infinity", "a finite number"]),
        (["lr=100"], ["adamw_lr = 100", "less than or equal to 1"]),
    ],
)
def test_what_cannot_be_is_one_sentence(overrides, words):
    text = sentence(*overrides)
    assert text.startswith("--set")
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("overrides", "mode", "frozen"),
    [
        ([], "lora", False),
        (["llama_frozen=true"], "frozen", True),
        (["hub.mode=full"], "full", False),
        (["hub.mode=frozen"], "frozen", True),
        (["llama_frozen=false", "hub.mode=full"], "full", False),
    ],
)
def test_llama_frozen_and_hub_mode_say_together_what_is_trained(overrides, mode, frozen):
    config = load("llama_model=a/b", *overrides)
    assert (config.hub.mode, config.llama_frozen, config.hub.name) == (mode, frozen, "a/b")


@pytest.mark.parametrize(
    "overrides",
    [
        ["trm_hidden_size=64", "lr=0.01", "batch_size=8", "max_attempts=3"],
        ["llama_model=a/b"],
        ["llama_model=a/b", "hub.mode=full", "epochs=3", "data_path=training"],
        ["llama_model=a/b", "llama_frozen=true"],
    ],
)
def test_the_record_of_a_run_gives_the_same_configuration(tmp_path, overrides):
    config = load(*overrides)
    record = tmp_path / "config.json"
    record.write_text(json.dumps({"config": config.model_dump(mode="json")}))
    assert load_config(JointConfig, record=record) == config
    assert JointConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_later_layer_displaces_the_other_name_of_its_key(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("trm_hidden_size = 256\nlr = 0.01")
    config = load("trunk.hidden_size=128", "training.optimiser.adamw_lr=0.02", files=[file])
    assert (config.trunk.hidden_size, config.trm_hidden_size) == (128, None)
    assert config.training.optimiser.adamw_lr == 0.02
    file.write_text("trunk.hidden_size = 256\nllama_model = 'a/b'\nhub.mode = 'lora'")
    config = load("trm_hidden_size=128", "llama_frozen=true", files=[file])
    assert (config.trunk.hidden_size, config.hub.mode) == (128, "frozen")


def test_an_older_configuration_in_python_needs_no_table():
    config = JointModelConfig(
        data_path="training",
        llama_model="a/b",
        llama_frozen=True,
        trm_checkpoint="runs/trm",
        trm_hidden_size=256,
        trm_halt_max_steps=4,
        batch_size=8,
        max_attempts=3,
        epochs=2,
        lr=3e-4,
        trunk=TrunkConfig(num_layers=2),
    )
    assert (config.trunk.hidden_size, config.trunk.num_layers) == (256, 2)
    assert (config.trm.halt_max_steps, config.training.optimiser.adamw_lr) == (4, 3e-4)
    assert (config.hub.name, config.hub.mode) == ("a/b", "frozen")
    assert config.checkpoint == Path("runs/trm")
    assert config.training.schedule.max_steps == 1000


def test_the_scoring_of_a_run_has_the_tables_of_the_run():
    config = load("seed=3", "inference.views=4", "judge.scoring_views=2", "evaluation.max_tasks=5")
    scoring = config.eval_config(Path("runs/a"), Path("runs/a/eval"))
    assert (scoring.seed, scoring.checkpoint, scoring.out) == (
        3,
        Path("runs/a"),
        Path("runs/a/eval"),
    )
    assert (scoring.inference.views, scoring.judge.scoring_views) == (4, 2)
    assert scoring.evaluation == config.evaluation
