"""A checkpoint is whole or absent, is read strictly, and says in one sentence what is wrong."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import arctrm
from arctrm.checkpoints import (
    FORMAT_VERSION,
    CheckpointMeta,
    check_names,
    export_bundle,
    latest_checkpoint,
    read_meta,
    read_model,
    read_state,
    read_trunk,
    resolve_checkpoint,
    write_checkpoint,
)
from arctrm.config import PretrainConfig
from arctrm.errors import CheckpointError, ResourceError
from arctrm.model.trunk import Trunk

BUNDLED = Path(arctrm.__file__).parent / "bundled"
SIZES = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "loops": 2}
CONFIG = PretrainConfig(trunk=SIZES).model_dump(mode="json")
ALONE = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)


def meta(step, **fields):
    defaults = {
        "elapsed": 2.5,
        "examples": 7,
        "config": CONFIG,
        "voices": ("reader",),
        "task_ids": ("x", "y"),
        "task_fingerprints": ("1", "2"),
    }
    return CheckpointMeta(step=step, **(defaults | fields))


def write(run, step, *, processes=ALONE, keep_last=2, **model):
    weights = {"trunk.w": torch.full((3, 4), float(step))}
    named = {f"weights.{name}": tensor for name, tensor in weights.items()}
    named |= {f"ema.{name}": tensor + 1 for name, tensor in weights.items()}
    trainer, own = {"k": torch.tensor([step])}, {"carry": torch.arange(step)}
    return write_checkpoint(run, meta(step), model or named, trainer, own, processes, keep_last)


def steps_on_disk(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_whole(path, step):
    assert read_meta(path).step == step
    assert torch.equal(read_model(path, ema=False)["trunk.w"], torch.full((3, 4), float(step)))
    trainer, own = read_state(path, 0)
    assert int(trainer["k"]) == step
    assert len(own["carry"]) == step


def edit_meta(path, **fields):
    file = path / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_is_written_comes_back(tmp_path):
    path = write(tmp_path, 1234)
    assert path == tmp_path / "checkpoints" / "step_00001234"
    assert_whole(path, 1234)
    assert read_model(path)["trunk.w"][0, 0] == 1235
    back = read_meta(path)
    assert (back.config, back.task_ids, back.version) == (CONFIG, ("x", "y"), FORMAT_VERSION)
    assert back.torch_version == torch.__version__
    assert back.rows_of(("2", "unknown", "1")) == [1, None, 0]
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_weights_that_share_memory_can_be_written(tmp_path):
    shared = torch.ones(2, 3)
    tied = {"weights.trunk.a": shared, "weights.trunk.b": shared, "weights.trunk.c": shared.T}
    path = write(tmp_path, 1, **tied)
    for ema in (True, False):  # without a moving average the weights stand in
        assert torch.equal(read_model(path, ema=ema)["trunk.c"], shared.T)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step)
    assert steps_on_disk(tmp_path) == ["step_00000020", "step_00000030"]
    assert latest_checkpoint(tmp_path).name == "step_00000030"


def test_each_process_writes_its_own_state_and_the_last_one_in_completes(tmp_path):
    waits = []

    def barrier():
        waits.append(latest_checkpoint(tmp_path))
        if len(waits) == 2:  # process 0 has written its part; now process 1 does, to the end
            silent = SimpleNamespace(
                process_index=1, num_processes=2, wait_for_everyone=lambda: None
            )
            write(tmp_path, 3, processes=silent)

    two = SimpleNamespace(process_index=0, num_processes=2, wait_for_everyone=barrier)
    path = write(tmp_path, 3, processes=two)
    assert waits == [None, None, path]
    assert read_meta(path).world_size == 2
    assert torch.equal(read_state(path, 1)[1]["carry"], torch.arange(3))
    assert read_state(path, 2)[1] is None


def killed_at_event(run, step, count):
    """Write in a child that kills itself at the count-th file operation; True if it survived."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, _):
            nonlocal seen
            if event.startswith(("os.", "open", "shutil.")):
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            write(run, step, keep_last=1)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.slow
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path):
    write(tmp_path, 1, keep_last=1)
    step, count, survived = 1, 0, False
    while not survived:
        count += 1
        survived = killed_at_event(tmp_path, step + 1, count)
        latest = latest_checkpoint(tmp_path)
        assert read_meta(latest).step in (step, step + 1)
        step = read_meta(latest).step
        for path in {latest, *(tmp_path / "checkpoints").glob("step_*")}:
            assert_whole(path, read_meta(path).step)
    assert count > 10
    write(tmp_path, step + 1, keep_last=1)
    assert steps_on_disk(tmp_path) == [f"step_{step + 1:08d}"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    write(tmp_path, 1)
    calls = []

    def barrier():
        calls.append(None)
        if len(calls) == 2:
            aside = tmp_path / "checkpoints" / ".tmp-step_00000002"
            (aside / "checkpoint.json").symlink_to("/dev/full")

    full = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=barrier)
    with pytest.raises(ResourceError, match=r"checkpoints: the disk is full \(.* MiB free\)"):
        write(tmp_path, 2, processes=full)
    assert steps_on_disk(tmp_path) == ["step_00000001"]
    assert_whole(latest_checkpoint(tmp_path), 1)


