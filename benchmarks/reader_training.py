"""Tiny reader training throughput and peak memory, packed, on the ARC-AGI-1 mix.

    python benchmarks/reader_training.py                       # d768 x 10 layers, about 75M
    python benchmarks/reader_training.py --hidden 512 --heads 8 --profile
    torchrun --standalone --nproc-per-node 2 benchmarks/reader_training.py

Prints one table: pairs and tokens per second, peak memory, and the share of the machine's bfloat16
matrix rate, which is measured in the same run. `--tokens` is for each process; figures are sums
over the processes, the share is that of one. `--profile` adds the device time by kernel.
mdlARC's decoder (75.5M, packed batches) reaches 294k tokens/s on one H200.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.table import Table

from arctrm.config import DataConfig, PretrainConfig, TrainingConfig
from arctrm.config.reader import ReaderConfig
from arctrm.console import console
from arctrm.data.build import prepare
from arctrm.training.devices import new_accelerator
from arctrm.training.loop import Run
from arctrm.training.pretrain import build_run
from arctrm.training.provenance import git_revision, hardware
from arctrm.trm.model import count_parameters
from common import matrix_rate, measure, peak_memory, run_steps, show_profile

REFERENCE_TOKENS_PER_SECOND = 294_000


def main() -> None:
    args = arguments()
    job = build(args)
    result = measure(job, args.steps, args.rounds, args.warmup)
    processes = job.accelerator.num_processes
    if not job.accelerator.is_main_process:
        return
    tokens = result.median(result.tokens_per_second)
    trunk = count_parameters(job.model)["trunk"]
    ceiling = matrix_rate(job.accelerator.device)
    used = 6 * trunk * tokens / processes
    table = Table(title=f"reader training, {git_revision()[:12]}, {hardware()}", show_header=False)
    table.caption = f"{processes} process(es)"
    for name, value in {
        "model": f"d{args.hidden} x {args.layers} layers, {trunk / 1e6:.1f}M parameters, inputs "
        f"seen {'whole' if args.input_attention == 'full' else 'causally'}",
        "batch": f"{args.tokens:,} tokens, {result.rows:.0f} pairs",
        "optimiser step": f"{result.median(result.seconds_per_step) * 1000:.2f} ms",
        "pairs/s": f"{result.median(result.examples_per_second):,.0f} (spread "
        f"{result.spread(result.examples_per_second):,.0f} over {args.rounds} rounds)",
        "tokens/s": f"{tokens:,.0f} (spread {result.spread(result.tokens_per_second):,.0f})",
        "against the reference's 294k": f"{tokens / REFERENCE_TOKENS_PER_SECOND:.2f}x",
        "peak memory": peak_memory(),
        "floor of the matrix products": f"{used / ceiling * 100:.0f} % of the time "
        f"({used / 1e12:.0f} of {ceiling / 1e12:.0f} TFLOP/s, attention not counted)",
    }.items():
        table.add_row(name, value)
    console().print(table)
    if args.profile and processes == 1:
        show_profile(lambda: run_steps(job, args.steps))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--sequence", choices=("pair", "task"), default="pair")
    parser.add_argument("--input-attention", choices=("causal", "full"), default="causal")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tasks", type=int, default=None)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def build(args: argparse.Namespace) -> Run:
    config = PretrainConfig(
        model="reader",
        data=DataConfig(max_tasks=args.max_tasks, num_aug=0),
        reader=ReaderConfig(
            hidden_size=args.hidden,
            num_heads=args.heads,
            num_layers=args.layers,
            sequence=args.sequence,
            input_attention=args.input_attention,
        ),
        training=TrainingConfig(tokens_per_batch=args.tokens),
    )
    accelerator = new_accelerator()
    job = build_run(config, prepare(config.data), Path("unused"), accelerator, time.monotonic())
    if torch.cuda.is_available():
        job.capture()
    return job


if __name__ == "__main__":
    main()
