"""TRM training throughput and peak memory, compact layout, on the ARC-AGI-1 mix.

    python benchmarks/trm_training.py --tokens 150000 --H-cycles 3 --L-cycles 4
    torchrun --standalone --nproc-per-node 2 benchmarks/trm_training.py

Prints one table: supervision steps on pairs ("examples") per second, tokens per second, peak
memory, and the share of the machine's bfloat16 matrix rate, which is measured in the same run.
`--tokens` is for each process; figures are sums over the processes, the share is that of one.
Canvases are not enlarged unless `--enlarge` says so: the reference's are not either.
The reference implementation (compiled, bfloat16, 916 tokens a pair, batch 768) reaches 939
examples/s at 133.5 GiB on one H200.
"""

import argparse
import time
from pathlib import Path

from rich.table import Table

from arctrm.config import DataConfig, OptimiserConfig, PretrainConfig, TrainingConfig, TRMConfig
from arctrm.console import console
from arctrm.data.build import prepare
from arctrm.training.devices import new_accelerator
from arctrm.training.estimate import operations_per_token
from arctrm.training.loop import Run
from arctrm.training.pretrain import build_run
from arctrm.training.provenance import git_revision, hardware
from common import matrix_rate, measure, peak_memory, run_steps, show_profile

REFERENCE_EXAMPLES_PER_SECOND, REFERENCE_GIB = 939, 133.5


def main() -> None:
    args = arguments()
    job = build(args)
    result = measure(job, args.steps, args.rounds, args.warmup)
    processes = job.accelerator.num_processes
    if not job.accelerator.is_main_process:
        return
    rate, tokens = (
        result.median(values) for values in (result.examples_per_second, result.tokens_per_second)
    )
    ceiling = matrix_rate(job.accelerator.device)
    used = operations_per_token(job.model.config) * tokens / processes
    table = Table(title=f"TRM training, {git_revision()[:12]}, {hardware()}", show_header=False)
    table.caption = f"{processes} process(es)"
    for name, value in {
        "model": f"d{args.hidden} x {args.layers} layers, H{args.H_cycles}/L{args.L_cycles}",
        "batch": f"{args.tokens:,} tokens, {result.rows:.0f} pairs",
        "optimiser step": f"{result.median(result.seconds_per_step) * 1000:.1f} ms",
        "examples/s": f"{rate:,.0f} (spread {result.spread(result.examples_per_second):,.0f} over "
        f"{args.rounds} rounds)",
        "tokens/s": f"{tokens:,.0f}, {tokens / rate:.0f} a pair",
        "against the reference's 939/s": f"{rate / REFERENCE_EXAMPLES_PER_SECOND:.2f}x",
        "peak memory": f"{peak_memory()} (reference: {REFERENCE_GIB})",
        "matrix rate used": f"{used / 1e12:.0f} of {ceiling / 1e12:.0f} TFLOP/s "
        f"({used / ceiling:.0%}, attention not counted)",
    }.items():
        table.add_row(name, value)
    console().print(table)
    if args.profile and processes == 1:
        show_profile(lambda: run_steps(job, args.steps))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--H-cycles", type=int, default=3)
    parser.add_argument("--L-cycles", type=int, default=4)
    parser.add_argument(
        "--enlarge", type=float, default=0.0, help="share of the canvases that are enlarged"
    )
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tasks", type=int, default=None)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def build(args: argparse.Namespace) -> Run:
    config = PretrainConfig(
        data=DataConfig(max_tasks=args.max_tasks, enlarge_canvas=args.enlarge),
        trm=TRMConfig(
            hidden_size=args.hidden,
            num_heads=args.heads,
            num_layers=args.layers,
            H_cycles=args.H_cycles,
            L_cycles=args.L_cycles,
        ),
        training=TrainingConfig(tokens_per_batch=args.tokens, optimiser=OptimiserConfig()),
    )
    accelerator = new_accelerator()
    job = build_run(config, prepare(config.data), Path("unused"), accelerator, time.monotonic())
    if accelerator.device.type == "cuda":
        job.capture()
    return job


if __name__ == "__main__":
    main()
