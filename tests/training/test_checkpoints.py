"""A checkpoint is whole or absent, is read strictly, and says in one sentence what is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from arctrm.errors import CheckpointError, ResourceError
from arctrm.training.checkpoints import (
    FORMAT_VERSION,
    CheckpointMeta,
    check_id_map,
    check_names,
    check_same_config,
    export_bundle,
    latest_checkpoint,
    model_tensors,
    read_meta,
    read_model,
    read_rank,
    read_trainer,
    resolve_checkpoint,
    write_checkpoint,
)
from arctrm.training.files import disk_errors

CONFIG = {"seed": 0, "out": "a", "trm": {"hidden_size": 64, "betas": [0.9, 0.95]}}


def meta(step, **fields):
    defaults = {"elapsed": 2.5, "examples": 7, "config": CONFIG, "task_ids": ("x", "y")}
    return CheckpointMeta(step=step, **(defaults | fields))


def weights(step):
    return {"block.w": torch.full((3, 4), float(step)), "steps": torch.tensor(step)}


def write(run, step, *, ema=True, **options):
    averages = {name: tensor + 1 for name, tensor in weights(step).items()} if ema else None
    model = model_tensors(weights(step), averages)
    trainer, own = {"k": torch.tensor([step])}, {"carry": torch.arange(step)}
    return write_checkpoint(run, meta(step), model, trainer, own, **options)


def steps_on_disk(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_whole(path, step):
    assert read_meta(path).step == step
    assert torch.equal(read_model(path, ema=False)["block.w"], weights(step)["block.w"])
    assert int(read_trainer(path)["k"]) == step
    assert len(read_rank(path, 0)["carry"]) == step


def truncate(path):
    os.truncate(path, path.stat().st_size - 4)


def edit_meta(path, **fields):
    file = path / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_is_written_comes_back(tmp_path):
    path = write(tmp_path, 1234)
    assert path == tmp_path / "checkpoints" / "step_00001234"
    assert_whole(path, 1234)
    assert torch.equal(read_model(path, ema=True)["steps"], torch.tensor(1235))
    back = read_meta(path)
    assert (back.config, back.task_ids, back.version) == (CONFIG, ("x", "y"), FORMAT_VERSION)
    assert back.torch_version == torch.__version__


def test_files_are_as_readable_as_others_of_the_user(tmp_path):
    path = write(tmp_path, 1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_weights_that_share_memory_can_be_written(tmp_path):
    shared = torch.ones(2, 3)
    tied = model_tensors({"a": shared, "b": shared, "c": shared.T})
    path = write_checkpoint(tmp_path, meta(1), tied, {}, {})
    assert torch.equal(read_model(path, ema=False)["c"], shared.T)


def test_without_a_moving_average_the_weights_stand_in(tmp_path):
    path = write(tmp_path, 5, ema=False)
    assert torch.equal(read_model(path, ema=True)["steps"], torch.tensor(5))


def test_only_the_last_checkpoints_are_kept_and_never_not_the_newest(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, keep_last=2)
    assert steps_on_disk(tmp_path) == ["step_00000020", "step_00000030"]
    write(tmp_path, 5, keep_last=1)
    assert steps_on_disk(tmp_path) == ["step_00000005"]


def test_each_process_writes_its_own_state_and_the_last_one_in_completes(tmp_path):
    waits = []

    def barrier():
        waits.append(latest_checkpoint(tmp_path))
        if len(waits) == 2:  # process 0 has written its part; now process 1 does, to the end
            write(tmp_path, 3, rank=1, world_size=2)

    path = write(tmp_path, 3, world_size=2, barrier=barrier)
    assert waits == [None, None, path]
    assert read_meta(path).world_size == 2
    assert torch.equal(read_rank(path, 1)["carry"], torch.arange(3))
    with pytest.raises(CheckpointError, match=r"written by 2 process\(es\).*resume with 2"):
        read_rank(path, 2)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("second", [2, 1], ids=["next step", "same step again"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, second):
    write(tmp_path, 1, keep_last=1)
    count, newer = 0, 0
    survived = False
    while not survived:
        count += 1
        survived = killed_at_event(tmp_path, second, count)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        step = read_meta(latest).step
        assert step in (1, second)
        for path in {latest, *(tmp_path / "checkpoints").glob("step_*")}:
            assert_whole(path, read_meta(path).step)
        newer += step == second
        if step != 1:  # start the next round from the old state, temporaries of this one included
            write(tmp_path, 1, keep_last=1)
    assert count > 10
    assert newer >= 1
    write(tmp_path, second, keep_last=1)
    assert steps_on_disk(tmp_path) == [f"step_{second:08d}"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    write(tmp_path, 1)
    calls = []

    def barrier():
        calls.append(None)
        if len(calls) == 2:
            aside = tmp_path / "checkpoints" / ".tmp-step_00000002"
            (aside / "checkpoint.json").symlink_to("/dev/full")

    with pytest.raises(ResourceError, match=r"checkpoints: the disk is full \(.* MiB free\)"):
        write(tmp_path, 2, barrier=barrier)
    assert steps_on_disk(tmp_path) == ["step_00000001"]
    assert_whole(latest_checkpoint(tmp_path), 1)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_under_the_weights_loses_nothing(small_disk):
    write(small_disk, 1)
    with pytest.raises(ResourceError, match="the disk is full"):
        write_checkpoint(small_disk, meta(2), {"weights.w": torch.zeros(2**20)}, {}, {})
    assert steps_on_disk(small_disk) == ["step_00000001"]
    assert_whole(latest_checkpoint(small_disk), 1)
    write(small_disk, 3)


def test_an_interrupt_while_writing_leaves_nothing_half_written(tmp_path):
    write(tmp_path, 1)
    calls = []

    def barrier():
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, barrier=barrier)
    assert steps_on_disk(tmp_path) == ["step_00000001"]


def test_a_full_disk_as_safetensors_tells_it_is_recognised(tmp_path):
    with pytest.raises(ResourceError, match="disk is full"), disk_errors(tmp_path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(CheckpointError, match="cannot be written"), disk_errors(tmp_path):
        raise SafetensorError("I/O error: Permission denied (os error 13)")


def test_a_run_a_checkpoint_and_a_bundle_are_all_resolved(tmp_path):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    bundle = export_bundle(newest, tmp_path / "bundle", task_fraction=0.25)
    assert resolve_checkpoint(tmp_path) == newest
    assert resolve_checkpoint(newest) == newest
    assert resolve_checkpoint(bundle) == bundle


def test_a_bundle_holds_the_moving_average_once_and_nothing_for_training(tmp_path):
    checkpoint = write(tmp_path, 2)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", task_fraction=0.25)
    assert sorted(file.name for file in bundle.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]
    for ema in (False, True):
        assert torch.equal(read_model(bundle, ema=ema)["steps"], torch.tensor(3))
    assert read_meta(bundle).notes == {"exported": "ema", "task_fraction": 0.25}
    with pytest.raises(CheckpointError, match=r"has no trainer\.safetensors, so training cannot"):
        read_trainer(bundle)
    with pytest.raises(CheckpointError, match=r"has no rank_0\.safetensors"):
        read_rank(bundle, 0)
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_bundle(checkpoint, bundle)
    assert read_meta(bundle).step == 2


def layered(run, width=512, columns=300):
    """A checkpoint with the tensors of a layer, its moving average other than its weights."""
    torch.manual_seed(0)
    tensors = {
        "model.layers.0.up.weight": torch.randn(width, columns) * 0.02,
        "model.layers.0.norm.weight": torch.randn(width),
        "head.weight": torch.randn(9, 64),
    }
    average = {name: tensor * 1.5 for name, tensor in tensors.items()}
    model = model_tensors(tensors, average)
    return write_checkpoint(run, meta(7), model, {}, {}), average


def test_an_8_bit_bundle_has_half_the_size_and_nearly_the_weights(tmp_path):
    checkpoint, average = layered(tmp_path)
    whole = export_bundle(checkpoint, tmp_path / "16")
    half = export_bundle(checkpoint, tmp_path / "8", bits=8, card="small")
    sizes = [(bundle / "model.safetensors").stat().st_size for bundle in (whole, half)]
    assert sizes[1] < 0.53 * sizes[0]
    back, bfloat16 = read_model(half, ema=True), read_model(whole, ema=True)
    assert back.keys() == bfloat16.keys() == average.keys()
    for name, tensor in back.items():
        if name in ("model.layers.0.up.weight", "puzzle_emb.weights"):
            assert tensor.dtype == torch.float32
            assert (tensor - average[name]).norm() / average[name].norm() < 0.0075
        else:
            assert torch.equal(tensor, bfloat16[name])
    assert read_meta(half).notes == {"exported": "ema", "card": "small"}


def test_checkpoint_json_says_how_the_weights_are_stored(tmp_path):
    checkpoint, _ = layered(tmp_path)
    for bits, group in ((16, None), (8, 64)):
        bundle = export_bundle(checkpoint, tmp_path / str(bits), bits=bits)
        stored = read_meta(bundle)
        assert stored.int8_group == group
        names = set(stored.files["model.safetensors"].tensors)
        scales = {"scales.model.layers.0.up.weight"}
        assert names & scales == (scales if bits == 8 else set())
        content = json.loads((bundle / "checkpoint.json").read_text())
        assert content["int8_group"] == group
    assert read_meta(checkpoint).int8_group is None


def test_a_bundle_of_a_bundle_stays_what_it_is(tmp_path):
    checkpoint, _ = layered(tmp_path)
    once = export_bundle(checkpoint, tmp_path / "once", bits=8)
    twice = export_bundle(once, tmp_path / "twice", bits=8)
    wide = export_bundle(once, tmp_path / "wide", torch.float32)
    assert read_meta(wide).int8_group is None
    for name, tensor in read_model(once, ema=True).items():
        again = read_model(twice, ema=True)[name]
        assert (again - tensor).norm() <= 0.004 * tensor.norm()
        assert torch.equal(read_model(wide, ema=True)[name], tensor.float())


@pytest.mark.parametrize(("bits", "error"), [(6, 0.03), (5, 0.06), (4, 0.12)])
def test_fewer_bits_are_packed_and_read_back(tmp_path, bits, error):
    checkpoint, average = layered(tmp_path, columns=320)
    eight = export_bundle(checkpoint, tmp_path / "eight", bits=8)
    few = export_bundle(checkpoint, tmp_path / "few", bits=bits)
    assert read_meta(few).integer_bits == bits
    name = "model.layers.0.up.weight"
    stored = [load_file(b / "model.safetensors")[f"weights.{name}"] for b in (eight, few)]
    assert stored[1].numel() * 8 == stored[0].numel() * bits
    back = read_model(few, ema=True)[name]
    assert (back - average[name]).norm() < error * average[name].norm()
    edit_meta(few, integer_bits=8)
    with pytest.raises(CheckpointError, match=r"not stored as checkpoint\.json says"):
        read_model(few, ema=True)


def test_bundles_have_16_bits_or_one_of_the_narrow_sizes(tmp_path):
    with pytest.raises(ValueError, match=r"bits = 3 .* use 16, 8, 6, 5, 4"):
        export_bundle(write(tmp_path, 1), tmp_path / "bundle", bits=3)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("scales.model.layers.0.up.weight"), "missing, first 'scales.model"),
        (lambda t: t.pop("weights.model.layers.0.up.weight"), "missing, first 'weights.model"),
        (lambda t: t.update({"scales.other": torch.ones(2, 2)}), "unexpected, first 'scales.other"),
    ],
)
def test_an_8_bit_bundle_is_read_strictly(tmp_path, change, said):
    bundle = export_bundle(layered(tmp_path)[0], tmp_path / "bundle", bits=8)
    path = bundle / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    written = read_meta(bundle).files
    files = {name: record.model_dump(mode="json") for name, record in written.items()}
    files["model.safetensors"]["size"] = path.stat().st_size
    edit_meta(bundle, files=files)
    with pytest.raises(CheckpointError, match=said):
        read_model(bundle, ema=True)


def test_integers_are_never_taken_for_weights(tmp_path):
    bundle = export_bundle(layered(tmp_path)[0], tmp_path / "bundle", bits=8)
    edit_meta(bundle, int8_group=32)
    with pytest.raises(CheckpointError, match="with one scale for 32 columns of a row"):
        read_model(bundle, ema=True)
    edit_meta(bundle, int8_group=None)
    with pytest.raises(CheckpointError, match=r"not stored as checkpoint\.json says"):
        read_model(bundle, ema=True)
    edit_meta(bundle, int8_group=0)
    with pytest.raises(CheckpointError, match="int8_group"):
        read_model(bundle, ema=True)


def test_a_path_without_a_checkpoint_says_what_is_accepted(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000009").mkdir(parents=True)  # nothing in it
    with pytest.raises(CheckpointError, match="no checkpoint; give a run folder"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="gone: not a folder"):
        resolve_checkpoint(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", lambda path: read_model(path, ema=True)),
        ("trainer.safetensors", read_trainer),
        ("rank_0.safetensors", lambda path: read_rank(path, 0)),
    ],
)
def test_missing_truncated_and_damaged_files_are_told_apart(tmp_path, name, read):
    path = write(tmp_path, 8)
    content = (path / name).read_bytes()
    truncate(path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: truncated \(\d+ bytes, \d+ expected\)"):
        read(path)
    (path / name).write_bytes(b"\xff" * len(content))
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        read(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        read(path)


def test_a_file_with_other_tensors_than_recorded_is_refused(tmp_path):
    path = write(tmp_path, 8)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content.replace(b"ema.steps", b"ema.sleep"))
    with pytest.raises(CheckpointError, match=r"missing, first 'ema\.steps'.*first 'ema\.sleep'"):
        read_model(path, ema=True)


def test_metadata_that_cannot_be_used_is_one_sentence(tmp_path):
    path = write(tmp_path, 1)
    edit_meta(path, version=FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match=r"format version 2 is newer than 1.*upgrade"):
        read_meta(path)
    edit_meta(path, version=FORMAT_VERSION, step="many")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: step: .*integer"):
        read_meta(path)
    (path / "checkpoint.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: the whole file"):
        read_meta(path)
    (path / "checkpoint.json").write_text('{"version": 1, "st')
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: not JSON"):
        read_meta(path)
    (path / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
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


def test_id_maps_that_differ_are_named_at_the_first_row():
    check_id_map(("x", "y"), ["x", "y"])
    with pytest.raises(CheckpointError, match="row 1 is 'y' in ckpt and 'z' in the data"):
        check_id_map(("x", "y", "q"), ("x", "z", "w"), "ckpt", "the data")
    with pytest.raises(CheckpointError, match="row 2 is absent in checkpoint and 'z' in data"):
        check_id_map(("x", "y"), ("x", "y", "z"))


def test_a_config_that_differs_is_named_with_both_values():
    same = {"seed": 0, "out": Path("b"), "trm": {"hidden_size": 64, "betas": (0.9, 0.95)}}
    check_same_config(CONFIG, same, ignore=("out",))
    with pytest.raises(CheckpointError, match='out = "a" there, "b" now'):
        check_same_config(CONFIG, same)
    wider = same | {"trm": {"hidden_size": 128, "betas": (0.9, 0.95)}}
    with pytest.raises(CheckpointError, match=r"ckpt: trm\.hidden_size = 64 there, 128 now"):
        check_same_config(CONFIG, wider, ignore=("out",), where="ckpt")
    check_same_config(CONFIG, wider, ignore=("out", "trm"))
    with pytest.raises(CheckpointError, match=r"extra = absent there, true now"):
        check_same_config(CONFIG, same | {"extra": True}, ignore=("out",))
