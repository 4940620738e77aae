from pathlib import Path

import pytest

from arctrm.config import (
    COMMANDS,
    DataBuildConfig,
    EvalConfig,
    JointConfig,
    PretrainConfig,
    SolveConfig,
    differences,
)
from arctrm.config.load import load_config, shipped_configs
from arctrm.errors import ConfigError


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """Write TOML files into the working folder, so that sentences name them shortly."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "a.toml") -> Path:
        Path(name).write_text(text, encoding="utf-8")
        return Path(name)

    return write


def load(model=PretrainConfig, files=(), overrides=(), flags=None, environ=None, record=None):
    with pytest.MonkeyPatch.context() as patch:
        for name, text in (environ or {}).items():
            patch.setenv(name, text)
        return load_config(model, files, overrides, flags, record)


def sentence(**layers) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**layers)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- layers


def test_without_layers_the_defaults_of_the_model_hold():
    for model in COMMANDS.values():
        assert load(model) == model()


def test_each_layer_wins_over_the_one_below(toml):
    given = {
        "files": [toml("seed = 1"), toml("seed = 2", "b.toml")],
        "environ": {"ARCTRM_SEED": "3"},
        "overrides": ["seed=4", "seed=5"],
        "flags": {"--seed": ("seed", 6)},
    }
    arguments = {}
    for layer, seed in {"files": 2, "environ": 3, "overrides": 5, "flags": 6}.items():
        arguments[layer] = given[layer]
        assert load(PretrainConfig, **arguments).seed == seed


def test_files_are_merged_key_by_key_and_lists_are_replaced(toml):
    first = toml('[trunk]\nhidden_size = 64\nnum_heads = 2\n[data]\nsubsets = ["training"]')
    second = toml('[trunk]\nnum_heads = 4\n[data]\nsubsets = ["evaluation"]', "b.toml")
    config = load(PretrainConfig, [first, second])
    assert (config.trunk.hidden_size, config.trunk.num_heads) == (64, 4)
    assert config.data.subsets == ("evaluation",)


def test_a_table_that_names_one_key_keeps_the_defaults_the_command_sets_beside_it(toml):
    config = load(SolveConfig, [toml('[inference]\ndtype = "float32"')])
    assert config.inference.views == SolveConfig().inference.views == 32
    config = load(PretrainConfig, (), ["training.schedule.warmup_steps=5"])
    assert config.training.schedule.max_steps == 1000


def test_a_later_layer_displaces_the_key_that_its_own_excludes(toml):
    file = toml('[training.schedule]\nbudget = "20m"')
    assert load(PretrainConfig, [file]).training.schedule.max_steps is None
    schedule = load(PretrainConfig, [file], ["training.schedule.max_steps=7"]).training.schedule
    assert (schedule.budget, schedule.max_steps) == (None, 7)


TEXTS = {
    "data.subsets": "['training', 'my.json',]",
    "data.test_set": "training",
    "data.weights": "{training = 2}",
    "trunk.injection": "false",
    "tracking.run_name": "2024",
    "training.schedule.budget": "10m",
    "out": "runs/a=b",
}


def test_variables_and_overrides_are_toml_values_or_bare_text():
    environ = {f"ARCTRM_{key.replace('.', '__').upper()}": text for key, text in TEXTS.items()}
    config = load(environ=environ)
    assert load(overrides=[f"{key}={text}" for key, text in TEXTS.items()]) == config
    assert config.data.subsets == ("training", "my.json")
    assert (config.data.test_set, config.data.weights) == ("training", {"training": 2})
    assert (config.trunk.injection, config.tracking.run_name) == (False, "2024")
    assert (config.training.schedule.budget, config.out) == (600, Path("runs/a=b"))


def test_variables_of_another_command_and_the_debug_switch_are_left_alone():
    environ = {"ARCTRM_TRUNK__HIDDEN_SIZE": "64", "ARCTRM_DEBUG": "1", "ARCTRM_SEED": ""}
    assert load(SolveConfig, environ=environ) == SolveConfig()


def test_a_key_can_be_unset_in_every_layer(toml):
    for arguments in (
        {"files": [toml('data.test_set = ""')]},
        {"overrides": ["data.test_set=null"]},
        {"environ": {"ARCTRM_DATA__TEST_SET": "null"}},
        {"flags": {"--test-set": ("data.test_set", "")}},
    ):
        assert load(DataBuildConfig, **arguments).data.test_set is None


def test_flags_that_were_not_given_change_nothing(toml):
    file = toml('seed = 3\nout = "x"')
    config = load(
        DataBuildConfig,
        [file],
        flags={"--seed": ("seed", None), "--out": ("out", None)},
    )
    assert (config.seed, config.out) == (3, Path("x"))


# -- one sentence per mistake


def test_a_missing_file_is_named_with_the_nearest_one(toml):
    toml("", "smoke.toml")
    assert sentence(files=[Path("smok.toml")]) == (
        "smok.toml: there is no such file; did you mean smoke.toml?"
    )
    assert "no/such.toml: there is no such file" in sentence(files=[Path("no/such.toml")])


def test_a_folder_or_a_binary_file_is_not_a_configuration(toml, tmp_path):
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    ending = "; --config wants a readable TOML file"
    assert sentence(files=[tmp_path]).endswith(f"is a directory{ending}")
    assert sentence(files=[Path("binary.toml")]).endswith(ending)


def test_a_syntax_error_is_named_with_its_line(toml):
    assert "(at line 3, column 5)" in sentence(files=[toml("seed = 1\n\n[trm\n")])


HERE = "seed, out, data, trunk, reader, trm, training, tracking, voice, checkpoint"
FACTORS = "[[1, 2], [2, 1], [2, 2]]"
MISTAKES = {
    "trunk.hiden_size = 64": "unknown key trunk.hiden_size; did you mean trunk.hidden_size?",
    "hidden_size = 64": "unknown key hidden_size; did you mean trunk.hidden_size?",
    "solver.x = 1": f"unknown key solver; allowed here: {HERE}",
    "tracking.x = 1": "unknown key tracking.x; allowed in tracking: wandb, project, run_name",
    "trunk.loops = '3'": "trunk.loops = '3' should be a valid integer; the default is 3",
    "seed = true": "seed = true should be a valid integer; the default is 0",
    "seed = -1": "seed = -1 should be greater than or equal to 0; the default is 0",
    "trunk = 5": "trunk = 5 should be a table; write it as [trunk]",
    "data.exclude = 'a'": "data.exclude = 'a' should be a valid array; the default is "
    '["40853293", "8719f442"]',
    "training.dtype = 'float16'": "training.dtype = 'float16' should be 'auto', 'float32' or "
    "'bfloat16'; the default is 'auto'",
    "training.optimiser.betas = [0.9]": "training.optimiser.betas = [0.9] should have one more "
    "item; the default is [0.9, 0.95]",
    "training.optimiser.muon_lr = nan": "training.optimiser.muon_lr = NaN should be a finite "
    "number; the default is 0.006",
    "training.optimiser.adamw_lr = 100": "training.optimiser.adamw_lr = 100 should be less than or "
    "equal to 1; the default is 0.002",
    "training.schedule.budget = '20x'": "training.schedule.budget = '20x' is not a duration; write "
    "for example '90s', '10m' or '1.5h'",
    "trunk.hidden_size = 510": "trunk.hidden_size = 510 is not a multiple of 8 x trunk.num_heads = "
    "64; use 512",
    "data.scaling.factors = []": "data.scaling.factors = [] should have at least 1 item after "
    f"validation, not 0; the default is {FACTORS}",
    "voice = 'trm'\ntrm.draft_share = 0.5": "trm.draft_share = 0.5 with voice = 'trm': drafts are "
    "the reader's; set voice = 'both' or trm.draft_share = 0",
    "training.tokens_per_batch = 2000": "training.tokens_per_batch = 2000 with trm.share = 0.5 "
    "leaves one voice no room for the largest pair, 1863 tokens; use 3727 or more",
    "[training.schedule]\nbudget = '10m'\nmax_steps = 5": "training.schedule.budget = 600.0 and "
    "training.schedule.max_steps = 5 contradict each other; give exactly one of the two",
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.items())
def test_a_mistake_in_a_file_gives_one_sentence_with_file_key_got_and_allowed(toml, text, expected):
    assert sentence(files=[toml(text)]) == f"a.toml: {expected}"


def test_the_sentence_names_the_layer_that_the_key_came_from(toml):
    good, bad = toml("seed = 1"), toml("seed = -2", "b.toml")
    assert sentence(files=[good, bad]).startswith("b.toml: seed = -2 ")
    environ = {"ARCTRM_SEED": "-3"}
    assert sentence(files=[bad], environ=environ).startswith("environment ARCTRM_SEED: seed = -3 ")
    assert sentence(environ=environ, overrides=["seed=-4"]).startswith("--set: seed = -4 ")
    flags = {"--seed": ("seed", -5)}
    assert sentence(overrides=["seed=-4"], flags=flags).startswith("--seed: seed = -5 ")
    flag = sentence(model=DataBuildConfig, flags={"--num-aug": ("data.num_aug", -1)})
    assert flag.startswith("--num-aug: data.num_aug = -1 ")


def test_fields_that_contradict_name_every_layer_they_came_from(toml):
    file = toml("[trunk]\nhidden_size = 510")
    assert sentence(files=[file], overrides=["trunk.num_heads=7"]).startswith(
        "a.toml and --set: trunk.hidden_size = 510 is not a multiple of 8 x trunk.num_heads = 56"
    )
    assert sentence(
        model=DataBuildConfig, flags={"--subsets": ("data.subsets", ("training",))}
    ).startswith("--subsets: data.test_set = 'evaluation' is not among data.subsets = ['training']")


def test_an_unknown_variable_is_refused():
    for name, expected in {
        "ARCTRM_SEDE": "unknown key sede; did you mean seed?",
        "ARCTRM_TRUNK__HIDEN_SIZE": MISTAKES["trunk.hiden_size = 64"],
        "ARCTRM_SOLVER__X": MISTAKES["solver.x = 1"],
        "ARCTRM_SEED__X": 'seed = {"x": 1} should be a valid integer; the default is 0',
    }.items():
        assert sentence(environ={name: "1"}) == f"environment {name}: {expected}"


def test_a_table_of_another_command_is_refused_with_that_command(toml):
    assert sentence(model=DataBuildConfig, files=[toml("[trunk]\nhidden_size = 64")]) == (
        "a.toml: unknown key trunk; trunk belongs to arctrm pretrain and arctrm joint, "
        "allowed here: seed, out, data"
    )


def test_an_override_without_a_value_is_refused():
    for text in ("seed", "=3", "trunk..x=1"):
        assert f"--set: got {text!r}, allowed is KEY=VALUE " in sentence(overrides=[text])


def test_of_several_mistakes_the_first_is_told_and_the_others_counted(toml):
    text = '[trunk]\nhidden_size = "big"\nnum_heads = 0\nhalting = 1'
    message = sentence(files=[toml(text)])
    assert message.startswith("a.toml: unknown key trunk.halting;")
    assert message.endswith("(2 more errors)")
    assert sentence(overrides=["seed=x", "trunk.num_layers=0"]).endswith("(1 more error)")


# -- shipped files, and what a resumed run may change


def test_a_bare_name_finds_a_shipped_configuration_unless_there_is_such_a_file(toml):
    assert "smoke" in shipped_configs()
    assert load(PretrainConfig, [Path("smoke")]).trunk.hidden_size == 64
    assert load(PretrainConfig, [Path("smoke.toml")]).trunk.hidden_size == 64
    own = toml("trunk.hidden_size = 128", "smoke.toml")
    assert load(PretrainConfig, [own]).trunk.hidden_size == 128
    assert sentence(files=[Path("smoek")]) == ("smoek: there is no such file; did you mean smoke?")
    elsewhere = Path("configs/smoke.toml")
    assert sentence(files=[elsewhere]) == f"{elsewhere}: there is no such file; did you mean smoke?"
    told = sentence(files=[Path("debug")], overrides=["trunk.hidden_size=510"])
    assert told.startswith("debug and --set: trunk.hidden_size = 510 is not a multiple")
    Path("smoke").mkdir()  # a run folder of that name hides nothing
    assert load(PretrainConfig, [Path("smoke")]).trunk.hidden_size == 64


def test_what_a_resumed_run_may_not_change_is_listed_with_both_values():
    then = PretrainConfig().model_dump(mode="json")
    assert differences(then, PretrainConfig()) == []
    free = load(
        PretrainConfig,
        (),
        [
            *("out=runs/b", "training.schedule.max_steps=7", "training.compile=off"),
            *("training.log_every=1", "tracking.wandb=true", "trunk.gradient_checkpointing=true"),
        ],
    )
    assert differences(then, free) == []
    other = load(PretrainConfig, (), ["trunk.loops=2", "data.weights={training=2}"])
    assert sorted(differences(then, other)) == [
        "data.weights.training = None then, 2.0 now",
        "trunk.loops = 3 then, 2 now",
    ]


def test_a_stored_configuration_may_lack_a_newer_key_but_not_hold_an_unknown_one():
    then = EvalConfig().model_dump(mode="json")
    del then["inference"]["views"]
    assert differences(then, EvalConfig()) == []
    assert differences(then, EvalConfig(inference={"views": 8})) == [
        "inference.views = 64 then, 8 now"
    ]
    then["judge"]["rank"] = "votes"
    assert differences(then, EvalConfig()) == ["judge.rank = votes then, None now"]


def test_an_older_key_may_name_what_the_run_had_anyway():
    then = JointConfig().model_dump(mode="json")
    assert differences(then, JointConfig(trm_hidden_size=512)) == []
    assert differences(then, JointConfig(trm_hidden_size=256)) == [
        "trunk.hidden_size = 512 then, 256 now"
    ]
