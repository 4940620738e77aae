"""`JointConfig`: older keys say the same as keys of the tables; contradictions in a sentence."""

import json

import pytest

from arctrm.config import JointConfig, JointModelConfig
from arctrm.config.load import load_config
from arctrm.errors import ConfigError

OLD = [
    *("data_path", "llama_model", "llama_frozen", "trm_checkpoint", "trm_hidden_size"),
    *("trm_halt_max_steps", "batch_size", "max_attempts", "epochs", "lr"),
]


NO_READER = ("recipe.budget=1m", "recipe.reader=0", "recipe.trm=0.5", "recipe.joint=0.5")


def load(*overrides, files=()):
    return load_config(JointConfig, files, overrides, environ={})


def sentence(*overrides):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_ten_keys_of_the_older_file_are_these():
    assert list(JointModelConfig.model_fields) == OLD


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("trm_hidden_size=64", "trm.hidden_size"),
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
        (["max_attempts=0"], ["max_attempts = 0", "at least 1"]),
        (["epochs=0"], ["epochs = 0", "at least 1"]),
        (["lr=0"], ["lr = 0", "above 0"]),
        (["batch_size=1"], ["batch_size = 1", "at least 2"]),
        (["trm_hidden_size=510"], ["trm.hidden_size = 510", "trm.num_heads", "use 480 or 512"]),
        (["trm_halt_max_steps=0"], ["trm_halt_max_steps = 0"]),
        (["llama_frozen=maybe"], ["llama_frozen", "true or false"]),
        (["hub.name=a/b"], ["llama_model = 'tiny'", "hub.name = 'a/b'"]),
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
        (["coupling.adapter_heads=7"], ["coupling.adapter_heads = 7", "use 4"]),
        (["coupling.num_back_vectors=33"], ["coupling.num_back_vectors = 33", "at most 32"]),
        (["training.tokens_per_batch=1800"], ["training.tokens_per_batch = 1800", "use 1848"]),
        (
            ["reader.sequence=task", "coupling.reader_tokens_per_batch=8000"],
            ["coupling.reader_tokens_per_batch = 8000", "use 8200", "reader.max_tokens"],
        ),
        (
            ["reader.input_attention=full", "reader.sequence=task"],
            ["reader.input_attention = 'full'", "reader.sequence = 'task'", "set reader.sequence"],
        ),
        (
            ["reader.mosaic_share=0.2", "reader.sequence=task"],
            ["reader.mosaic_share = 0.2", "reader.sequence = 'task'", "set reader.sequence"],
        ),
        (
            ["reader.input_attention=full", "llama_model=a/b"],
            ["reader.input_attention = 'full'", "llama_model = 'a/b'", "leave"],
        ),
        (
            ["reader.gradient_checkpointing=true", "llama_model=a/b"],
            ["reader.gradient_checkpointing = true", "'a/b'", "hub.gradient_checkpointing"],
        ),
        (
            ["reader.inverse_share=0.2", "llama_model=a/b"],
            ["reader.inverse_share = 0.2", "llama_model = 'a/b'", "leave"],
        ),
        (
            ["reader.inverse_share=0.2"],
            ["reader.inverse_share = 0.2", "recipe.reader", "a reader_checkpoint"],
        ),
        (
            ["reader.inverse_share=0.2", *NO_READER],
            ["reader.inverse_share = 0.2", "recipe.reader", "a reader_checkpoint"],
        ),
        (["trm.task_embedding=per_view"], ["trm.task_embedding = 'per_view'", "'shared'"]),
    ],
)
def test_what_cannot_be_is_one_sentence(overrides, words):
    text = sentence(*overrides)
    assert text.startswith("--set: ")
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
        ["trm_hidden_size=64", "lr=0.01", "batch_size=8", "llama_frozen=true"],
        ["llama_model=a/b"],
        ["llama_model=a/b", "hub.mode=full", "epochs=3", "data_path=training"],
        ["llama_model=a/b", "llama_frozen=true"],
    ],
)
def test_the_record_of_a_run_gives_the_same_configuration(tmp_path, overrides):
    config = load(*overrides)
    record = tmp_path / "config.json"
    record.write_text(json.dumps({"config": config.model_dump(mode="json")}))
    assert load_config(JointConfig, record=record, environ={}) == config
    assert JointConfig.model_validate(config.model_dump(mode="json")) == config
