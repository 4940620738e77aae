"""`pretrain` and `joint`: what is trained, from where, on what, for how long; what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_steps import SEVEN
from training_runs import flat, log_lines, new_run, numbers_of, small, small_joint

from arctrm.checkpoints import latest_checkpoint, read_meta, read_model, read_trunk
from arctrm.config import DataConfig, JointConfig
from arctrm.data.base_set import build, prepare
from arctrm.data.task import Pair
from arctrm.errors import CheckpointError, ConfigError, OverlapError
from arctrm.model.trunk import TASK_TABLES
from arctrm.train.run import joint, pretrain, with_data_path
from helpers import random_grid, random_task, write_tasks


def small_tasks(names="abcd", seed=0):
    rng = np.random.default_rng(seed)
    return [random_task(rng, name, side=3) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data") / "mine", small_tasks())


def own(folder, **changes):
    return {"data.subsets": [str(folder)], "data.max_tasks": None, **changes}


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A run of both voices, all parameters moved away from where they began."""
    out = tmp_path_factory.mktemp("done")
    changes = {"data.scaling.share": 0.5, "trunk.injection": True}
    pretrain(small(out, own(folder, **changes)))
    return out


def test_every_line_has_the_seven_metrics_and_those_of_the_reader(done):
    for line in log_lines(done):
        assert set(SEVEN) < line.keys()
        assert 0 <= line["exact_match"] <= line["shape_match"] <= 1
        assert 0 < line["cell_accuracy"] < 1
        assert line["reader_loss"] > 0
        assert line["avg_trm_steps"] >= 1
    assert log_lines(done)[-1]["examples"] > 4


@pytest.mark.parametrize(
    ("voice", "voices"), [("reader", ("reader",)), ("trm", ("trm",)), ("both", ("reader", "trm"))]
)
def test_a_checkpoint_says_which_voices_and_tasks_it_has(folder, tmp_path, voice, voices):
    pretrain(small(tmp_path, own(folder, voice=voice, **{"training.schedule.max_steps": 1})))
    meta = read_meta(tmp_path)
    assert meta.voices == voices
    assert meta.task_ids == ("a", "b", "c", "d")
    base = prepare(small(None, own(folder)).data)
    assert list(meta.task_fingerprints) == base.task_fingerprints()
    assert meta.data_fingerprint == base.meta.fingerprint
    assert {name.partition(".")[0] for name in read_model(tmp_path)} == {"trunk"}
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"] == meta.config
    assert record["data_fingerprint"] == base.meta.fingerprint


def test_embeddings_follow_the_content_of_the_tasks_and_new_ones_start_from_the_mean(
    done, tmp_path, capsys
):
    old, new = small_tasks(), small_tasks("n", seed=9)
    tasks = [replace(old[2], id="1"), replace(new[0], id="2"), replace(old[0], id="a")]
    tasks.append(replace(old[3], id="b"))  # the name of another task
    changes = own(write_tasks(tmp_path / "tasks", tasks), checkpoint=str(done))
    run = new_run(tmp_path / "run", {**changes, "data.scaling.share": 0.5})
    trunk, there = run.model["trunk"].state_dict(), read_trunk(done)[0].state_dict()
    for table in TASK_TABLES:
        for row, known in ((0, 2), (2, 0), (3, 3)):
            assert torch.equal(trunk[table][row], there[table][known])
        torch.testing.assert_close(trunk[table][1], there[table].mean(0))
    for name, tensor in there.items():
        if name not in TASK_TABLES:
            assert torch.equal(trunk[name], tensor), name
    assert "knows 3 of 4 tasks" in " ".join(capsys.readouterr().err.split())
    assert run.meta.notes["start"]["step"] == 4
    assert (run.step, run.elapsed) == (0, 0.0)


def test_a_trm_that_starts_from_a_reader_tells_colours_as_the_reader_does(folder, tmp_path):
    pretrain(small(tmp_path / "reader", own(folder, voice="reader")))
    run = new_run(tmp_path / "trm", own(folder, voice="trm", checkpoint=str(tmp_path / "reader")))
    trunk = run.model["trunk"]
    assert torch.equal(trunk.own_head.weight, trunk.head.weight[:10])


def test_a_frozen_reader_stays_as_it_is_and_trm_learns_by_its_own_layers(folder, tmp_path):
    pretrain(small(tmp_path / "reader", own(folder, voice="reader")))
    start = {"trm_checkpoint": str(tmp_path / "reader"), "llama_frozen": True}
    frozen = own(folder, **start, **{"trunk.own_layers": 1, "trm.draft_share": 0.5})
    joint(small_joint(tmp_path / "both", frozen))
    before, after = (read_trunk(tmp_path / name)[0] for name in ("reader", "both"))
    own_parts, kept = after.trm_parameters(), before.state_dict()
    assert any(name.startswith("own.layers.0.") for name in own_parts)
    for name, tensor in after.state_dict().items():
        if name not in own_parts:
            assert torch.equal(tensor, kept[name]), name
    for number, (one, its_start) in enumerate(
        zip(after.own.layers[0].parameters(), before.layers[-1].parameters(), strict=True)
    ):
        assert not torch.equal(one, its_start), number
    assert read_meta(latest_checkpoint(tmp_path / "both")).voices == ("reader", "trm")


