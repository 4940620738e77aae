"""What a recipe stands for: the configurations of its stages, and what is refused."""

from pathlib import Path

import pytest

from arctrm.config import JointConfig
from arctrm.config.load import load_config
from arctrm.config.recipe import RecipeConfig
from arctrm.errors import ConfigError
from arctrm.recipe.stages import plan

CONFIGS = Path(__file__).parents[2] / "configs"
OUT = Path("runs/all")
THREE = ("recipe.reader=0.6", "recipe.trm=0.15", "recipe.joint=0.25")
"""Shares of a recipe in which TRM has a stage of its own."""


def read(*sets, files=("arc1_1h",)):
    return load_config(JointConfig, [CONFIGS / f"{f}.toml" for f in files], sets, environ={})


def lengths(planned):
    return {s.name: s.config.training.schedule.budget for s in planned.stages}


@pytest.mark.parametrize("name", ["arc1_1h", "arc2_1h"])
def test_the_shipped_recipes_are_an_hour_of_which_one_key_makes_less(name):
    for budget, minutes in (((), 50), (("recipe.budget=5m",), 5)):
        config = read(*budget, files=[name])
        planned = plan(config, OUT)
        assert sum(lengths(planned).values()) == pytest.approx(60 * minutes)
        assert list(lengths(planned)) == ["reader", "joint"]
        assert config.recipe.trm == 0
        shares = config.recipe.reader, config.recipe.joint
        expected = [60 * minutes * share for share in shares]
        assert list(lengths(planned).values()) == pytest.approx(expected)
        assert planned.evaluation.evaluation.test_set == config.data.test_set
        assert planned.evaluation.checkpoint == OUT / "joint"


def test_stages_have_the_tables_of_the_single_commands():
    config = read(
        "seed=7",
        *THREE,
        "recipe.trm_data.num_aug=12",
        "recipe.trm_data.weights={ evaluation = 3.0 }",
        "recipe.trm_training.halt_max_steps=4",
    )
    reader, trm, joint = (stage.config for stage in plan(config, OUT).stages)
    assert (reader.model, trm.model) == ("reader", "trm")
    assert {c.seed for c in (reader, trm, joint)} == {7}
    assert reader.reader == trm.reader == joint.reader == config.reader
    assert reader.trm == trm.trm == joint.trm == config.trm
    assert joint.data == config.data
    assert reader.data == config.data.model_copy(update={"test_pair_weight": 0.0})
    assert (trm.data.num_aug, trm.data.weights) == (12, {"evaluation": 3.0})
    assert trm.data.subsets == config.data.subsets
    assert reader.training.optimiser == config.recipe.reader_training.optimiser
    assert trm.training.halt_max_steps == 4
    assert joint.training.optimiser == config.training.optimiser
    assert (joint.reader_checkpoint, joint.trm_checkpoint) == (OUT / "reader", OUT / "trm")
    assert joint.recipe == RecipeConfig()
    assert joint.tracking.run_name == "all-joint"


def test_a_stage_without_a_share_is_left_out_and_its_checkpoint_used():
    shares = ("recipe.reader=0", "recipe.trm=0.5", "recipe.joint=0.5")
    planned = plan(read(*shares, "reader_checkpoint=bundles/reader"), OUT)
    assert lengths(planned) == {"trm": 1500, "joint": 1500}
    joint = planned.stages[-1].config
    assert joint.reader_checkpoint == Path("bundles/reader")
    assert joint.trm_checkpoint == OUT / "trm"


def test_the_readers_of_an_ensemble_share_the_time_and_differ_by_their_seeds():
    planned = plan(read("seed=7", "recipe.readers=3"), OUT)
    of_each = dict.fromkeys(("reader", "reader2", "reader3"), 3000 * 0.96 / 3)
    assert lengths(planned) == pytest.approx({**of_each, "joint": 120})
    *readers, joint = (stage.config for stage in planned.stages)
    assert [c.seed for c in readers] == [7, 10_007, 20_007]
    first = readers[0].model_dump(exclude={"seed", "tracking"})
    assert all(c.model_dump(exclude={"seed", "tracking"}) == first for c in readers)
    assert joint.reader_checkpoint == OUT / "reader"
    assert joint.ensemble_checkpoints == (OUT / "reader2", OUT / "reader3")


def test_steps_are_shared_like_time():
    planned = plan(read(*THREE, "recipe.max_steps=100", "recipe.evaluate=false"), OUT)
    assert [s.config.training.schedule.max_steps for s in planned.stages] == [60, 15, 25]
    assert set(lengths(planned).values()) == {None}
    assert planned.evaluation is None


def test_without_a_length_there_is_no_recipe():
    assert not JointConfig().recipe.is_given
    assert not read(files=["joint"]).recipe.is_given


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["recipe.reader=1"], ["--set", "recipe.reader = 1", "sum to 1.04", "change one"]),
        (["recipe.joint=0", "recipe.trm=0.4"], ["recipe.joint = 0", "above 0"]),
        (["recipe.budget=null"], ["no length of the recipe", "set recipe.budget"]),
        (["epochs=2"], ["epochs = 2 contradicts", "leave one of them out"]),
        ([*THREE, "trm_checkpoint=runs/x"], ["trm_checkpoint = 'runs/x'", "recipe.trm = 0.15"]),
        (
            ["llama_model=a/b", "reader.input_attention=causal", "reader.inverse_share=0"],
            ["llama_model = 'a/b'", "set recipe.reader = 0"],
        ),
        (
            ["recipe.readers=2", 'ensemble_checkpoints=["runs/x"]'],
            ["ensemble_checkpoints contradicts recipe.readers = 2", "leave one of them out"],
        ),
        (["recipe.eval=true"], ["unknown key recipe.eval", "recipe.eval"]),
    ],
)
def test_a_contradiction_is_one_sentence(sets, parts):
    with pytest.raises(ConfigError) as caught:
        read(*sets)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_trained_on_is_not_scored():
    with pytest.raises(ConfigError, match=r"data.test_set = 'evaluation' is what training keeps"):
        plan(read("recipe.evaluation.evaluation.test_set=training"), OUT)
    held = ("data.held_out=20", "recipe.evaluation.evaluation.held_out=20")
    planned = plan(read("recipe.evaluation.evaluation.test_set=training", *held), OUT)
    assert planned.evaluation.evaluation.held_out == 20


def test_a_stage_that_cannot_be_trained_is_named():
    with pytest.raises(ConfigError, match=r"recipe.reader_training: training.tokens_per_batch"):
        plan(read("recipe.reader_training.tokens_per_batch=1024"), OUT)
