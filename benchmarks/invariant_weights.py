"""How much each broken invariant says against a grid: counts it and writes the weights.

    arctrm eval --checkpoint READER --set evaluation.test_set=small.json.gz \
      --set evaluation.keep_candidates=true --out scores/0
    python benchmarks/invariant_weights.py --tasks small.json.gz --scores scores/0 --write

Right answers: the test pairs of ARC-AGI-1 *training*. Wrong ones: the first grids that readers
proposed for test pairs of training tasks that they had not seen (`benchmarks/screen.py` leaves such
scores), but the right one. Tasks that `configs/arc1_1h.toml` leaves out of training are left out
here, too. Prints how the candidates rank before and after, with weights from the other tasks
(`--folds`), and the weights; `--write` puts those of all tasks into the package.
"""

import argparse
import json
import math
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
from rich.table import Table

from arctrm.console import console
from arctrm.data.sources import load_tasks
from arctrm.data.task import Grid, Task, in_hash_order
from arctrm.invariants.shared import Invariants
from arctrm.solving import scoring
from arctrm.solving.kept import KEPT, read_candidates
from arctrm.solving.vote import Ranked, by_invariants
from common import guarded

FIRST = 6
"""Candidates of a test input that are counted, at most: those that could become attempts."""
FEWEST = 8
"""Right answers of tasks with an invariant below which it is worth nothing."""
LEAST = 0.3
"""Nats below which an invariant is left out."""
PRIOR = 0.5
"""Added to every count."""


@dataclass
class Counts:
    """Of the answers of one task: how many there are while it has an invariant, and break it."""

    have: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def add(self, names: Iterable[str], broken: Iterable[str], share: float = 1.0) -> None:
        """One answer, or a share of one."""
        for name in names:
            self.have[name] += share
        for name in broken:
            self.broken[name] += share

    def __iadd__(self, other: "Counts") -> "Counts":
        self.have.update(other.have)
        self.broken.update(other.broken)
        return self


@dataclass(frozen=True, eq=False)
class Judged:
    """The candidates of one test input of a task, best first."""

    task: str
    index: int
    ranked: list[Ranked]


def main() -> None:
    args = arguments()
    recipe = tomllib.loads(Path(args.recipe).read_text(encoding="utf-8"))
    left_out = set(recipe["data"]["exclude"])
    right = count_right(task for task in load_tasks("training") if task.id not in left_out)
    tasks = {task.id: task for task in load_tasks(args.tasks) if task.id not in left_out}
    invariants = {name: Invariants(task.demonstrations) for name, task in tasks.items()}
    runs = [looked_at(folder, tasks, invariants) for folder in args.scores]
    wrong: dict[str, Counts] = defaultdict(Counts)
    for run in runs:
        count_wrong(run, tasks, invariants, wrong)
    names = in_hash_order(tasks)
    folds = {name: number % args.folds for number, name in enumerate(names)}
    by_fold = [
        weigh(
            [own for name, own in right.items() if folds.get(name) != fold],
            [own for name, own in wrong.items() if folds.get(name) != fold],
        )
        for fold in range(args.folds)
    ]
    known = scoring.answers(list(tasks.values()))
    table = Table(title=f"{len(tasks)} tasks, {args.folds} folds, task_fraction (%)")
    for column in ("scores", "weight", *(f"pass@{k}" for k in scoring.PASSES)):
        table.add_column(column)
    for folder, run in zip(args.scores, runs, strict=True):
        for weight in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
            table.add_row(
                str(folder),
                f"{weight:g}",
                *row(run, known, lambda name: by_fold[folds[name]], weight),
            )
    console().print(table)
    found = weigh(right.values(), wrong.values())
    for name, nats in found.items():
        console().print(f"{nats:5.2f}  {name}", highlight=False)
    if args.write:
        path = Path(str(files("arctrm.invariants").joinpath("weights.json")))
        content = {"unit": "nats", "weights": found}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", required=True, help="the tasks that were answered")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="folders of eval")
    parser.add_argument("--recipe", default="configs/arc1_1h.toml", help="data.exclude is obeyed")
    parser.add_argument("--folds", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="into the package")
    return parser.parse_args()


def count_right(tasks: Iterable[Task]) -> dict[str, Counts]:
    """Of the test outputs, by task."""
    found: dict[str, Counts] = {}
    for task in tasks:
        own, counts = Invariants(task.demonstrations), Counts()
        for pair in task.test:
            assert pair.output is not None
            counts.add(own.names, own.broken(pair.input, pair.output))
        found[task.id] = counts
    return found


def looked_at(
    folder: Path, tasks: Mapping[str, Task], invariants: Mapping[str, Invariants]
) -> list[Judged]:
    """What an evaluation kept, as it ranked it; what each of the first breaks."""
    return [
        Judged(name, index, by_invariants(own, breaks, {}, 0.0))
        for name, inputs in read_candidates(folder / KEPT).items()
        if name in tasks
        for index, own in enumerate(inputs)
        for breaks in [
            [invariants[name].broken(tasks[name].test[index].input, one.grid) for one in own[:16]]
        ]
    ]


def count_wrong(
    run: Iterable[Judged],
    tasks: Mapping[str, Task],
    invariants: Mapping[str, Invariants],
    counts: dict[str, Counts],
) -> None:
    """Of the first wrong grids of every test input, which count as one together."""
    for one in run:
        answer = tasks[one.task].test[one.index].output
        wrong = [r for r in one.ranked[:FIRST] if not np.array_equal(r.grid, answer)]
        for ranked in wrong:
            counts[one.task].add(invariants[one.task].names, ranked.broken, 1 / len(wrong))


def weigh(right: Iterable[Counts], wrong: Iterable[Counts]) -> dict[str, float]:
    """Nats by name, the heaviest first."""
    good, bad = Counts(), Counts()
    for own in right:
        good += own
    for own in wrong:
        bad += own
    found = {}
    for name, have in good.have.items():
        usual = (good.broken[name] + PRIOR) / (have + 2 * PRIOR)
        others = (bad.broken[name] + 2 * PRIOR * usual) / (bad.have[name] + 2 * PRIOR)
        nats = math.log(others / usual)
        if have >= FEWEST and nats > LEAST:
            found[name] = round(nats, 2)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def row(
    run: Iterable[Judged],
    known: dict[str, list[Grid | None]],
    weights: Callable[[str], dict[str, float]],
    weight: float,
) -> list[str]:
    """The scores with such weights, in percent."""
    found: dict[str, list[list[Grid]]] = {}
    for one in run:
        broken = [frozenset(r.broken) for r in one.ranked[:16]]
        ranked = by_invariants(one.ranked, broken, weights(one.task), weight)
        found.setdefault(one.task, []).append([r.grid for r in ranked[: scoring.PASSES[-1]]])
    own = {task: known[task] for task in found}
    scores = scoring.score(found, own).task_fraction
    return [f"{100 * scores[k]:.1f}" for k in scoring.PASSES]


if __name__ == "__main__":
    guarded(main)
