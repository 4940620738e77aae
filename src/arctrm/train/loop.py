"""The training loop: one loop for every stage, as small named steps.

A `Run` holds a model and the steps that add its gradient; the loop knows nothing of either. All
processes read one clock: process 0's, shared every few steps and extrapolated in between. What is
left of a killed run is its last checkpoint; going on is exact.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from arctrm import checkpoints
from arctrm.config import ScheduleConfig, TrainingConfig
from arctrm.errors import ArctrmError
from arctrm.model.attention import Kernel
from arctrm.system import memory_errors
from arctrm.train.optim import EMA, FlatGradients, Optimisers, Update, graph_of, trained_parameters
from arctrm.train.sharding import fill, own_part, whole
from arctrm.train.steps import Step
from arctrm.train.tracking import Tracker

SYNC_EVERY = 20  # optimiser steps between two looks at the clock and at the interrupt flag
MAX_WARMUP = 0.5  # warm-up ends at this fraction of the run at the latest


@dataclass
class Schedule:
    """Warm-up, constant, linear decay to zero: a function of steps and seconds of training."""

    config: ScheduleConfig

    def progress(self, step: int, elapsed: float) -> float:
        """Fraction of the run that lies behind: 0 at the start, 1 at the end."""
        done = step if self.config.max_steps is not None else max(elapsed, 0.0)
        return min(done / (self.config.max_steps or self.config.budget or 0.0), 1.0)

    def factor(self, step: int, elapsed: float) -> float:
        """Multiplier of the peak learning rates for optimiser step number `step` (from 0)."""
        progress, start = self.progress(step, elapsed), self.config.constant_fraction
        warm = max((step + 1) / max(self.config.warmup_steps, 1), progress / MAX_WARMUP)
        return min(warm, 1.0 if progress <= start else (1.0 - progress) / (1.0 - start))

    def finished(self, step: int, elapsed: float) -> bool:
        """Whether the run has reached its length."""
        return self.progress(step, elapsed) >= 1.0


@dataclass
class Run:
    """Everything a stage hands to the loop."""

    out: Path
    config: TrainingConfig
    accelerator: Accelerator
    model: nn.Module  # names of its parameters begin with trunk., adapters. or hub.
    steps: Sequence[Step]  # each is made in every optimiser step of its part of the run
    metrics_of: Callable[[Tensor], dict[str, float]]  # of the summed counts of all steps
    meta: checkpoints.CheckpointMeta  # what a checkpoint says beside step, elapsed and examples
    began_at: float  # monotonic time of this session's start (before compilation)
    captures: bool = False  # replay steps and update as CUDA graphs
    compiled: Kernel | None = None  # of the attention, in compiled layers on a GPU
    step: int = 0
    elapsed: float = 0.0
    examples: int = 0
    logged_at: float = field(default_factory=time.monotonic)
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)  # by number of step

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.config.schedule)
        trained = trained_parameters(self.model)
        self.gradients = FlatGradients(trained)
        self.optimisers = Optimisers(trained, self.config.optimiser)
        self.ema = EMA(trained, self.config.ema_decay) if self.config.ema_decay > 0 else None
        clip, captures = self.config.optimiser.clip_norm, self.captures
        self.update = Update(self.gradients, self.optimisers, self.ema, clip, captures)

    @property
    def carry(self) -> dict[str, Tensor]:
        """This process's tensors that a resumed run needs."""
        carried = ((number, step.carry()) for number, step in enumerate(self.steps))
        return {f"carry.{i}.{name}": tensor for i, own in carried for name, tensor in own.items()}

    def active(self) -> list[int]:
        """Numbers of the steps that are made now."""
        progress = self.schedule.progress(self.step, self.elapsed)
        parts = [(step.begin, step.end if step.end < 1 else 2) for step in self.steps]
        return [i for i, (begin, end) in enumerate(parts) if begin <= progress < end]


def train(run: Run, tracker: Tracker) -> None:
    """Run to the end of the schedule; interrupted, it saves and raises KeyboardInterrupt."""
    clock = SharedClock(run)
    saved_at, saved_step = run.elapsed, run.step
    with interruptible() as stop:
        while not run.schedule.finished(run.step, run.elapsed):
            captured = train_step(run)
            interrupted = clock.tick(stop, restart=captured)
            if run.step % run.config.log_every == 0:
                tracker.log(run.step, read_metrics(run))
            if interrupted:
                break
            every = run.config.checkpoint_every_steps
            due = clock.just_synced and run.elapsed - saved_at >= run.config.checkpoint_every
            if run.step % every == 0 if every else due:
                save(run)
                saved_at, saved_step = run.elapsed, run.step
        if run.step != saved_step:
            save(run)
    if not run.schedule.finished(run.step, run.elapsed):
        raise KeyboardInterrupt(f"saved step {run.step} in {run.out}; --resume goes on")


def train_step(run: Run) -> bool:
    """Gradients of the active steps, one update; whether something was captured before."""
    active = run.active()
    new = [number for number in active if run.captures and number not in run.graphs]
    tokens, accumulated = run.config.tokens_per_batch, run.config.grad_accum
    cure = (
        f"out of memory with training.tokens_per_batch = {tokens}; for example --set "
        f"training.tokens_per_batch={tokens // 2} --set training.grad_accum={accumulated * 2}, "
        "or trunk.gradient_checkpointing=true"
    )
    with memory_errors(lambda: cure):
        for number in new:
            run.steps[number].prepare()
            run.graphs[number] = graph_of(run.steps[number])
        run.gradients.zero()
        for number in active:
            run.steps[number].prepare()
            run.graphs[number].replay() if run.captures else run.steps[number]()
        run.gradients.average()
        run.update(run.schedule.factor(run.step, run.elapsed), run.step + 1)
    run.step += 1
    return bool(new)


