"""The loop: steps, logs, saves, and what ends it."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from arctrm.data.build import prepare
from arctrm.errors import ResourceError
from arctrm.training import pretrain
from arctrm.training.checkpoints import latest_checkpoint, read_meta, read_model
from arctrm.training.loop import SYNC_EVERY, SharedClock, interruptible, save, train_step
from arctrm.training.step import MicroStep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(tiny, tmp_path):
    """Build a fresh run from overrides of the tiny configuration."""

    def build(changes=None, rank=0):
        config = tiny(changes)
        accelerator = Accelerator(cpu=True)
        if rank:
            accelerator = SimpleNamespace(
                device=torch.device("cpu"), process_index=rank, num_processes=1
            )
        base = prepare(config.data)
        return pretrain.build_run(config, base, tmp_path / "run", accelerator, time.monotonic())

    return build


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def log_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved_steps(folder):
    return sorted(int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").iterdir())


def test_grad_accum_averages_over_its_batches(job):
    run = job({"training.grad_accum": 2})
    run.gradients.zero()
    parts = []
    for step in run.steps:
        run.gradients.zero()
        step()
        parts.append(run.gradients.flat.clone())
    twin = job({"training.grad_accum": 2})
    train_step(twin)
    torch.testing.assert_close(twin.gradients.flat, parts[0] + parts[1])
    single = job()
    single.steps[0]()
    assert parts[0].norm() == pytest.approx(single.gradients.flat.norm().item() / 2, rel=0.5)


def test_a_step_counts_and_moves_weights_and_average(job):
    run = job()
    before = flat(run.model)
    train_step(run)
    assert run.step == 1
    moved = flat(run.model) - before
    assert moved.abs().max() > 1e-4
    averages = torch.cat([a.flatten() for a in run.ema.averages])
    decay = min(0.999, 2 / 11)
    torch.testing.assert_close(averages, before + (1 - decay) * moved)


def test_clipping_bounds_the_gradient_of_a_step(job):
    free, clipped = job(), job({"training.optimiser.clip_norm": 0.01})
    train_step(free)
    train_step(clipped)
    assert free.gradients.flat.norm() > 0.02
    assert clipped.gradients.flat.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_warm_up_scales_the_first_steps(job):
    run = job({"training.schedule.warmup_steps": 2, "training.schedule.max_steps": 100})
    train_step(run)
    rate = run.optimisers.all["adamw"].param_groups[0]["lr"]
    assert rate == pytest.approx(run.config.optimiser.adamw_lr / 2)
    train_step(run)
    assert run.optimisers.all["adamw"].param_groups[0]["lr"] == run.config.optimiser.adamw_lr


def test_processes_have_the_same_weights_and_draw_different_rows(job):
    first, second = job(rank=0), job(rank=1)
    assert torch.equal(flat(first.model), flat(second.model))
    first.steps[0]()
    second.steps[0]()
    assert not torch.equal(first.steps[0].state.rows, second.steps[0].state.rows)
    assert not torch.equal(first.gradients.flat, second.gradients.flat)


def test_out_of_memory_names_the_key_and_a_smaller_value(job, monkeypatch):
    run = job({"training.tokens_per_batch": 4096, "training.grad_accum": 3})

    def full(step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(run.steps[1]), "__call__", full)
    with pytest.raises(ResourceError) as caught:
        train_step(run)
    text = str(caught.value)
    assert "training.tokens_per_batch = 4096" in text
    assert "training.tokens_per_batch=2048" in text
    assert "training.grad_accum=6" in text
    assert run.step == 0


def test_a_run_logs_at_its_intervals_and_saves_at_the_end(tiny, tmp_path):
    pretrain.run(tiny({"training.log_every": 2, "training.schedule.max_steps": 5}), tmp_path, False)
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert saved_steps(tmp_path) == [5]
    assert lines[0]["examples"] < lines[1]["examples"]
    assert lines[0]["elapsed"] < lines[1]["elapsed"]
    assert all(0 < line["loss"] < 6 for line in lines)


def test_checkpoints_come_every_so_many_steps_and_the_oldest_go(tiny, tmp_path):
    every = {"training.checkpoint_every_steps": 2, "training.keep_last": 2}
    pretrain.run(tiny({**every, "training.schedule.max_steps": 7}), tmp_path, False)
    assert saved_steps(tmp_path) == [6, 7]


def test_checkpoints_come_every_so_many_seconds(tiny, tmp_path):
    often = {"training.checkpoint_every": 0.001, "training.keep_last": 9}
    pretrain.run(tiny(often), tmp_path, False)
    assert saved_steps(tmp_path) == [1, 2, 3, 4]


def test_a_checkpoint_holds_weights_and_their_average(job):
    run = job()
    train_step(run)
    path = save(run)
    assert path == latest_checkpoint(run.out)
    weights, average = read_model(path, ema=False), read_model(path, ema=True)
    assert torch.equal(weights["lm_head.weight"], run.model.lm_head.weight)
    assert not torch.equal(weights["lm_head.weight"], average["lm_head.weight"])
    assert torch.equal(weights["H_init"], average["H_init"])
    meta = read_meta(path)
    assert (meta.step, meta.task_ids, meta.data_fingerprint) == (
        1,
        run.task_ids,
        run.fingerprint,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_ends_the_same(tiny, tmp_path, monkeypatch, number):
    config = tiny({"training.schedule.max_steps": 12, "training.log_every": 5})
    pretrain.run(config, tmp_path / "whole", False)
    original, calls = MicroStep.__call__, []

    def interrupted(step):
        original(step)
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MicroStep, "__call__", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"step 7.*--resume"):
        pretrain.run(config, tmp_path / "cut", False)
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path / "cut") == [7]
    monkeypatch.undo()
    pretrain.run(config, tmp_path / "cut", True)
    for name in ("model.safetensors", "trainer.safetensors"):
        files = [tmp_path / r / "checkpoints" / "step_00000012" / name for r in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k and k != "elapsed"} for line in lines]
        for lines in (log_lines(tmp_path / "whole"), log_lines(tmp_path / "cut"))
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[1]] == [5, 10]


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_a_budget_ends_on_time_with_the_rate_decayed(tiny, tmp_path):
    budget = {"training.schedule.max_steps": None, "training.schedule.budget": "3s"}
    began = time.monotonic()
    pretrain.run(tiny(budget), tmp_path, False)
    took = time.monotonic() - began
    last, meta = log_lines(tmp_path)[-1], read_meta(latest_checkpoint(tmp_path))
    assert meta.elapsed == pytest.approx(3.0, rel=0.2)
    assert took == pytest.approx(3.0, rel=0.4)
    assert last["lr_factor"] == pytest.approx(0.0, abs=0.1)
    factors = [line["lr_factor"] for line in log_lines(tmp_path)]
    assert factors == sorted(factors, reverse=True)
    assert meta.step > 20


def test_start_up_time_is_not_taken_for_the_time_of_a_step(job):
    """Compilation before the first step must not make the clock run ahead between two looks."""
    run = job()
    run.began_at -= 30.0
    several = SimpleNamespace(num_processes=2, device=torch.device("cpu"), process_index=0)
    run.accelerator = several  # looks at the clock every SYNC_EVERY steps only
    clock = SharedClock(run)
    for _ in range(2 * SYNC_EVERY - 1):
        run.step += 1
        clock.tick([])
    assert 30.0 <= run.elapsed < 35.0


def test_between_two_looks_the_clock_goes_on_at_the_measured_speed(job):
    run = job()
    run.accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), process_index=0)
    clock = SharedClock(run)
    for _ in range(1 + SYNC_EVERY):  # the first step is no measure
        time.sleep(0.005)
        run.step += 1
        clock.tick([])
    assert clock.just_synced
    at_look = run.elapsed
    run.step += 1
    clock.tick([])
    assert not clock.just_synced
    assert 0.004 < run.elapsed - at_look < 0.05
