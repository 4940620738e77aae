"""Which setting learns tasks better, in the small: several seeds of each, and their spread.

    python benchmarks/screen.py --out runs/screen --seeds 4 --arm plain \
        --arm decay training.optimiser.weight_decay=0.1 --arm wide reader.hidden_size=512

Settings are chosen by this and by `held_out_loss.py`. The data are the tasks of ARC-AGI-1
*training* with the shortest pairs; of a task with four demonstrations or more the last is asked
for, too, so no evaluation task has a part in it. An arm is a name and the keys it changes; every
run is `arctrm pretrain` and `arctrm eval` with the keys of `SMALL`, in processes of their own,
`--jobs` at a time on each GPU. Runs that are there already are not run again, so more arms or seeds
can be added later, and an interrupted call goes on where it was.
"""

import argparse
import gzip
import json
import os
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from arctrm.console import console
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import ConfigError
from arctrm.reader.tokens import pair_length
from arctrm.training.checkpoints import latest_checkpoint
from common import guarded

TEST_SET = "small.json.gz"
MANY_DEMONSTRATIONS = 4
"""Of which the last one becomes a test pair."""
ATTEMPTS = (1, 2, 10)

SMALL = {
    "training.tokens_per_batch": "8192",
    "training.schedule.warmup_steps": "60",
    "training.schedule.constant_fraction": "0.4",
    "training.optimiser.muon_lr": "0.01",
    "training.ema_decay": "0.99",
    "training.log_every": "100",
}
MODELS = {
    "reader": {
        "model": "reader",
        "reader.hidden_size": "256",
        "reader.num_heads": "4",
        "reader.num_layers": "2",
        "reader.loops": "3",
        "reader.input_attention": "full",
        "reader.output_noise": "0.08",
        "training.optimiser.adamw_lr": "1e-3",
    },
    "trm": {
        "trm.hidden_size": "256",
        "trm.num_heads": "4",
        "trm.H_cycles": "2",
        "trm.L_cycles": "3",
        "trm.halt_max_steps": "4",
        "data.enlarge_canvas": "0.1",
    },
}
ANSWERS = {"inference.views": "16", "inference.compile": "off"}
RANKING = {"reader.rank": "experts", "reader.scoring_views": "8"}
"""Where there is a reader to rank by."""


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
    parser.add_argument(
        "--arm", action="append", nargs="+", required=True, metavar="NAME KEY=VALUE"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(MODELS), default="reader")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--jobs", type=int, default=4, help="at a time on each GPU; 1 on a CPU")
    return parser.parse_args()


def write_test_set(path: Path, count: int) -> int:
    """The tasks with the shortest pairs, as a map; returns the number of test pairs."""
    tasks = sorted(load_tasks("training"), key=lambda task: (longest_pair(task), task.id))[:count]
    split = {task.id: as_json(task) for task in tasks}
    path.write_bytes(gzip.compress(json.dumps(split).encode(), mtime=0))
    return sum(len(task["test"]) for task in split.values())


def longest_pair(task: Task) -> int:
    """Tokens of it."""
    return max(pair_length(pair) for pair in task.demonstrations + task.test)


def as_json(task: Task) -> dict[str, list[dict[str, list[list[int]]]]]:
    """As in a task file, with the last of many demonstrations among the test pairs."""
    kept = len(task.demonstrations) - (len(task.demonstrations) >= MANY_DEMONSTRATIONS)
    asked = task.test + task.demonstrations[kept:]
    return {"train": cells(task.demonstrations[:kept]), "test": cells(asked)}


def cells(pairs: Sequence[Pair]) -> list[dict[str, list[list[int]]]]:
    """Pairs whose outputs are known, as in a task file."""
    found = []
    for pair in pairs:
        assert pair.output is not None
        found.append({"input": pair.input.tolist(), "output": pair.output.tolist()})
    return found


def carry_out(runs: Sequence[Run], args: argparse.Namespace) -> list[Path]:
    """Run all of them; returns the folders of those that failed."""
    places: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in [str(i) for i in range(torch.cuda.device_count())] * args.jobs or [""]:
        places.put(device)
    began = time.monotonic()

    def one(run: Run) -> bool:
        place = places.get()
        try:
            done = carry_out_one(run, args, place)
        finally:
            places.put(place)
        word = "done" if done else "FAILED"
        console().print(f"{run.folder.name}: {word} after {time.monotonic() - began:.0f} s")
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
    trained = {
        "data.subsets": json.dumps([str(test_set)]),
        "data.test_set": str(test_set),
        "data.num_aug": "0",
        "seed": str(run.seed),
        "training.schedule.max_steps": str(args.steps),
        **SMALL,
        **MODELS[args.model],
    }
    answered = {"evaluation.test_set": str(test_set), **ANSWERS}
    if args.model == "reader":
        answered |= RANKING
    weights, answers = run.folder / "weights", run.folder / "eval"
    train = [*words("pretrain", weights, trained), *sets(run.arm.changes)]
    if latest_checkpoint(weights) is not None:
        train = [*train, "--resume"]
    answer = [*words("eval", answers, answered), "--checkpoint", str(weights)]
    run.folder.mkdir(exist_ok=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with (run.folder / "log.txt").open("w") as log:
        return all(
            subprocess.run(command, stdout=log, stderr=log, env=environment).returncode == 0
            for command in (train, answer)
        )


def words(command: str, out: Path, keys: dict[str, str]) -> list[str]:
    """A command line of arctrm."""
    given = sets([f"{key}={value}" for key, value in keys.items()])
    return [sys.executable, "-m", "arctrm", command, "--out", str(out), *given]


def sets(changes: Sequence[str]) -> list[str]:
    """KEY=VALUE as flags."""
    return [word for change in changes for word in ("--set", change)]


def print_table(arms: Sequence[Arm], runs: Sequence[Run], title: str) -> None:
    table = Table(title=title)
    for column in ("arm", "seeds", *(f"pass@{k}" for k in ATTEMPTS), "of seeds, at 2", "exact (%)"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        if not own:
            continue
        scores = [[100 * score(run, k) for k in ATTEMPTS] for run in own]
        means = [f"{statistics.mean(column):.1f}" for column in zip(*scores, strict=True)]
        at_two = [row[ATTEMPTS.index(2)] for row in scores]
        spread = f"{statistics.stdev(at_two):.1f}" if len(own) > 1 else "-"
        exact = [value for run in own for value in exact_in_training(run)]
        shown = f"{100 * statistics.mean(exact):.1f}" if len(exact) == len(own) else "-"
        table.add_row(arm.name, str(len(own)), *means, spread, shown)
    console().print(table)


def score(run: Run, attempts: int) -> float:
    """`task_fraction` of a run."""
    return json.loads(run.scores.read_text())["task_fraction"][f"pass@{attempts}"]


def exact_in_training(run: Run) -> list[float]:
    """Share of the training pairs that are right at the end; none of a run that ended before it was
    measured (`training.log_every`).
    """
    lines = (run.folder / "weights" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["exact_match"] for line in lines[-1:]]


if __name__ == "__main__":
    guarded(main)
