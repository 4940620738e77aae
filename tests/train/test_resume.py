"""A run that was stopped, however, ends as the one that was not: the same bytes."""

import shutil
import signal
import time

import pytest
import torch
from training_runs import end_of, finish, numbers_of, saved_steps, small, start, wait_for_checkpoint

from arctrm.checkpoints import latest_checkpoint, read_meta, read_model
from arctrm.errors import CheckpointError
from arctrm.train.run import pretrain

LONG = {
    "trm.begin": 0.3,
    "training.grad_accum": 2,
    "training.log_every": 7,
    "training.checkpoint_every_steps": 8,
    "training.schedule.max_steps": 32,
    "training.schedule.warmup_steps": 5,
}


VARIANTS = {
    "reader": {"voice": "reader", "reader.inverse_share": 0.3, "reader.output_noise": 0.1},
    "trm": {"voice": "trm", "trm.supervision_steps": 2, "training.grad_accum": 2},
    "drafts": {
        "trm.draft_share": 0.5,
        "trm.draft_every": 2,
        "trm.drafted_pairs": 3,
        "trm.begin": 0.3,
    },
    "adamw without an average": {"training.ema_decay": 0.0, "training.optimiser.kind": "adamw"},
    "clipped": {"training.optimiser.clip_norm": 0.5, "trunk.gradient_checkpointing": True},
    "scaled": {"data.scaling.share": 0.5, "data.scaling.shapes": ["pad", "stretch"]},
}


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="both")]
    + [pytest.param(own, marks=pytest.mark.slow, id=name) for name, own in VARIANTS.items()],
)
def test_every_variant_resumes_exactly(tmp_path, changes):
    steps = {"training.schedule.max_steps": 8, "training.checkpoint_every_steps": 3}
    changes = {**steps, "training.keep_last": 5, **changes}
    pretrain(small(tmp_path / "whole", changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in (6, 8):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{later:08d}")
    torch.manual_seed(99)
    pretrain(small(tmp_path / "cut", changes), resume=True)
    assert end_of(tmp_path / "cut", 8) == end_of(tmp_path / "whole", 8)
    assert numbers_of(tmp_path / "cut") == numbers_of(tmp_path / "whole")


@pytest.mark.slow
def test_the_seed_decides_the_run(tmp_path):
    ends = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(small(tmp_path / name, {"seed": seed}))
        ends.append(end_of(tmp_path / name, 4)["model.safetensors"])
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    finish(out, LONG)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_a_stopped_process_resumes_to_the_same_bytes(how, whole, tmp_path):
    process = start(tmp_path, LONG)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in errors
    stopped = read_meta(tmp_path).step
    assert 8 <= stopped < 32
    if how == signal.SIGINT:
        assert f"saved step {stopped}" in " ".join(errors.split())
    finish(tmp_path, LONG, "--resume")
    assert end_of(tmp_path, 32) == end_of(whole, 32)
    assert numbers_of(tmp_path) == numbers_of(whole)
    assert [line["step"] for line in numbers_of(whole)] == [7, 14, 21, 28]
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_and_a_dead_one_does_not_hold_it(tmp_path):
    process = start(tmp_path, LONG)
    wait_for_checkpoint(tmp_path, process)
    with pytest.raises(CheckpointError, match=f"process {process.pid} works there"):
        pretrain(small(tmp_path, LONG), resume=True)
    process.kill()
    process.wait()
    process.stderr.close()
    left = tmp_path / "checkpoints" / f".tmp-{process.pid}-something"
    left.write_text("half")
    pretrain(small(tmp_path, {**LONG, "training.schedule.max_steps": 32}), resume=True)
    assert saved_steps(tmp_path)[-1] == 32
    assert not left.exists()


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps_and_otherwise_stays(tmp_path, capsys):
    pretrain(small(tmp_path))
    before = end_of(tmp_path, 4), numbers_of(tmp_path)
    pretrain(small(tmp_path), resume=True)
    assert "the run is finished at step 4; a longer" in " ".join(capsys.readouterr().err.split())
    assert (end_of(tmp_path, 4), numbers_of(tmp_path)) == before
    pretrain(small(tmp_path, {"training.schedule.max_steps": 6}), resume=True)
    assert read_meta(tmp_path).step == 6


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run to be copied."""
    out = tmp_path_factory.mktemp("done")
    pretrain(small(out))
    return out


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


def test_resuming_needs_a_checkpoint_and_beginning_an_empty_folder(copy, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from; leave out --resume"):
        pretrain(small(tmp_path / "new"), resume=True)
    assert not (tmp_path / "new").exists()
    before = end_of(copy, 4), numbers_of(copy)
    with pytest.raises(CheckpointError, match=r"holds a run \(step_00000004\); add --resume"):
        pretrain(small(copy))
    assert (end_of(copy, 4), numbers_of(copy)) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trunk.hidden_size": 32}, "trunk.hidden_size = 16 then, 32 now"),
        ({"voice": "reader"}, "voice = both then, reader now"),
        ({"trm.noise": 0.2}, "trm.noise = 0.1 then, 0.2 now"),
    ],
)
def test_a_run_is_resumed_with_the_configuration_that_it_began_with(copy, changes, named):
    before = end_of(copy, 4), numbers_of(copy)
    with pytest.raises(CheckpointError) as caught:
        pretrain(small(copy, changes), resume=True)
    assert named in str(caught.value)
    assert (end_of(copy, 4), numbers_of(copy)) == before


def test_other_data_is_refused(copy):
    meta = (latest_checkpoint(copy) / "checkpoint.json").read_text()
    fingerprint = read_meta(copy).data_fingerprint
    changed = meta.replace(fingerprint, "0" * 64)
    (latest_checkpoint(copy) / "checkpoint.json").write_text(changed)
    with pytest.raises(CheckpointError, match="trained on data 000000000000, the data set is"):
        pretrain(small(copy), resume=True)


@pytest.mark.slow
def test_two_processes_make_the_step_of_the_mean_gradient_and_resume_a_single_one(tmp_path):
    """The mean over two processes is the step of twice the batches, drawn by their two seeds."""
    one = {"training.schedule.max_steps": 1, "training.optimiser.kind": "adamw"}
    finish(tmp_path / "two", one, processes=2)
    meta = read_meta(tmp_path / "two")
    assert (meta.step, meta.world_size) == (1, 2)
    expected = mean_of_two(tmp_path / "apart", one)
    got = read_model(tmp_path / "two", ema=False)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, msg=name)
    pretrain(small(tmp_path / "single", one))
    said = finish(tmp_path / "single", {**one, "training.schedule.max_steps": 2}, "--resume",
                  processes=2)  # fmt: skip
    assert "written by 1 process(es), resumed with 2" in " ".join(said.split())
    assert (read_meta(tmp_path / "single").step, read_meta(tmp_path / "single").world_size) == (
        2,
        2,
    )


def mean_of_two(out, changes):
    """Weights after one step with the mean of the gradients of two processes' first batches."""
    from types import SimpleNamespace

    from arctrm.data.base_set import prepare
    from arctrm.train.run import build_run

    runs = []
    for rank in (0, 1):
        process = SimpleNamespace(
            device=torch.device("cpu"), process_index=rank, num_processes=1, is_main_process=True
        )
        config = small(out, changes)
        runs.append(build_run(config, prepare(config.data), process, time.monotonic()))
        for number in runs[-1].active():
            runs[-1].steps[number].prepare()
            runs[-1].steps[number]()
    gradients = [run.gradients.flat for run in runs]
    assert not torch.allclose(*gradients)
    gradients[0].copy_((gradients[0] + gradients[1]) / 2)
    runs[0].update(1.0, 1)
    return runs[0].model.state_dict()
