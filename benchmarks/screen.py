"""Which setting learns tasks better, in the small: several seeds of each, and their spread.

    python benchmarks/screen.py --out runs/screen --seeds 4 --arm plain \\
        --arm decay training.optimiser.weight_decay=0.1 --arm wide trunk.hidden_size=512

The data are the tasks of ARC-AGI-1 *training* with the shortest pairs; of a task with four
demonstrations or more the last is asked for, too. An arm is a name and the keys it changes; every
run is `arctrm pretrain` and `arctrm eval` in processes of their own, `--jobs` at a time on each
GPU. Runs that are there are not run again, and an interrupted call goes on where it was.
"""

import argparse
import gzip
import json
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from arctrm.checkpoints import latest_checkpoint
from arctrm.console import console
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task
from arctrm.errors import ConfigError
from arctrm.model.layout import pair_length
from arctrm.solve.scoring import PASSES
from common import guarded

TEST_SET = "small.json.gz"
MANY_DEMONSTRATIONS = 4
"""Of which the last one becomes a test pair."""

SMALL = {
    "trunk.hidden_size": "256",
    "trunk.num_heads": "4",
    "trunk.num_layers": "2",
    "reader.output_noise": "0.08",
    "training.optimiser.adamw_lr": "1e-3",
    "training.tokens_per_batch": "8192",
    "training.schedule.warmup_steps": "60",
    "training.schedule.constant_fraction": "0.4",
    "training.optimiser.muon_lr": "0.01",
    "training.ema_decay": "0.99",
    "training.log_every": "100",
}
ANSWERS = {"inference.views": "16", "judge.scoring_views": "8"}


class Arm(NamedTuple):
    """A setting: a name, and KEY=VALUE of `arctrm pretrain`."""

    name: str
    changes: tuple[str, ...]


class Run(NamedTuple):
    """An arm with one seed, in a folder of its own."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def scores(self) -> Path:
        """There when the run is done."""
        return self.folder / "eval" / "scores.json"


def main() -> None:
    args = arguments()
    arms = [Arm(name, tuple(changes)) for name, *changes in args.arm]
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError("--arm: two arms of one name; give each its own")
    args.out.mkdir(parents=True, exist_ok=True)
    num_pairs = write_test_set(args.out / TEST_SET, args.tasks)
    runs = [Run(a, s, args.out / f"{a.name}_{s}") for s in range(args.seeds) for a in arms]
    lost = carry_out([run for run in runs if not run.scores.exists()], args)
    print_table(arms, [run for run in runs if run.scores.exists()], f"{num_pairs} test pairs")
    if lost:
        sys.exit(f"error: runs failed: {len(lost)}, the first {lost[0]}; see its log.txt")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arms = {"action": "append", "nargs": "+", "required": True, "metavar": "NAME KEY=VALUE"}
    parser.add_argument("--arm", **arms)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--voice", choices=("reader", "trm", "both"), default="reader")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--jobs", type=int, default=4, help="at a time on each GPU; 1 on a CPU")
    return parser.parse_args()


def write_test_set(path: Path, count: int) -> int:
    """The tasks with the shortest pairs, as a map; returns the number of test pairs."""

    def longest_pair(task: Task) -> int:
        return max(pair_length(pair) for pair in task.demonstrations + task.test)

    cells = lambda pairs: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in pairs]
    split = {}
    for task in sorted(load_tasks("training"), key=lambda t: (longest_pair(t), t.id))[:count]:
        kept = len(task.demonstrations) - (len(task.demonstrations) >= MANY_DEMONSTRATIONS)
        asked = task.test + task.demonstrations[kept:]
        split[task.id] = {"train": cells(task.demonstrations[:kept]), "test": cells(asked)}
    path.write_bytes(gzip.compress(json.dumps(split).encode(), mtime=0))
    return sum(len(task["test"]) for task in split.values())


def carry_out(runs: Sequence[Run], args: argparse.Namespace) -> list[Path]:
    """Run all of them; returns the folders of those that failed."""
    places: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in [str(i) for i in range(torch.cuda.device_count())] * args.jobs or [""]:
        places.put(device)

    def one(run: Run) -> bool:
        place = places.get()
        try:
            done = carry_out_one(run, args, place)
        finally:
            places.put(place)
        console().print(f"{run.folder.name}: {'done' if done else 'FAILED'}")
        return done

    pool = ThreadPoolExecutor(places.qsize())
    try:
        done = list(pool.map(one, runs))
    finally:  # what is interrupted begins nothing more
        pool.shutdown(cancel_futures=True)
    return [run.folder for run, good in zip(runs, done, strict=True) if not good]


def carry_out_one(run: Run, args: argparse.Namespace, device: str) -> bool:
    """Train and evaluate; whether both went well."""
    test_set = args.out / TEST_SET
    weights, answers = run.folder / "weights", run.folder / "eval"
    trained = {
        "data.subsets": json.dumps([str(test_set)]),
        "data.test_set": str(test_set),
        "data.num_aug": "0",
        "seed": str(run.seed),
        "training.schedule.max_steps": str(args.steps),
        "voice": args.voice,
        **SMALL,
    }
    answered = {"evaluation.test_set": str(test_set), **ANSWERS}
    train = words("pretrain", weights, trained, run.arm.changes)
    train += ["--resume"] if latest_checkpoint(weights) is not None else []
    answer = [*words("eval", answers, answered), "--checkpoint", str(weights)]
    run.folder.mkdir(exist_ok=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with (run.folder / "log.txt").open("w") as log:
        return all(
            subprocess.run(command, stdout=log, stderr=log, env=environment).returncode == 0
            for command in (train, answer)
        )


def words(command: str, out: Path, keys: dict[str, str], changes: Sequence[str] = ()) -> list[str]:
    """A command line of arctrm; later keys count."""
    given = [*(f"{key}={value}" for key, value in keys.items()), *changes]
    flags = [word for one in given for word in ("--set", one)]
    return [sys.executable, "-m", "arctrm", command, "--out", str(out), *flags]


def print_table(arms: Sequence[Arm], runs: Sequence[Run], title: str) -> None:
    table = Table(title=title)
    for column in ("arm", "seeds", *(f"pass@{k}" for k in PASSES), "of seeds, at 2", "exact (%)"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        if not own:
            continue
        found = [json.loads(run.scores.read_text())["task_fraction"] for run in own]
        scores = [[100 * one[f"pass@{k}"] for k in PASSES] for one in found]
        means = [f"{statistics.mean(column):.1f}" for column in zip(*scores, strict=True)]
        at_two = [row[PASSES.index(2)] for row in scores]
        spread = f"{statistics.stdev(at_two):.1f}" if len(own) > 1 else "-"
        logs = [(run.folder / "weights" / "metrics.jsonl").read_text().splitlines() for run in own]
        exact = [json.loads(lines[-1])["exact_match"] for lines in logs if lines]
        shown = f"{100 * statistics.mean(exact):.1f}" if len(exact) == len(own) else "-"
        table.add_row(arm.name, str(len(own)), *means, spread, shown)
    console().print(table)


if __name__ == "__main__":
    guarded(main)
