"""The loop: schedule, steps, logs, saves, and what ends it."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_runs import log_lines, new_run, saved_steps, small

from arctrm.checkpoints import CheckpointMeta, read_meta, read_model
from arctrm.config import ScheduleConfig, TrainingConfig
from arctrm.errors import ArctrmError, ResourceError
from arctrm.train.loop import (
    SYNC_EVERY,
    Run,
    Schedule,
    SharedClock,
    save,
    train,
    train_step,
)
from arctrm.train.run import pretrain


def test_steps_warm_up_stay_constant_and_decay_to_zero():
    schedule = Schedule(ScheduleConfig(max_steps=100, warmup_steps=10, constant_fraction=0.4))
    factors = [schedule.factor(step, elapsed=0.0) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5)
    assert factors[9:41] == [1.0] * 32
    assert factors[70] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_a_time_budget_decays_on_the_clock_whatever_the_step():
    schedule = Schedule(ScheduleConfig(budget="10m", warmup_steps=0, constant_fraction=0.5))
    assert schedule.factor(step=7, elapsed=300.0) == 1.0
    assert schedule.factor(step=123456, elapsed=450.0) == pytest.approx(0.5)
    assert not schedule.finished(step=10**6, elapsed=599.0)
    assert schedule.finished(step=1, elapsed=600.0)


def test_the_peak_is_reached_half_way_at_the_latest():
    schedule = Schedule(ScheduleConfig(max_steps=20, warmup_steps=1000, constant_fraction=0.9))
    factors = [schedule.factor(step, 0.0) for step in range(20)]
    assert factors[10:18] == [1.0] * 8
    assert factors == sorted(factors[:18]) + factors[18:]


class CountingStep:
    """Adds a gradient of ones to one weight; remembers when it was made."""

    def __init__(self, model, begin=0.0, end=1.0, then=lambda: None):
        self.model, self.begin, self.end, self.then = model, begin, end, then
        self.counts = torch.zeros(1, dtype=torch.float64)
        self.prepared = self.made = 0

    def carry(self):
        return {"counts": self.counts}

    def prepare(self):
        self.prepared += 1

    def __call__(self):
        self.made += 1
        self.model.weight.sum().backward()
        self.counts += 1
        self.then()


def counting_run(out, training, *parts, then=lambda: None):
    model = nn.ModuleDict({"trunk": nn.Linear(2, 1, bias=False)})
    process = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=1, wait_for_everyone=lambda: None
    )
    meta = CheckpointMeta(
        step=0, elapsed=0, examples=0, config={}, voices=(), task_ids=(), task_fingerprints=()
    )
    steps = [CountingStep(model["trunk"], *part, then=then) for part in parts or [(0.0, 1.0)]]
    return Run(
        out=out,
        config=TrainingConfig.model_validate(training),
        accelerator=process,
        model=model,
        steps=steps,
        metrics_of=lambda counts: {"loss": 1.0, "examples": float(counts[0]), "tokens": 9.0},
        meta=meta,
        began_at=time.monotonic(),
    )


class Log(list):
    """Takes what the loop logs."""

    def log(self, step, metrics):
        self.append({"step": step, **metrics})


def steps(count, **more):
    return {"schedule": {"max_steps": count, "warmup_steps": 0}, "log_every": 1, **more}


def test_each_step_is_made_in_its_part_of_the_run_and_the_rest_is_not_prepared(tmp_path):
    run = counting_run(tmp_path, steps(10), (0.0, 0.3), (0.3, 1.0), (0.0, 1.0), (0.5, 0.6))
    train(run, Log())
    assert [step.made for step in run.steps] == [3, 7, 10, 1]
    assert [step.prepared for step in run.steps] == [3, 7, 10, 1]


def test_metrics_are_summed_between_logs_and_checkpoints_come_every_so_many_steps(tmp_path):
    log = Log()
    train(counting_run(tmp_path, steps(7, checkpoint_every_steps=2, log_every=3)), log)
    assert [line["step"] for line in log] == [3, 6]
    assert [line["examples"] for line in log] == [3, 6]
    assert [line["progress"] for line in log] == pytest.approx([3 / 7, 6 / 7])
    assert saved_steps(tmp_path) == [6, 7]  # training.keep_last = 2


def test_a_budget_ends_on_time_with_the_rate_decayed(tmp_path):
    training = {"schedule": {"budget": "1s", "warmup_steps": 0}, "log_every": 1}
    run, log = counting_run(tmp_path, training, then=lambda: time.sleep(0.01)), Log()
    began = time.monotonic()
    train(run, log)
    assert time.monotonic() - began == pytest.approx(1.0, abs=0.5)
    assert read_only_meta(tmp_path)["elapsed"] == pytest.approx(1.0, abs=0.5)
    factors = [line["lr_factor"] for line in log]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] < 0.2


def read_only_meta(out):
    import json

    (path,) = (out / "checkpoints").glob("step_*/checkpoint.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number):
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)

    run = counting_run(tmp_path, steps(9), then=interrupt)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"saved step 3 in .*--resume"):
        train(run, Log())
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path) == [3]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    run = counting_run(tmp_path, steps(9, checkpoint_every_steps=2, keep_last=9))

    def spoil():
        if run.step == 4:
            run.steps[0].counts += float("nan")
            run.gradients.flat += float("nan")

    run.steps[0].then = spoil
    run.metrics_of = lambda counts: {"loss": float(counts[0]), "examples": 1.0, "tokens": 1.0}
    with pytest.raises(ArctrmError) as caught:
        train(run, Log())
    text = str(caught.value)
    assert "the loss is nan at step 5" in text
    assert "(adamw_lr = 0.0019)" in text
    assert "the last good checkpoint is" in text
    assert "step_00000004" in text
    assert saved_steps(tmp_path) == [2, 4]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = counting_run(tmp_path, steps(9, log_every=100))
    train_step(run)
    save(run)
    with torch.no_grad():
        run.model["trunk"].weight[0, 0] = float("inf")
    run.step += 1
    with pytest.raises(ArctrmError, match=r"trunk\.weight' is not finite at step 2 .*nothing was"):
        save(run)
    assert saved_steps(tmp_path) == [1]


def test_out_of_memory_names_the_key_and_a_smaller_value(tmp_path):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = counting_run(tmp_path, {"tokens_per_batch": 4096, "grad_accum": 3}, then=full)
    with pytest.raises(ResourceError) as caught:
        train_step(run)
    for said in ("= 4096", "training.tokens_per_batch=2048", "training.grad_accum=6"):
        assert said in str(caught.value)
    assert run.step == 0


@pytest.fixture
def several(tmp_path):
    run = counting_run(tmp_path, {})
    run.accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), process_index=0)
    return run


def test_start_up_time_is_not_taken_for_the_time_of_a_step(several):
    """Compilation before the first step must not make the clock run ahead between two looks."""
    several.began_at -= 30.0
    clock = SharedClock(several)
    for _ in range(2 * SYNC_EVERY - 1):
        several.step += 1
        clock.tick([])
    assert 30.0 <= several.elapsed < 35.0


def test_between_two_looks_the_clock_goes_on_at_the_measured_speed(several):
    clock = SharedClock(several)
    for _ in range(1 + SYNC_EVERY):  # the first step is no measure
        time.sleep(0.005)
        several.step += 1
        clock.tick([])
    assert clock.just_synced
    at_look = several.elapsed
    several.step += 1
    clock.tick([])
    assert not clock.just_synced
    assert 0.004 < several.elapsed - at_look < 0.1


def test_a_step_moves_weights_and_average_and_a_checkpoint_holds_both(tmp_path):
    run = new_run(tmp_path)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    train_step(run)
    path = save(run)
    weights, average = read_model(path, ema=False), read_model(path)
    head = "trunk.head.weight"
    moved = weights[head] - before[head]
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(average[head], before[head] + (1 - 2 / 11) * moved)
    assert torch.equal(weights[head], run.model["trunk"].head.weight)
    meta = read_meta(path)
    assert (meta.step, meta.voices) == (1, ("reader", "trm"))
    assert meta.task_ids == run.meta.task_ids


@pytest.mark.slow
def test_the_loss_falls_in_both_voices(tmp_path):
    changes = {"training.schedule.max_steps": 40, "training.log_every": 10}
    pretrain(small(tmp_path, changes))
    first, *_, last = log_lines(tmp_path)
    assert last["loss"] < 0.8 * first["loss"]
    assert last["reader_loss"] < 0.8 * first["reader_loss"]


@pytest.mark.gpu
def test_a_captured_run_learns_what_an_eager_one_does(tmp_path):
    """Both voices, the second set of steps captured in the middle of the run."""
    losses = []
    for graph in ("off", "on"):
        changes = {
            "trunk.hidden_size": 32,  # the least head that compiled attention takes is 16 wide
            "trm.begin": 0.3,
            "training.cuda_graph": graph,
            "training.schedule.max_steps": 200,
            "training.log_every": 50,
        }
        pretrain(small(tmp_path / graph, changes))
        losses.append([line["loss"] for line in log_lines(tmp_path / graph)])
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.2)
