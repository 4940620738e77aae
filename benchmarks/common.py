"""What the benchmarks share: one line for a user's error, arguments, timing of a training job, the
machine's rates, the profile.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from arctrm.config import TRMConfig
from arctrm.console import console
from arctrm.data.task import Task
from arctrm.errors import ConfigError, UserError
from arctrm.reader.interface import GridReader
from arctrm.solving.weights import Solver
from arctrm.training.loop import Run, train_step
from arctrm.training.stages import compute_dtype
from arctrm.trm.layers import run_level
from arctrm.trm.model import TRM

Item = TypeVar("Item")


def guarded(main: Callable[[], None]) -> None:
    """Run a script; what cannot be used of what its user gave is one line, exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def reader_of(solver: Solver) -> GridReader:
    """The reader of weights that must hold one."""
    if solver.reader is None:
        raise ConfigError(f"{solver.name}: holds no reader; give a checkpoint with one")
    return solver.reader


def weights_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint or --bundled; neither: random weights."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, default=None)
    weights.add_argument("--bundled", action="store_true")


def untrained_trm(config: TRMConfig, device: torch.device) -> TRM:
    """A TRM with random weights and one task embedding, as it would be loaded to answer."""
    torch.manual_seed(0)
    trm = TRM(config, 1).to(device).requires_grad_(False)
    trm.dtype = compute_dtype("auto", device)
    if device.type == "cuda":
        trm.level = torch.compile(run_level, dynamic=False)
    return trm


def spread(
    tasks: Sequence[Task], views: int, most: int | None, asked: Callable[[Task, int], list[Item]]
) -> list[Item]:
    """What is `asked` of all tasks under `views` views; at most `most`, spread evenly over them."""
    inputs = sum(len(task.test) for task in tasks)
    needed = views if most is None else min(views, -(-most // inputs))
    everything = [item for task in tasks for item in asked(task, needed)]
    kept = np.linspace(0, len(everything) - 1, min(len(everything), most or len(everything)))
    return [everything[int(index)] for index in kept]


@dataclass(frozen=True)
class Timed:
    """Results and the time they took."""

    result: list
    seconds: float


def timed(work: Callable[[], list], rounds: int = 1) -> Timed:
    """The last result, and the median time, of work whose results come to the host."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return Timed(result, statistics.median(seconds))


@dataclass(frozen=True)
class Rounds:
    """Several rounds of the same number of optimiser steps."""

    examples_per_second: list[float]
    tokens_per_second: list[float]
    seconds_per_step: list[float]
    rows: float
    """Pairs in an optimiser step."""

    @staticmethod
    def median(values: list[float]) -> float:
        return statistics.median(values)

    @staticmethod
    def spread(values: list[float]) -> float:
        return max(values) - min(values)


def measure(job: Run, steps: int, rounds: int, warmup: int) -> Rounds:
    """Time `rounds` x `steps` optimiser steps; reading the metrics waits for the device."""
    run_steps(job, warmup)
    result = Rounds([], [], [], 0.0)
    rows = 0.0
    for _ in range(rounds):
        begin = time.perf_counter()
        metrics = run_steps(job, steps)
        seconds = time.perf_counter() - begin
        rows = metrics["examples"] / steps
        result.examples_per_second.append(metrics["examples"] / seconds)
        result.tokens_per_second.append(metrics["tokens_per_second"])
        result.seconds_per_step.append(seconds / steps)
    return Rounds(
        result.examples_per_second, result.tokens_per_second, result.seconds_per_step, rows
    )


def run_steps(job: Run, steps: int) -> dict[str, float]:
    """Run optimiser steps; reading the metrics, which are returned, waits for the device."""
    for _ in range(steps):
        train_step(job)
    return job.metrics()


def fresh_peak() -> None:
    """Forget the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> str:
    """Peak of the device's allocations."""
    if not torch.cuda.is_available():
        return "not measured on a CPU"
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def show_profile(work: Callable[[], object], rows: int = 30) -> None:
    """Device time of `work` by kernel, and the share of the wall time that the device was busy.

    Only the device is traced, which costs the host next to nothing; on a CPU, the operators are.
    `work` must wait for the device.
    """
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        begin = time.perf_counter()
        work()
        wall = time.perf_counter() - begin
    events = [e for e in trace.key_averages() if not e.is_user_annotation]
    if gpu:
        events = [e for e in events if e.device_type != DeviceType.CPU]
    spent = {e: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6 for e in events}
    busy = sum(spent.values())
    for event in sorted(events, key=lambda e: -spent[e])[:rows]:
        line = f"{spent[event]:9.4f} s {spent[event] / busy:6.1%} {event.count:8,} x "
        console().print(line + event.key[:120], markup=False, soft_wrap=True)
    what = "device kernels" if gpu else "operators of the CPU"
    console().print(f"{wall:.3f} s of wall time; {what} {busy:.3f} s ({busy / wall:.0%})")


def memory_rate(device: torch.device) -> float:
    """Bytes per second, read and written together, of a large copy."""
    size, repeats = (2**31, 10) if device.type == "cuda" else (2**27, 5)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size * repeats / _seconds(lambda: target.copy_(source), repeats, device)


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product on random data."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 10)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 * repeats / _seconds(lambda: a @ b, repeats, device)


def _seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Time of `repeats` runs of `work`, after a few unmeasured ones."""
    for _ in range(3):
        work()
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