def read_metrics(run: Run) -> dict[str, float]:
    """Means since the last call, over all processes; waits. Refuses a loss that is not finite."""
    total = torch.stack([step.counts for step in run.steps]).sum(0)
    for step in run.steps:
        step.counts.zero_()
    if run.accelerator.num_processes > 1:
        torch.distributed.all_reduce(total)
    metrics = run.metrics_of(total)
    tokens, now = metrics.pop("tokens"), time.monotonic()
    seconds, run.logged_at = now - run.logged_at, now
    if not total.isfinite().all():
        raise _not_finite(run, f"the loss is {metrics['loss']}")
    run.examples += int(metrics["examples"])
    return {
        **metrics,
        "examples": run.examples,
        "examples_per_second": metrics["examples"] / seconds,
        "tokens_per_second": tokens / seconds,
        "lr_factor": run.schedule.factor(run.step, run.elapsed),
        "progress": run.schedule.progress(run.step, run.elapsed),
        "elapsed": run.elapsed,
    }


def _not_finite(run: Run, what: str) -> ArctrmError:
    groups = {name: o.param_groups[0] for name, o in run.optimisers.all.items()}
    rates = ", ".join(f"{name}_lr = {float(g['lr']):.2g}" for name, g in groups.items())
    good = checkpoints.latest_checkpoint(run.out)
    return ArctrmError(
        f"{run.out}: {what} at step {run.step} ({rates}), and nothing was saved; the last good "
        f"checkpoint is {good}; lower training.optimiser.muon_lr and adamw_lr, or set "
        "training.optimiser.clip_norm = 1"
    )


def save(run: Run) -> Path:
    """Write everything that a bit-exact continuation needs; refuses weights that are not finite."""
    weights = {name: whole(own_part(w), w) for name, w in run.model.state_dict().items()}
    averages = {} if run.ema is None else {**weights, **run.ema.state()}
    model = {f"weights.{name}": tensor for name, tensor in weights.items()}
    model |= {f"ema.{name}": tensor for name, tensor in averages.items()}
    trainer = run.optimisers.state()
    for name, tensor in (model | trainer).items():
        if not tensor.isfinite().all():
            raise _not_finite(run, f"{name!r} is not finite")
    counted = {"step": run.step, "elapsed": run.elapsed, "examples": run.examples}
    meta, keep_last = run.meta.model_copy(update=counted), run.config.keep_last
    state = {"rng": torch.get_rng_state(), **run.carry}
    if torch.cuda.is_available():
        state["rng_cuda"] = torch.cuda.get_rng_state()
    processes = run.accelerator
    return checkpoints.write_checkpoint(run.out, meta, model, trainer, state, processes, keep_last)


def restore(run: Run, folder: Path, meta: checkpoints.CheckpointMeta) -> None:
    """Put a run that has made no step where the checkpoint was taken."""
    expected = run.model.state_dict()
    fill(expected, checkpoints.read_model(folder, ema=False, expected=expected))
    if run.ema is not None:
        run.ema.load(checkpoints.read_model(folder, expected=expected))
    trainer, state = checkpoints.read_state(folder, run.accelerator.process_index)
    run.optimisers.load(trainer)
    if state is not None:  # else this process was not there, and keeps the batches that it drew
        held = {name: tensor for name, tensor in state.items() if name.startswith("carry.")}
        checkpoints.check_names(run.carry, held, folder, "this run")
        for name, tensor in run.carry.items():
            tensor.copy_(held[name])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and "rng_cuda" in state:
            torch.cuda.set_rng_state(state["rng_cuda"])
    run.step, run.elapsed, run.examples = meta.step, meta.elapsed, meta.examples


class SharedClock:
    """Seconds of training, the same number on every process."""

    def __init__(self, run: Run):
        self.run = run
        self.begin = run.began_at - run.elapsed
        self.synced_step, self.synced_elapsed = run.step, run.elapsed
        self.seconds_per_step = 0.0
        self.is_first = self.just_synced = True

    def tick(self, stop: list[int], *, restart: bool = False) -> bool:
        """Advance after a step (`restart`: it compiled); True when a process was asked to stop."""
        run, unusual = self.run, restart or self.is_first
        done = run.step - self.synced_step
        alone = run.accelerator.num_processes == 1
        every_step = alone and run.accelerator.device.type == "cpu"
        self.just_synced = every_step or unusual or done >= SYNC_EVERY
        if not self.just_synced:
            run.elapsed = self.synced_elapsed + done * self.seconds_per_step
            return False
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        told = [(time.monotonic() - self.begin, bool(stop))]
        if not alone:
            told = broadcast_object_list(told)
        elapsed, interrupted = told[0]
        if not unusual:
            self.seconds_per_step = (elapsed - self.synced_elapsed) / done
        self.is_first = False
        self.synced_step, self.synced_elapsed, run.elapsed = run.step, elapsed, elapsed
        return interrupted


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of raising; a second one raises at once."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
