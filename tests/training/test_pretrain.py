"""`arctrm pretrain` on real tasks: killed, interrupted and resumed runs end the same; refusals."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
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
from arctrm.data.build import prepare
from arctrm.errors import CheckpointError, ConfigError
from arctrm.training import pretrain
from arctrm.training.checkpoints import latest_checkpoint, read_meta, read_model, read_rank
from arctrm.training.pretrain import describe
from arctrm.training.stages import new_trm

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = {
    "data.subsets": '["training"]',
    "data.test_set": "",
    "data.max_tasks": "2",
    "data.num_aug": "8",
    "trm.hidden_size": "16",
    "trm.num_heads": "2",
    "trm.num_layers": "1",
    "trm.H_cycles": "2",
    "trm.L_cycles": "1",
    "trm.halt_max_steps": "2",
    "training.tokens_per_batch": "1024",
    "training.log_every": "7",
    "training.grad_accum": "2",
    "training.checkpoint_every_steps": "10",
    "training.schedule.max_steps": "60",
    "training.schedule.warmup_steps": "5",
}


def finish(out, *more):
    runs.finish(out, FLAGS, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    finish(out)
    return out


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(whole, tmp_path):
    process = start(tmp_path, FLAGS)
    wait_for_checkpoint(tmp_path, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert read_meta(latest_checkpoint(tmp_path)).step < 60
    finish(tmp_path, "--resume")
    assert end_of(tmp_path) == end_of(whole)
    assert numbers_of(tmp_path) == numbers_of(whole)
    assert [line["step"] for line in numbers_of(whole)] == list(range(7, 60, 7))


@pytest.mark.slow
def test_ctrl_c_saves_exits_130_and_resumes_to_the_same_bytes(whole, tmp_path):
    process = start(tmp_path, FLAGS)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    saved = read_meta(latest_checkpoint(tmp_path)).step
    assert 10 <= saved < 60
    assert f"saved step {saved}" in errors.strip().splitlines()[-1]
    finish(tmp_path, "--resume")
    assert end_of(tmp_path) == end_of(whole)
    assert numbers_of(tmp_path) == numbers_of(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"training.grad_accum": 2},
        {"training.ema_decay": 0.0},
        {"training.optimiser.kind": "adamw", "training.optimiser.clip_norm": 0.5},
        {"trm.layout": "reference", "trm.condition_cells": False, "trm.stablemax": True},
        {"trm.task_embedding": "per_view", "trm.task_embedding_init": "mean"},
        {"trm.scaling.share": 0.5, "trm.scaling.shapes": ("lines", "tile")},
    ],
    ids=["grad_accum", "no_ema", "adamw", "reference", "per_view", "scaled"],
)
def test_every_variant_resumes_exactly(tiny, tmp_path, changes):
    steps = {"training.schedule.max_steps": 8, "training.checkpoint_every_steps": 3}
    config = tiny({**changes, **steps, "training.keep_last": 5})
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


def test_the_seed_decides_the_run(tiny, tmp_path):
    ends = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny().model_copy(update={"seed": seed})
        pretrain.run(config, tmp_path / name, False)
        ends.append(end_of(tmp_path / name, 4))
    assert ends[0] == ends[1]
    assert ends[0][0] != ends[2][0]


def test_a_finished_run_goes_on_with_more_steps(tiny, tmp_path):
    pretrain.run(tiny(), tmp_path, False)
    pretrain.run(tiny({"training.schedule.max_steps": 6}), tmp_path, True)
    assert read_meta(latest_checkpoint(tmp_path)).step == 6


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    pretrain.run(tiny(), tmp_path, False)
    before = end_of(tmp_path, 4), numbers_of(tmp_path)
    pretrain.run(tiny(), tmp_path, True)
    assert (end_of(tmp_path, 4), numbers_of(tmp_path)) == before


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished run to be copied."""
    out = tmp_path_factory.mktemp("done")
    pretrain.run(tiny(), out, False)
    return out


@pytest.fixture
def copy(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "copy"))


def test_resume_needs_a_checkpoint(tiny, tmp_path):
    text = refused(CheckpointError, lambda: pretrain.run(tiny(), tmp_path / "new", True))
    assert "no checkpoint to resume from" in text
    assert "--resume" in text
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny, copy):
    before = end_of(copy, 4), numbers_of(copy)
    text = refused(CheckpointError, lambda: pretrain.run(tiny(), copy, False))
    assert "step_00000004" in text
    assert "--resume" in text
    assert (end_of(copy, 4), numbers_of(copy)) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trm.hidden_size": 32}, "trm.hidden_size = 16 there, 32 now"),
        ({"data.max_tasks": 3}, "data.max_tasks = 2 there, 3 now"),
        ({"training.tokens_per_batch": 2048}, "training.tokens_per_batch = 1024 there, 2048 now"),
    ],
)
def test_another_configuration_is_refused_with_both_values(tiny, copy, changes, named):
    before = numbers_of(copy)
    text = refused(CheckpointError, lambda: pretrain.run(tiny(changes), copy, True))
    assert named in text
    assert numbers_of(copy) == before