def test_a_frozen_reader_has_to_be_there(folder, tmp_path):
    pretrain(small(tmp_path / "trm", own(folder, voice="trm")))
    start = {"trm_checkpoint": str(tmp_path / "trm"), "llama_frozen": True}
    with pytest.raises(CheckpointError, match="holds no reader to be frozen"):
        joint(small_joint(tmp_path / "both", own(folder, **start)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trunk.hidden_size": 32}, "trunk.hidden_size = 16 there, 32 here"),
        ({"trunk.num_heads": 1}, "trunk.num_heads = 2 there, 1 here"),
        ({"trunk.rope_base": 50.0}, "trunk.rope_base = 100.0 there, 50.0 here"),
    ],
)
def test_a_checkpoint_of_another_trunk_is_refused(done, folder, tmp_path, changes, said):
    with pytest.raises(CheckpointError) as caught:
        new_run(tmp_path, own(folder, checkpoint=str(done), **changes))
    assert said in str(caught.value)


def test_a_bundled_name_replaces_the_subsets_and_nothing_is_evaluated():
    shipped = {
        "data.subsets": ["training", "evaluation"],
        "data.test_set": "evaluation",
        "data.weights": {"evaluation": 2.0, "training": 3.0},
    }
    data = with_data_path(small_joint(None, {**shipped, "data_path": "training"})).data
    assert (data.subsets, data.test_set, data.weights) == (("training",), None, {"training": 3.0})
    data = with_data_path(small_joint(None, {**shipped, "data_path": "evaluation"})).data
    assert (data.subsets, data.test_set) == (("evaluation",), "evaluation")
    assert data.weights == {"evaluation": 2.0}
    config = small_joint(None, shipped)
    assert with_data_path(config) is config


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_or_a_file_of_tasks_is_trained_on(folder, tmp_path, what):
    path = folder if what == "folder" else folder / "b.json"
    changes = {"data_path": str(path), "data.max_tasks": None, "training.schedule.max_steps": 1}
    joint(small_joint(tmp_path, changes))
    meta = read_meta(tmp_path)
    assert meta.task_ids == (("a", "b", "c", "d") if what == "folder" else ("b",))
    assert meta.config["data"]["subsets"] == [str(path)]
    joint(small_joint(tmp_path, {**changes, "training.schedule.max_steps": 2}), resume=True)


def test_a_built_set_is_opened_with_what_it_was_built_from(folder, tmp_path):
    source = DataConfig(subsets=(str(folder), "training"), test_set=str(folder), max_tasks=2)
    build(source, tmp_path / "set")
    config = small_joint(tmp_path / "run", {"data_path": str(tmp_path / "set")})
    resolved = with_data_path(config)
    assert resolved.data.subsets == source.subsets
    assert resolved.data.test_set == str(folder)
    assert with_data_path(resolved) == resolved
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"path": tmp_path / "other"})}
    )
    with pytest.raises(ConfigError, match=r"data_path = .*set' contradicts data\.path = .*other"):
        with_data_path(other)


def test_the_guard_stays_on_for_a_named_test_set(tmp_path):
    tasks = small_tasks("xy")
    evaluated = write_tasks(tmp_path / "evaluated", tasks[:1])
    leak = replace(tasks[1], demonstrations=tasks[1].demonstrations + tasks[0].test)
    subsets = [str(evaluated), str(write_tasks(tmp_path / "leaking", [leak]))]
    changes = {"data.subsets": subsets, "data.test_set": subsets[0], "data.max_tasks": None}
    with pytest.raises(OverlapError, match="y"):
        joint(small_joint(tmp_path / "run", changes))


def test_a_pair_shown_backwards_counts_where_inverse_tasks_are_trained(tmp_path):
    tasks, rng = small_tasks("xy"), np.random.default_rng(5)
    pair = Pair(random_grid(rng, 3, 3), random_grid(rng, 2, 2))
    backwards = Pair(pair.output, pair.input)
    evaluated = write_tasks(tmp_path / "evaluated", [replace(tasks[0], test=(pair,))])
    leak = replace(tasks[1], demonstrations=(*tasks[1].demonstrations, backwards))
    subsets = [str(evaluated), str(write_tasks(tmp_path / "leaking", [leak]))]
    changes = {"data.subsets": subsets, "data.test_set": subsets[0], "data.max_tasks": None}
    changes |= {"training.schedule.max_steps": 1}
    pretrain(small(tmp_path / "forwards", changes))
    with pytest.raises(OverlapError):
        pretrain(small(tmp_path / "both", {**changes, "reader.inverse_share": 0.2}))