def test_a_run_a_checkpoint_and_a_bundle_are_all_resolved(tmp_path):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    bundle = export_bundle(newest, tmp_path / "bundle")
    assert [resolve_checkpoint(path) for path in (tmp_path, newest, bundle)] == [
        newest,
        newest,
        bundle,
    ]
    assert read_meta(tmp_path).step == 2
    with pytest.raises(CheckpointError, match="gone: not a folder; give a run folder"):
        resolve_checkpoint(tmp_path / "gone")
    (tmp_path / "empty" / "checkpoints" / "step_00000009").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resolve_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", read_model),
        ("trainer.safetensors", lambda path: read_state(path, 0)),
        ("rank_0.safetensors", lambda path: read_state(path, 0)),
    ],
)
def test_missing_truncated_and_damaged_files_are_refused(tmp_path, name, read):
    path = write(tmp_path, 8)
    content = (path / name).read_bytes()
    os.truncate(path / name, len(content) - 4)
    with pytest.raises(CheckpointError, match=rf"{name}: .* \(\d+ bytes instead of \d+\)"):
        read(path)
    (path / name).write_bytes(b"\xff" * len(content))
    with pytest.raises(CheckpointError, match=f"{name}: missing or damaged"):
        read(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: .*No such file"):
        read(path)


def test_metadata_that_cannot_be_used_is_one_sentence(tmp_path):
    path = write(tmp_path, 1)
    for fields, said in (
        ({"version": 3}, "format version 3; upgrade"),
        ({"version": 2, "step": "many"}, "step .*integer"),
        ({"step": 1, "config": {**CONFIG, "trunk": {"hidden_size": 17}}}, "multiple of 8"),
    ):
        edit_meta(path, **fields)
        with pytest.raises(CheckpointError, match=said) as caught:
            read_meta(path)
        assert "\n" not in str(caught.value)
    for text in ("[]", '{"version": 1, "st'):
        (path / "checkpoint.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a checkpoint's metadata"):
            read_meta(path)


def test_a_retired_key_is_passed_over_at_its_old_default_and_refused_otherwise(tmp_path):
    path = write(tmp_path, 1)
    reader = {**CONFIG["reader"], "sequence": "pair", "dropout": 0.0}
    edit_meta(path, config={**CONFIG, "reader": reader})
    assert read_meta(path).config == CONFIG
    edit_meta(path, config={**CONFIG, "reader": {**reader, "dropout": 0.1}})
    with pytest.raises(CheckpointError, match=r"reader\.dropout = 0\.1, where only 0\.0 is left"):
        read_meta(path)


def test_names_and_shapes_that_differ_are_named_on_both_sides(tmp_path):
    got = {"a": torch.zeros(2, 3), "extra": torch.zeros(1)}
    check_names({"a": (2, 3), "extra": torch.Size([1])}, got, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_names({"a": (3, 3), "b": (1,), "c": (1,)}, got, tmp_path)
    for part in (
        "2 tensors missing, first 'b'",
        "1 unexpected, first 'extra'",
        "'a' has shape (2, 3), the model expects (3, 3)",
    ):
        assert part in str(caught.value)


def trunk_checkpoint(run, **fields):
    torch.manual_seed(0)
    trunk = Trunk(PretrainConfig(trunk=SIZES).trunk, 2)
    named = {f"weights.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    named |= {"weights.adapters.back.w": torch.ones(2)}
    return trunk, write_checkpoint(run, meta(7, **fields), named, {}, {}, ALONE)


def test_a_trunk_comes_back_without_what_is_beside_it(tmp_path):
    trunk, _ = trunk_checkpoint(tmp_path)
    back, told = read_trunk(tmp_path)
    assert told.step == 7
    for name, tensor in trunk.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_bundle_holds_one_set_of_weights_in_half_of_16_bits(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "trunk.layers.0.up.weight": torch.randn(512, 300) * 0.02,
        "trunk.layers.0.input_norm": torch.randn(512),
        "trunk.head.weight": torch.randn(9, 64),
        "trunk.task_emb": torch.randn(40, 64),
    }
    model = {f"weights.{name}": tensor for name, tensor in tensors.items()}
    model |= {f"ema.{name}": tensor * 1.5 for name, tensor in tensors.items()}
    checkpoint = write_checkpoint(tmp_path, meta(7), model, {}, {}, ALONE)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", card="small")
    assert {file.name for file in bundle.iterdir()} == {"checkpoint.json", "model.safetensors"}
    size = sum(tensor.numel() * 2 for tensor in tensors.values())
    assert (bundle / "model.safetensors").stat().st_size < 0.54 * size
    told, back = read_meta(bundle), read_model(bundle)
    assert told.notes == {"exported": "ema", "card": "small"}
    assert told.int8_group == 64
    assert back.keys() == tensors.keys()
    for name, tensor in back.items():
        expected = tensors[name] * 1.5
        assert tensor.dtype == torch.float32
        if name in ("trunk.layers.0.up.weight", "trunk.task_emb"):
            assert 0 < (tensor - expected).norm() / expected.norm() < 0.0075
        else:
            assert torch.equal(tensor, expected.bfloat16().float())
    again = read_model(export_bundle(bundle, tmp_path / "again"))
    for name, tensor in back.items():
        assert (again[name] - tensor).norm() <= 0.004 * tensor.norm()
    with pytest.raises(CheckpointError, match=r"has no rank_0\.safetensors"):
        read_state(bundle, 0)
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_bundle(checkpoint, bundle)


def test_the_weights_in_the_package_are_read(tmp_path):
    trunk, told = read_trunk(BUNDLED)
    assert "reader" in told.voices
    assert len(told.task_ids) == trunk.num_tasks == trunk.task_emb.shape[0]
    assert all(tensor.isfinite().all() for tensor in trunk.state_dict().values())
