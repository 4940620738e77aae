"""`arctrm pretrain` with model = "reader": the loop of TRM, its promises for the reader."""

import shutil
import signal
import subprocess
import sys

import pytest
import runs
import torch
from pydantic import ValidationError
from runs import (
    ONE_THREAD,
    command,
    end_of,
    expected_after_one_step,
    numbers_of,
    plain,
    refused,
    start,
    wait_for_checkpoint,
)

from arctrm.config import PretrainConfig
from arctrm.config.reader import PAIR_TOKENS
from arctrm.data.build import prepare
from arctrm.errors import CheckpointError
from arctrm.training import pretrain
from arctrm.training.checkpoints import latest_checkpoint, read_meta, read_model, read_rank
from arctrm.training.estimate import READER_TOKENS_PER_PAIR, block_parameters
from arctrm.training.pretrain import describe
from arctrm.training.stages import new_model

pytestmark = pytest.mark.usefixtures("one_thread")

READER = {
    "model": "reader",
    "reader.hidden_size": 16,
    "reader.num_heads": 2,
    "reader.num_layers": 1,
    "training.tokens_per_batch": 2048,
}
FORMS = {
    "pair": {},
    "task": {"reader.sequence": "task", "reader.max_tokens": 2048, "reader.max_pairs": 3},
}
FLAGS = {
    **READER,
    **FORMS["task"],
    "data.subsets": '["training"]',
    "data.test_set": "",
    "data.max_tasks": "2",
    "data.num_aug": "8",
    "training.log_every": "7",
    "training.checkpoint_every_steps": "10",
    "training.schedule.max_steps": "30",
    "training.schedule.warmup_steps": "5",
}


@pytest.fixture
def reader(tiny):
    """Build a configuration from `READER` and dotted overrides."""
    return lambda changes=None: tiny({**READER, **(changes or {})})