def test_epochs_end_the_run_and_a_resumed_one_at_the_same_step(folder, tmp_path):
    changes = {
        "data_path": str(folder),
        "data.max_tasks": None,
        "epochs": 40,
        "training.checkpoint_every_steps": 2,
        "training.keep_last": 99,
    }
    config = small_joint(tmp_path / "run", changes)
    joint(config)
    pairs = prepare(with_data_path(config).data).num_pairs
    lines = log_lines(tmp_path / "run")
    assert lines[-1]["examples"] == pytest.approx(40 * pairs, rel=0.3)
    last = lines[-1]["step"]
    before = numbers_of(tmp_path / "run")
    shutil.rmtree(latest_checkpoint(tmp_path / "run"))
    joint(config, resume=True)
    assert read_meta(tmp_path / "run").step == last
    assert numbers_of(tmp_path / "run") == before


def test_batch_size_bounds_the_sequences_of_a_batch(folder, tmp_path):
    changes = {"data_path": str(folder), "data.max_tasks": None, "batch_size": 3}
    joint(small_joint(tmp_path, {**changes, "training.schedule.max_steps": 1}))
    assert log_lines(tmp_path)[-1]["examples"] == 6  # three of each voice


@pytest.mark.parametrize("is_joint", [False, True])
def test_a_dry_run_names_data_parameters_memory_and_length_and_writes_nothing(
    folder, tmp_path, is_joint, capsys
):
    config = (small_joint if is_joint else small)(tmp_path / "run", own(folder))
    (joint if is_joint else pretrain)(config, dry_run=True)
    text = " ".join(capsys.readouterr().out.split())
    run = new_run(tmp_path / "other", own(folder))
    tables = run.model["trunk"].task_emb.numel() * len(TASK_TABLES)
    assert f"trunk {len(flat(run.model)) - tables:,}, task embeddings {tables:,}" in text
    for said in ("4, 16", "GiB per process", "4 steps", "4,096 tokens x 1"):
        assert said in text
    assert not (tmp_path / "run").exists()


def test_what_was_trained_on_is_not_scored():
    changes = {"evaluate": True, "data.subsets": ["training", "evaluation"]}
    config = small_joint(None, {**changes, "data.test_set": None})
    with pytest.raises(ConfigError, match=r"evaluation\.test_set = 'evaluation', but data\.test_"):
        joint(config, dry_run=True)


def test_a_graph_that_is_not_possible_is_refused(folder, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("possible here")
    with pytest.raises(ConfigError, match=r"training\.cuda_graph = 'on'.*bfloat16 on a GPU"):
        new_run(tmp_path, own(folder, **{"training.cuda_graph": "on"}))


def test_joint_scores_what_it_has_trained(folder, tmp_path, capsys):
    changes = own(folder, evaluate=True, **{"data.test_set": str(folder)})
    changes |= {"evaluation.test_set": str(folder), "evaluation.max_tasks": 1}
    changes |= {"inference.views": 1, "inference.steps": 1, "training.schedule.max_steps": 1}
    joint(small_joint(tmp_path, changes))
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert scores
    assert "training 0:" in capsys.readouterr().err


def hub(folder, model, mode, **changes):
    keys = {
        "llama_model": str(model),
        "llama_frozen": mode == "frozen",
        "hub.mode": mode,
        "hub.max_pairs": 3,
        "hub.max_tokens": 256,
        "coupling.adapter_heads": 2,
        "coupling.back": True,
        "coupling.reader_tokens_per_batch": 1024,
        "training.checkpoint_every_steps": 2,
    }
    return own(folder, **{**keys, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_a_hub_reader_is_trained_saved_and_resumed_exactly(folder, hub_model, tmp_path, mode):
    changes = hub(folder, hub_model, mode, **{"training.keep_last": 9})
    joint(small_joint(tmp_path / "run", changes))
    weights, before = read_model(tmp_path / "run"), numbers_of(tmp_path / "run")
    parts = {name.partition(".")[0] for name in weights}
    assert parts == {"trunk", "adapters"} | ({"hub"} if mode != "frozen" else set())
    assert read_meta(tmp_path / "run").voices == ("trm",)
    shutil.rmtree(latest_checkpoint(tmp_path / "run"))
    joint(small_joint(tmp_path / "run", changes), resume=True)
    assert numbers_of(tmp_path / "run") == before
    for name, tensor in read_model(tmp_path / "run").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.slow
def test_a_hybrid_starts_from_adapters_and_reader_of_another(folder, hub_model, tmp_path):
    joint(small_joint(tmp_path / "old", hub(folder, hub_model, "lora")))
    starts = {"trm_checkpoint": str(tmp_path / "old"), "reader_checkpoint": str(tmp_path / "old")}
    changes = hub(folder, hub_model, "lora", **starts, **{"training.schedule.max_steps": 1})
    run = new_run(tmp_path / "new", changes, JointConfig)
    there = read_model(tmp_path / "old")
    assert there.keys() == run.model.state_dict().keys()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, there[name]), name
