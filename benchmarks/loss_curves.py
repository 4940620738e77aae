"""Does the fast way learn what the plain way learns? Loss against steps, same seeds and data.

    python benchmarks/loss_curves.py                                # a GPU: both models, minutes
    python benchmarks/loss_curves.py --model reader --hidden 64 --heads 2 --tokens 2048 --steps 60

Fast: what `pretrain` does where it can (compiled layers, one CUDA graph for a step, another for the
update, bfloat16). Plain: neither compiled nor captured, in float32 with `--exact` and in bfloat16
without. The order of the pairs is drawn on the device, and differs between the ways from the first
steps on (a captured step is warmed up on real batches), so two runs of the plain way with different
seeds say how far apart runs of one way are. Prints one table: mean loss over each tenth of the run.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.table import Table

from arctrm.config import PretrainConfig
from arctrm.console import console
from arctrm.data.build import prepare
from arctrm.training.devices import new_accelerator
from arctrm.training.pretrain import build_run
from arctrm.training.provenance import git_revision, hardware
from common import run_steps

TENTHS = 10


def main() -> None:
    args = arguments()
    for model in args.model:
        fast = [curve(args, model, True, seed) for seed in args.seeds]
        plain = [curve(args, model, False, seed) for seed in args.seeds]
        show(args, model, fast, plain)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", choices=("trm", "reader"), default=("trm", "reader"))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=None, help="default: 2 (TRM), 10 (reader)")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--exact", action="store_true", help="the plain way in float32")
    return parser.parse_args()


def curve(args: argparse.Namespace, model: str, fast: bool, seed: int) -> list[float]:
    """Mean cell loss (nats) over each tenth of a run."""
    on_gpu = torch.cuda.is_available()
    sizes = {"hidden_size": args.hidden, "num_heads": args.heads}
    if args.layers is not None:
        sizes["num_layers"] = args.layers
    dtype = "float32" if not on_gpu or (args.exact and not fast) else "bfloat16"
    config = PretrainConfig.model_validate(
        {
            "seed": seed,
            "model": model,
            model: sizes,
            "training": {
                "tokens_per_batch": args.tokens,
                "dtype": dtype,
                "compile": "on" if fast and on_gpu else "off",
                "ema_decay": 0.0,
                "schedule": {"max_steps": args.steps, "warmup_steps": args.steps // 10},
                "optimiser": {"muon_lr": 0.01},
            },
        }
    )
    base, out = prepare(config.data), Path("unused")
    job = build_run(config, base, out, new_accelerator(), time.monotonic())
    if fast and on_gpu:
        job.capture()
    losses = []
    job.metrics()
    for _ in range(TENTHS):
        losses.append(run_steps(job, args.steps // TENTHS)["cell_loss"])
    torch.compiler.reset()
    return losses


def show(
    args: argparse.Namespace, model: str, fast: list[list[float]], plain: list[list[float]]
) -> None:
    table = Table(title=f"{model}, cell loss, {git_revision()[:12]}, {hardware()}")
    columns = [f"{way}, seed {seed}" for way in ("fast", "plain") for seed in args.seeds]
    for column in ("steps", *columns, "fast - plain", "between seeds"):
        table.add_column(column, justify="right")
    for tenth in range(TENTHS):
        ways = [[run[tenth] for run in way] for way in (fast, plain)]
        apart = statistics.mean(ways[0]) - statistics.mean(ways[1])
        spread = max(max(way) - min(way) for way in ways)
        values = [f"{value:.4f}" for way in ways for value in way]
        steps = (tenth + 1) * (args.steps // TENTHS)
        table.add_row(f"{steps}", *values, f"{apart:+.4f}", f"{spread:.4f}")
    table.caption = f"d{args.hidden}, {args.tokens:,} tokens a step" + (
        ", plain in float32" if args.exact else ""
    )
    console().print(table)


if __name__ == "__main__":
    main()