# -- resume


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FORMS["task"],
        {"training.grad_accum": 2, "training.optimiser.clip_norm": 0.5},
        {"training.ema_decay": 0.0, "training.optimiser.kind": "adamw"},
        {"reader.task_embedding": False},
        {"reader.gradient_checkpointing": True},
        {"reader.injection": True, "reader.loops": 2},
        {"reader.scaling.share": 0.5, "reader.scaling.shapes": ("pad", "stretch")},
        {"reader.mosaic_share": 0.5, "reader.inverse_share": 0.3},
    ],
    ids=[
        "pair",
        "task",
        "grad_accum",
        "adamw_no_ema",
        "no_task_embedding",
        "checkpointed",
        "injected",
        "scaled",
        "mosaics",
    ],
)
def test_every_variant_resumes_exactly(reader, tmp_path, changes):
    steps = {"training.schedule.max_steps": 8, "training.checkpoint_every_steps": 3}
    config = reader({**changes, **steps, "training.keep_last": 5})
    pretrain.run(config, tmp_path / "whole", False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in (6, 8):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{later:08d}")
    torch.manual_seed(99)
    pretrain.run(config, tmp_path / "cut", True)
    assert end_of(tmp_path / "cut", 8) == end_of(tmp_path / "whole", 8)
    assert numbers_of(tmp_path / "cut") == numbers_of(tmp_path / "whole")
    whole, cut = (read_rank(latest_checkpoint(tmp_path / run), 0) for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    runs.finish(out, FLAGS)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_a_stopped_run_resumes_to_the_same_bytes(how, whole, tmp_path):
    process = start(tmp_path, FLAGS)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in errors
    assert 10 <= read_meta(latest_checkpoint(tmp_path)).step < 30
    runs.finish(tmp_path, FLAGS, "--resume")
    assert end_of(tmp_path, 30) == end_of(whole, 30)
    assert numbers_of(tmp_path) == numbers_of(whole)


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_the_seed_decides_the_run(reader, tmp_path, changes):
    ends = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = reader(changes).model_copy(update={"seed": seed})
        pretrain.run(config, tmp_path / name, False)
        ends.append(end_of(tmp_path / name, 4))
    assert ends[0] == ends[1]
    assert ends[0][0] != ends[2][0]


# -- what a run leaves


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished run to be copied."""
    out = tmp_path_factory.mktemp("done")
    pretrain.run(tiny({**READER, "training.schedule.max_steps": 40}), out, False)
    return out


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


def test_the_loss_falls_and_the_metrics_have_the_names_of_trm(done):
    lines = numbers_of(done)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    for line in lines:
        assert line["loss"] == line["cell_loss"]
        assert line["halt_loss"] == line["avg_trm_steps"] == 0
        assert 0 <= line["exact_match"] <= line["shape_match"] <= 1
        assert 0 < line["cell_accuracy"] < 1
    assert lines[-1]["examples"] > len(lines)


def test_a_checkpoint_holds_the_model_and_says_which_it_is(done, reader):
    path = latest_checkpoint(done)
    meta = read_meta(path)
    assert meta.config["model"] == "reader"
    assert meta.config["reader"]["hidden_size"] == 16
    expected = new_model(reader(), prepare(reader().data)).state_dict()
    for ema in (False, True):
        got = read_model(path, ema=ema)
        assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in expected.items()}
    assert set(read_rank(path, 0)) >= {"carry.0.queue", "carry.0.counts"}


def test_resuming_as_another_model_or_another_reader_is_refused(tiny, reader, copy):
    before = numbers_of(copy)
    steps = {"training.schedule.max_steps": 40}
    as_trm = tiny({"training.tokens_per_batch": 2048, **steps})
    text = refused(CheckpointError, lambda: pretrain.run(as_trm, copy, True))
    assert 'model = "reader" there, "trm" now' in text
    for key, there, now in (
        ("reader.hidden_size", 16, 32),
        ("reader.sequence", '"pair"', '"task"'),
        ("reader.rope_base", 100.0, 50.0),
    ):
        value = now.strip('"') if isinstance(now, str) else now
        changed = reader({key: value, **steps, "training.tokens_per_batch": 4096})
        text = refused(CheckpointError, lambda config=changed: pretrain.run(config, copy, True))
        assert f"{key} = {there} there, {now} now" in text
    assert numbers_of(copy) == before


def test_a_finished_run_goes_on_with_more_steps(reader, copy):
    pretrain.run(reader({"training.schedule.max_steps": 42}), copy, True)
    assert read_meta(latest_checkpoint(copy)).step == 42


# -- before a run


def test_the_dry_run_names_the_reader_s_parameters_and_cost(reader):
    config = reader()
    base = prepare(config.data)
    text = plain(describe(config))
    trunk = sum(p.numel() for p in new_model(config, base).parameters()) - 2 * 16
    assert f"2, {base.num_pairs}" in text
    assert f"trunk {trunk:,}, task embeddings 32" in text
    assert "GiB" in text
    assert "4 steps" in text


def test_the_estimate_counts_the_matrices_that_the_reader_has(reader):
    config = reader({"reader.num_layers": 3, "reader.hidden_size": 32})
    model = new_model(config, prepare(config.data))
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    assert block_parameters(config.reader) == sum(p.numel() for p in matrices)


def test_the_estimate_s_length_of_a_pair_is_that_of_the_training_mix():
    base = prepare(PretrainConfig().data)
    areas = base.pairs[:, [4, 7]] * (base.pairs[:, [5, 8]] + 1)
    assert areas.sum(1).mean() + 3 == pytest.approx(READER_TOKENS_PER_PAIR, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training.tokens_per_batch": PAIR_TOKENS - 1}, ["reader.sequence", str(PAIR_TOKENS)]),
        (
            {"training.tokens_per_batch": 4095, "reader.sequence": "task"},
            ["reader.sequence", "reader.max_tokens", "4096 or more"],
        ),
    ],
    ids=["pair", "task"],
)
def test_a_batch_without_room_for_a_sequence_is_refused(reader, changes, named):
    with pytest.raises(ValidationError) as caught:
        reader(changes)
    text = caught.value.errors()[0]["msg"]
    assert f"training.tokens_per_batch = {changes['training.tokens_per_batch']}" in text
    for part in named:
        assert part in text


def test_the_smallest_allowed_batch_is_accepted(reader, tiny):
    assert reader({"training.tokens_per_batch": PAIR_TOKENS}).reader.longest_sequence == PAIR_TOKENS
    tiny({"model": "trm", "training.tokens_per_batch": 1024})  # the reader's bound is not TRM's


def test_heads_that_do_not_divide_the_width_are_refused_with_widths_that_fit(reader):
    with pytest.raises(ValidationError, match=r"reader\.hidden_size = 20 .*use 16 or 32"):
        reader({"reader.hidden_size": 20})


# -- two processes


@pytest.mark.slow
def test_two_processes_average_their_gradients_into_one_checkpoint(reader, tmp_path):
    changes = {
        **FORMS["task"],
        "training.schedule.max_steps": "1",
        "training.schedule.warmup_steps": "0",
        "training.optimiser.kind": "adamw",
        "training.optimiser.weight_decay": "0.1",
    }
    more = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, *command(tmp_path, FLAGS, *more)],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    path = latest_checkpoint(tmp_path)
    assert read_meta(path).world_size == 2
    queues = [read_rank(path, rank)["carry.0.queue"] for rank in (0, 1)]
    assert not torch.equal(*queues)
    for name, weight in expected_after_one_step(reader(changes), tmp_path).items():
        torch.testing.assert_close(read_model(path, ema=False)[name], weight, msg=name)
