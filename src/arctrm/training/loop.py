"""The training loop: one loop for every stage, as small named steps.

A `Run` holds what a stage built: steps that add gradients, optimisers, what to save. The loop
knows nothing of models. All processes take the same decisions because they read the same clock:
process 0's, shared every few steps and extrapolated in between.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from arctrm.config.training import SMALLEST_BATCH, TrainingConfig
from arctrm.errors import ResourceError
from arctrm.training.checkpoints import CheckpointMeta, model_tensors, write_checkpoint
from arctrm.training.optimisers import EMA, FlatGradients, Optimisers
from arctrm.training.schedule import Schedule
from arctrm.training.state import pack_optimiser, restore_rng, rng_state, unpack_optimiser
from arctrm.training.step import GraphedStep, Step
from arctrm.training.tracking import Tracker, TrainingProgress
from arctrm.training.update import Update

SYNC_EVERY = 20
"""Optimiser steps between two looks at the clock and at the interrupt flag."""


@dataclass
class Run:
    """Everything a stage hands to the loop."""

    out: Path
    config: TrainingConfig
    resolved: dict[str, Any]
    accelerator: Accelerator
    model: nn.Module
    steps: list[Step | GraphedStep]
    """Each adds the gradient of one packed batch; all run once per optimiser step."""
    metrics: Callable[[], dict[str, float]]
    """Means since the last call, over all processes; "examples" is a sum."""
    carry: dict[str, Tensor]
    """This process's tensors that a resumed run needs, updated in place."""
    gradients: FlatGradients
    optimisers: Optimisers
    ema: EMA | None
    task_ids: tuple[str, ...]
    fingerprint: str
    git_revision: str
    notes: dict[str, Any]
    """What else the checkpoint should say."""
    began_at: float
    """Monotonic time at which this session's share of the budget began (before compilation)."""
    step: int = 0
    elapsed: float = 0.0
    examples: int = 0
    smallest_batch: int = SMALLEST_BATCH
    """Tokens of the longest sequence: no batch may be smaller."""
    width_key: str = "trm.hidden_size"
    """Key of the model's width."""
    schedule: Schedule = field(init=False)
    update: Update = field(init=False)
    """What turns a gradient into new weights and averages."""

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.config.schedule)
        clip_norm = self.config.optimiser.clip_norm
        self.update = Update(self.gradients, self.optimisers, self.ema, clip_norm)

    def capture(self) -> None:
        """Replay steps and update as CUDA graphs from now on; after a checkpoint is restored."""
        with memory_errors(self.config, self.smallest_batch, self.width_key):
            self.steps = [GraphedStep(step, prepare=step.prepare) for step in self.steps]
        self.update.capture()


def train(run: Run, tracker: Tracker, progress: TrainingProgress) -> None:
    """Run to the end of the schedule; saves at intervals, at the end and when interrupted.

    Raises:
        KeyboardInterrupt: after saving, when SIGINT or SIGTERM came.
        ResourceError: out of memory; says which key to lower.
    """
    clock = SharedClock(run)
    saved_at, saved_step = run.elapsed, run.step
    with interruptible() as stop, tracker, progress:
        while not run.schedule.finished(run.step, run.elapsed):
            train_step(run)
            interrupted = clock.tick(stop)
            if run.step % run.config.log_every == 0:
                log(run, tracker, progress)
            if interrupted:
                break
            if _save_is_due(run, clock, saved_at):
                save(run)
                saved_at, saved_step = run.elapsed, run.step
        if run.step != saved_step:
            save(run)
    if not run.schedule.finished(run.step, run.elapsed):
        raise KeyboardInterrupt(
            f"saved step {run.step} in {run.out}; the same command with --resume goes on"
        )


def train_step(run: Run) -> None:
    """Gradients of all batches, reduced over processes, clipped; one optimiser and EMA step."""
    factor = run.schedule.factor(run.step, run.elapsed)
    run.gradients.zero()
    with memory_errors(run.config, run.smallest_batch, run.width_key):
        for step in run.steps:
            step.prepare()
            step()
    run.gradients.average()
    run.update(factor, run.step + 1)
    run.step += 1


