"""Adaptation of many tasks at once: one training job on the demonstrations of all of them.

The weights are shared, every task has an embedding of its own; the demonstrations of all tasks are
packed in one stream, with the steps and the optimisers that adapt `solve` to one task and the clock
and the schedule of training. On a GPU the layers are compiled and the steps captured in CUDA graphs
as in training. Several processes average their gradients.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from arctrm.config import EvalConfig, ScheduleConfig
from arctrm.data.task import Task
from arctrm.hybrid import Hybrid
from arctrm.reader.hub_module import HubModule
from arctrm.solving.adaptation import WARMUP_STEPS, Adapter
from arctrm.solving.learners import Part
from arctrm.solving.weights import Solver
from arctrm.training.joint_step import JOINT_COUNTS, JointStep
from arctrm.training.loop import SYNC_EVERY, SharedClock
from arctrm.training.metrics import Metrics
from arctrm.training.progress import TrainingProgress
from arctrm.training.schedule import Schedule
from arctrm.training.stages import RANK_SEED_STEP
from arctrm.training.step import COUNTS, GraphedStep, Step


@dataclass(frozen=True)
class Adapted:
    """What the job made, and what it took."""

    solver: Solver
    """Knows the adapted tasks and no others."""
    steps: int
    seconds: float
    num_known: int
    """Tasks that the checkpoint knew before."""

    def record(self) -> dict[str, float]:
        """For scores.json."""
        return {"steps": self.steps, "seconds": self.seconds, "known_tasks": self.num_known}


@dataclass
class _Job:
    """The time of the job."""

    accelerator: Accelerator
    began_at: float = field(default_factory=time.monotonic)
    step: int = 0
    elapsed: float = 0.0


def adapt(
    solver: Solver, tasks: Sequence[Task], config: EvalConfig, accelerator: Accelerator
) -> Adapted:
    """Adapt a copy of the solver's model to all `tasks`, for `evaluation.adapt_steps` or
    `evaluation.adapt_budget`; only their demonstrations are looked at.

    Raises:
        ResourceError: out of memory; says which key to lower.
    """
    job = _Job(accelerator)
    adapter = Adapter(solver, tasks, config.adaptation, config.seed)
    torch.manual_seed(config.seed + RANK_SEED_STEP * accelerator.process_index)
    steps = adapter.new_steps(tasks)
    metrics = _metrics(steps[0], accelerator)
    run = _accelerated(adapter, steps, config)
    schedule, clock = Schedule(_length(config)), SharedClock(job)
    with TrainingProgress(schedule, is_main=accelerator.is_main_process) as progress:
        while not schedule.finished(job.step, job.elapsed):
            adapter.learn(run, schedule.factor(job.step, job.elapsed))
            job.step += 1
            clock.tick([])
            due = job.step % SYNC_EVERY == 0 or schedule.finished(job.step, job.elapsed)
            if due or clock.just_synced:
                progress.update(job.step, job.elapsed, metrics() if due else None)
    seconds = time.monotonic() - job.began_at
    return Adapted(adapter.frozen(), job.step, seconds, adapter.num_known)


def _length(config: EvalConfig) -> ScheduleConfig:
    chosen = config.evaluation
    return ScheduleConfig(
        budget=chosen.adapt_budget,
        max_steps=None if chosen.adapt_budget is not None else chosen.adapt_steps,
        warmup_steps=WARMUP_STEPS,
    )


def _metrics(step: Step, accelerator: Accelerator) -> Metrics:
    """Of the first part: TRM's, where there is one."""
    names = JOINT_COUNTS if isinstance(step, JointStep) else COUNTS
    return Metrics(accelerator, [step.counts], names)


def _accelerated(
    adapter: Adapter, steps: Sequence[Step], config: EvalConfig
) -> Sequence[Step | GraphedStep]:
    """The steps as they run: on a GPU compiled and captured, unless that is switched off."""
    on_gpu, reader = adapter.solver.device.type == "cuda", adapter.solver.tiny
    wanted = config.inference.compile
    if wanted == "off" or (wanted == "auto" and not on_gpu):
        return steps
    if reader is not None:  # TRM's blocks are those of the solver, which are compiled already
        reader.compile_layers()
    with adapter.memory_errors():
        return [
            learner.captured(step) if _can_capture(part) else step
            for step, part, learner in zip(steps, adapter.parts, adapter.learners, strict=True)
        ]


def _can_capture(part: Part) -> bool:
    """Whether a CUDA graph can hold the step: none of a joint step or a hub reader, whose shapes
    are not fixed here.
    """
    if isinstance(part, Hybrid | HubModule):
        return False
    return part.puzzle_emb.weights.is_cuda and part.dtype == torch.bfloat16