def test_what_does_not_change_the_weights_may_differ(tiny, copy):
    changes = {"training.log_every": 3, "training.keep_last": 1, "training.checkpoint_every": 9.0}
    pretrain.run(tiny(changes), copy, True)


def test_data_of_another_content_is_refused(tiny, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = {"train": [{"input": [[1, 2]], "output": [[2, 1]]}], "test": [{"input": [[3]]}]}
    (tasks / "a.json").write_text(json.dumps(task))
    config = tiny({"data.subsets": (str(tasks),)})
    pretrain.run(config, tmp_path / "run", False)
    task["train"][0]["output"] = [[2, 2]]
    (tasks / "a.json").write_text(json.dumps(task))
    text = refused(CheckpointError, lambda: pretrain.run(config, tmp_path / "run", True))
    saved = read_meta(latest_checkpoint(tmp_path / "run")).data_fingerprint[:12]
    assert f"trained on data {saved}, the data set is " in text


def test_fewer_processes_go_on_and_say_so(tiny, copy, capsys):
    path = latest_checkpoint(copy) / "checkpoint.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"world_size": 2}))
    more = {"training.schedule.max_steps": meta["step"] + 1}
    pretrain.run(tiny(more), copy, True)
    assert "written by 2 process(es), resumed with 1" in " ".join(capsys.readouterr().err.split())
    assert read_meta(latest_checkpoint(copy)).step == meta["step"] + 1


def test_per_view_embeddings_need_a_bound_on_the_views(tiny, tmp_path):
    config = tiny({"trm.task_embedding": "per_view", "data.num_aug": 0})
    text = refused(ConfigError, lambda: pretrain.run(config, tmp_path / "run", False))
    assert "data.num_aug" in text
    assert "trm.task_embedding" in text
    assert not (tmp_path / "run").exists()


def test_task_embeddings_are_one_per_task_or_one_per_task_and_view(tiny):
    for kind, rows in (("shared", 2), ("per_view", 2 * 8)):
        config = tiny({"trm.task_embedding": kind})
        model = new_trm(config.trm, prepare(config.data))
        assert model.puzzle_emb.weights.shape == (rows, 16)


def test_the_dry_run_names_pairs_parameters_and_memory(tiny):
    config = tiny()
    base = prepare(config.data)
    text = plain(describe(config))
    model = new_trm(config.trm, base)
    trunk = sum(p.numel() for p in model.parameters()) - 2 * 16
    assert f"2, {base.num_pairs}" in text
    assert f"trunk {trunk:,}, task embeddings 32" in text
    assert "GiB" in text
    assert base.meta.fingerprint[:16] in text
    assert "4 steps" in text


def test_the_dry_run_of_the_default_configuration_writes_nothing(tmp_path):
    data = PretrainConfig().data.model_copy(update={"path": tmp_path / "set"})
    text = plain(describe(PretrainConfig(data=data)))
    assert "evaluation (400 tasks)" in text
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_describes_a_set_that_is_already_built(tiny, tmp_path):
    config = tiny({"data.path": tmp_path / "set"})
    prepare(config.data)
    assert "2, " in plain(describe(config))


@pytest.mark.slow
def test_two_processes_average_their_gradients_into_one_checkpoint(tiny, tmp_path):
    changes = {
        "training.grad_accum": "1",
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
    rows = [read_rank(path, rank)["carry.0.rows"] for rank in (0, 1)]
    assert not torch.equal(*rows)
    for name, weight in expected_after_one_step(tiny(changes), tmp_path).items():
        torch.testing.assert_close(read_model(path, ema=False)[name], weight, msg=name)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(tmp_path):
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for launch, steps, more in (((), 1, ()), (two, 2, ("--resume",))):
        words = command(tmp_path, FLAGS | {"training.schedule.max_steps": str(steps)}, *more)
        done = subprocess.run(
            [sys.executable, *launch, *words],
            env=ONE_THREAD,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    path = latest_checkpoint(tmp_path)
    assert (read_meta(path).step, read_meta(path).world_size) == (2, 2)
    rows = [read_rank(path, rank)["carry.0.rows"] for rank in (0, 1)]
    assert not torch.equal(*rows)
