"""What the benchmarks share: timing of a training job, the machine's matrix rate, the profile."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from arctrm.console import console
from arctrm.training.loop import Run, train_step


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
    for _ in range(warmup):
        train_step(job)
    job.metrics()
    result = Rounds([], [], [], 0.0)
    rows = 0.0
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(steps):
            train_step(job)
        metrics = job.metrics()
        seconds = time.perf_counter() - begin
        rows = metrics["examples"] / steps
        result.examples_per_second.append(metrics["examples"] / seconds)
        result.tokens_per_second.append(metrics["tokens_per_second"])
        result.seconds_per_step.append(seconds / steps)
    return Rounds(
        result.examples_per_second, result.tokens_per_second, result.seconds_per_step, rows
    )


def peak_memory() -> str:
    """Peak of the device's allocations."""
    if not torch.cuda.is_available():
        return "not measured on a CPU"
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def show_profile(job: Run, steps: int, rows: int = 30) -> None:
    """Device time by kernel over `steps` optimiser steps, and how busy the device was."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    begin = time.perf_counter()
    with profile(activities=activities) as trace:
        for _ in range(steps):
            train_step(job)
        job.metrics()
    wall = time.perf_counter() - begin
    events = trace.key_averages()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    busy = sum(e.self_device_time_total for e in events) / 1e6
    console().print(events.table(sort_by=key, row_limit=rows, max_name_column_width=90))
    console().print(f"{steps} steps in {wall:.3f} s of wall time; device kernels {busy:.3f} s")


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product on random data."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 10)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - begin)
