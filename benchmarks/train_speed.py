"""Training throughput and peak memory of both voices, packed, on the ARC-AGI-1 mix.

    python benchmarks/train_speed.py            # the trunk in the box, and 10 layers of 768
    python benchmarks/train_speed.py --size d768x10 --voice reader --profile
    python benchmarks/train_speed.py --size d640x4x3 --attention auto flex
    torchrun --standalone --nproc-per-node 2 benchmarks/train_speed.py

One row for each voice and size: pairs and tokens per second, peak memory, and the share of the
machine's bfloat16 matrix rate, which is measured in the same run. A pair of the TRM voice is one
supervision step on it, an example-step: the official TRM code (compiled, bfloat16, 916 tokens a
pair, batch 768) makes 939 of these per second on one H200, at 133.5 GiB. mdlARC's decoder (75.5M
weights, packed) reads 294,000 tokens per second there. `--tokens` is for each process; figures are
sums over the processes, the share is that of one. `--profile` adds the device time by kernel.
"""

import argparse
import gc
import itertools
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from arctrm.config import DataConfig, PretrainConfig, TrunkConfig
from arctrm.console import console
from arctrm.data.base_set import BaseSet, prepare
from arctrm.system import git_revision, new_accelerator, processor
from arctrm.train.loop import Run, read_metrics, train_step
from arctrm.train.run import build_run

OFFICIAL = "official TRM: 939 example-steps/s; mdlARC: 294,000 tokens/s (one H200 each)"


def main() -> None:
    args = arguments()
    accelerator = new_accelerator()
    base = prepare(DataConfig(max_tasks=args.max_tasks, num_aug=0))
    ceiling = matrix_rate(accelerator.device)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    columns: dict[str, dict[str, str]] = {}
    for size, voice, attention in itertools.product(args.size, args.voice, args.attention):
        run = new_run(args, size, voice, attention, base, accelerator)
        columns[f"{voice} {size} {run.compiled or ''}".rstrip()] = measured(run, args, ceiling)
        if args.profile and accelerator.num_processes == 1:
            show_profile(run, args.steps)
        del run
        torch.compiler.reset()  # compiled code of one size is kept by the function it is of
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if accelerator.is_main_process:
        title = f"training, {git_revision()[:12]}, {where}, {accelerator.num_processes} process(es)"
        table = Table("", *columns, title=title, caption=OFFICIAL)
        for name in next(iter(columns.values())):
            table.add_row(name, *(column[name] for column in columns.values()))
        console().print(table)
    accelerator.end_training()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = "width x layers, x loops where they are gone through more than once"
    parser.add_argument("--size", nargs="+", default=["d640x4x3", "d768x10"], help=sizes)
    voices = ("reader", "trm", "both")
    parser.add_argument("--voice", nargs="+", choices=voices, default=["reader", "trm"])
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--supervision-steps", type=int, default=1)
    parser.add_argument("--injection", choices=("on", "off"), default="on")
    parser.add_argument("--attention", nargs="+", choices=("auto", "flex"), default=["auto"])
    parser.add_argument("--checkpointing", action="store_true", help="keep inputs of layers only")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tasks", type=int, default=None)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def new_run(
    args: argparse.Namespace,
    size: str,
    voice: str,
    attention: str,
    base: BaseSet,
    accelerator: Accelerator,
) -> Run:
    found = re.fullmatch(r"d(\d+)x(\d+)(?:x(\d+))?", size)
    if found is None:
        raise SystemExit(f"--size {size}: write for example d640x4x3 or d768x10")
    width, layers, loops = (int(number or 1) for number in found.groups())
    trunk = TrunkConfig(
        hidden_size=width,
        num_layers=layers,
        loops=loops,
        num_heads=max(width // 64, 1),
        injection=args.injection == "on",
        gradient_checkpointing=args.checkpointing,
    )
    config = PretrainConfig.model_validate(
        {
            "voice": voice,
            "out": Path(tempfile.gettempdir()) / "unused",
            "data": DataConfig(max_tasks=args.max_tasks, num_aug=0),
            "trunk": trunk,
            "trm": {"supervision_steps": args.supervision_steps},
            "training": {"tokens_per_batch": args.tokens, "attention": attention},
        }
    )
    return build_run(config, base, accelerator, time.monotonic())


def measured(run: Run, args: argparse.Namespace, ceiling: float) -> dict[str, str]:
    """A column of the table: `rounds` x `steps` optimiser steps (reading metrics waits)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run_steps(run, args.warmup)
    pairs, tokens, seconds = [], [], []
    for _ in range(args.rounds):
        begin, before = time.perf_counter(), run.examples
        metrics = run_steps(run, args.steps)
        took = time.perf_counter() - begin
        seconds.append(took / args.steps)
        pairs.append((run.examples - before) / took)
        tokens.append(metrics["tokens_per_second"])
    sizes = run.model["trunk"].config
    width, depth = sizes.hidden_size, sizes.depth
    per_layer = 4 * width**2 + 3 * width * sizes.inner_size + sizes.injection * width**2
    used = 6 * depth * per_layer * statistics.median(tokens) / run.accelerator.num_processes
    peak = "-"
    if torch.cuda.is_available():
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return {
        "weights": f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}M",
        "tokens a batch": f"{args.tokens:,}",
        "ms a step": f"{statistics.median(seconds) * 1000:.1f}",
        "pairs/s": f"{statistics.median(pairs):,.0f}",
        "(spread)": f"{max(pairs) - min(pairs):,.0f}",
        "tokens/s": f"{statistics.median(tokens):,.0f}",
        "TFLOP/s": f"{used / 1e12:.0f} of {ceiling / 1e12:.0f}",
        "peak memory": peak,
    }


def run_steps(run: Run, steps: int) -> dict[str, float]:
    """Optimiser steps; their metrics."""
    for _ in range(steps):
        train_step(run)
    return read_metrics(run)


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product on random data."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 10)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for count in (3, repeats):
        begin = time.perf_counter()
        for _ in range(count):
            product = a @ b
        product[0, 0].item()  # waits
    return 2 * size**3 * repeats / (time.perf_counter() - begin)


def show_profile(run: Run, steps: int) -> None:
    """Device time by kernel; on a CPU, time by operator."""
    kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[kind]) as trace:
        run_steps(run, steps)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    console().print(trace.key_averages().table(sort_by=key, row_limit=25), markup=False)


if __name__ == "__main__":
    main()