@contextmanager
def memory_errors(
    config: TrainingConfig, smallest: int = SMALLEST_BATCH, width: str = "trm.hidden_size"
) -> Iterator[None]:
    """Turn out of memory into the ResourceError that says which key to lower.

    `smallest` is the least number of tokens of a batch, `width` the key of the model's size.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        tokens = config.tokens_per_batch
        cure = f"training.tokens_per_batch={tokens // 2} --set training.grad_accum="
        cure += str(config.grad_accum * 2)
        if tokens < 2 * smallest:
            cure = f"{width}=256 (the batch is as small as it gets)"
        raise ResourceError(
            f"out of memory with training.tokens_per_batch = {tokens}; lower it, for example "
            f"--set {cure}"
        ) from error


def log(run: Run, tracker: Tracker, progress: TrainingProgress) -> None:
    """Write the metrics since the last log line."""
    metrics = run.metrics()
    run.examples += int(metrics.pop("examples"))
    metrics["lr_factor"] = run.schedule.factor(run.step, run.elapsed)
    metrics["elapsed"] = run.elapsed
    metrics["examples"] = run.examples
    tracker.log(run.step, metrics)
    progress.update(run.step, run.elapsed, metrics)


def save(run: Run) -> Path:
    """Write a checkpoint of everything that a bit-exact continuation needs."""
    weights = run.model.state_dict()
    ema = None if run.ema is None else {**weights, **run.ema.state()}
    trainer: dict[str, Tensor] = {}
    for name, optimiser in run.optimisers.all.items():
        trainer |= pack_optimiser(name, optimiser)
    meta = CheckpointMeta(
        step=run.step,
        elapsed=run.elapsed,
        examples=run.examples,
        config=run.resolved,
        task_ids=run.task_ids,
        git_revision=run.git_revision,
        data_fingerprint=run.fingerprint,
        notes=run.notes,
    )
    return write_checkpoint(
        run.out,
        meta,
        model_tensors(weights, ema),
        trainer,
        {**rng_state(), **{f"carry.{name}": t for name, t in run.carry.items()}},
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        barrier=run.accelerator.wait_for_everyone,
        keep_last=run.config.keep_last,
    )


def restore(
    run: Run,
    meta: CheckpointMeta,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor],
    trainer: dict[str, Tensor],
    rank_state: dict[str, Tensor] | None,
) -> None:
    """Put a run where the checkpoint was taken.

    Without a `rank_state` this process is new to the run: it keeps the batches it drew for itself.
    """
    run.model.load_state_dict(weights)
    if run.ema is not None:
        run.ema.load(ema)
    for name, optimiser in run.optimisers.all.items():
        unpack_optimiser(name, optimiser, trainer)
    if rank_state is not None:
        for name, tensor in run.carry.items():
            tensor.copy_(rank_state[f"carry.{name}"])
        restore_rng(rank_state)
    run.step, run.elapsed, run.examples = meta.step, meta.elapsed, meta.examples


class Timed(Protocol):
    """What is told its time."""

    accelerator: Accelerator
    began_at: float
    step: int
    elapsed: float


class SharedClock:
    """Seconds of training, the same number on every process."""

    def __init__(self, run: Timed):
        self.run = run
        self.begin = run.began_at - run.elapsed
        self.first_step = run.step + 1
        self.synced_step, self.synced_elapsed = run.step, run.elapsed
        self.seconds_per_step = 0.0
        self.just_synced = False

    def tick(self, stop: list[int]) -> bool:
        """Advance after an optimiser step; True when any process was asked to stop."""
        run = self.run
        done = run.step - self.synced_step
        alone = run.accelerator.num_processes == 1
        every_step = alone and run.accelerator.device.type == "cpu"
        is_first = run.step == self.first_step
        self.just_synced = every_step or is_first or done >= SYNC_EVERY
        if not self.just_synced:
            run.elapsed = self.synced_elapsed + done * self.seconds_per_step
            return False
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        told = [(time.monotonic() - self.begin, bool(stop))]
        if not alone:
            told = broadcast_object_list(told)
        elapsed, interrupted = told[0]
        if not is_first:  # the time up to there is start-up and compilation
            self.seconds_per_step = (elapsed - self.synced_elapsed) / done
        self.synced_step, self.synced_elapsed, run.elapsed = run.step, elapsed, elapsed
        return interrupted


def _save_is_due(run: Run, clock: SharedClock, saved_at: float) -> bool:
    every = run.config.checkpoint_every_steps
    if every is not None:
        return run.step % every == 0
    return clock.just_synced and run.elapsed - saved_at >= run.config.checkpoint_every


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of raising; a second one raises at once."""
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
