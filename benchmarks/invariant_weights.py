"""How much each broken invariant says against a grid: counts it and writes the weights.

    python benchmarks/invariant_weights.py --tasks small.json.gz --scores scores/0 \\
        --recipe src/arctrm/configs/arc1_1h.toml --write

Right answers: the test pairs of ARC-AGI-1 *training*. Wrong ones: the first grids of `arctrm eval
--set evaluation.keep_candidates=true` for training tasks that the weights had not seen, but the
right one. Tasks that `--recipe` leaves out of training are left out here, too. Prints how the
candidates rank with weights from other tasks (`--folds`); `--write` puts those of all tasks into
the package.
"""

import argparse
import json
import math
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from rich.table import Table

from arctrm.console import console
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task, in_hash_order
from arctrm.invariants.task import Invariants
from arctrm.solve import scoring
from arctrm.solve.rank import LOOKED_AT, Ranked, by_invariants
from arctrm.solve.results import CANDIDATES, read_candidates
from common import guarded
from rankings import INVARIANT_WEIGHTS, row

FIRST = 6
"""Candidates of a test input that are counted, at most: those that could become attempts."""
FEWEST, LEAST, PRIOR = 8, 0.3, 0.5
"""Right answers of tasks with an invariant and nats below which it is left out; added to counts."""

Counts = tuple[Counter[str], Counter[str]]
"""Of answers (or shares of one): how many there are while a task has an invariant, and break it."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", required=True, help="the tasks that were answered")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="folders of eval")
    parser.add_argument("--recipe", type=Path, required=True, help="data.exclude is obeyed")
    parser.add_argument("--folds", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="into the package")
    args = parser.parse_args()
    left_out = set(tomllib.loads(args.recipe.read_text(encoding="utf-8"))["data"]["exclude"])
    right = {t.id: count_right(t) for t in load_tasks("training") if t.id not in left_out}
    tasks = {task.id: task for task in load_tasks(args.tasks) if task.id not in left_out}
    runs = [read_candidates(folder / CANDIDATES).items() for folder in args.scores]
    looked = [{n: looked_at(tasks[n], own) for n, own in run if n in tasks} for run in runs]
    wrong: dict[str, Counts] = defaultdict(lambda: (Counter(), Counter()))
    for run in looked:
        for name, inputs in run.items():
            count_wrong(tasks[name], inputs, wrong[name])
    folds = {name: number % args.folds for number, name in enumerate(in_hash_order(tasks))}
    by_fold = [
        weigh(
            *([c for n, c in counts.items() if folds.get(n) != fold] for counts in (right, wrong))
        )
        for fold in range(args.folds)
    ]
    known = scoring.answers(tasks.values())
    table = Table(title=f"{len(tasks)} tasks, {args.folds} folds, task_fraction (%)")
    for column in ("scores", "weight", *(f"pass@{k}" for k in scoring.PASSES)):
        table.add_column(column)
    for folder, run in zip(args.scores, looked, strict=True):
        for weight in INVARIANT_WEIGHTS:
            ranked = {
                name: [reranked(own, by_fold[folds[name]], weight) for own in inputs]
                for name, inputs in run.items()
            }
            own = {name: known[name] for name in ranked}
            table.add_row(str(folder), f"{weight:g}", *row(ranked, own, list))
    console().print(table)
    found = weigh(right.values(), wrong.values())
    for name, nats in found.items():
        console().print(f"{nats:5.2f}  {name}", highlight=False)
    if args.write:
        path = Path(str(files("arctrm.invariants").joinpath("weights.json")))
        content = {"unit": "nats", "weights": found}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def count(counts: Counts, names: Iterable[str], broken: Iterable[str], share: float = 1.0) -> None:
    """One answer, or a share of one."""
    for counter, own in zip(counts, (names, broken), strict=True):
        for name in own:
            counter[name] += share  # type: ignore[assignment]


def count_right(task: Task) -> Counts:
    """Of the test outputs."""
    own, counts = Invariants(task.demonstrations), (Counter(), Counter())
    for pair in task.test:
        assert pair.output is not None
        count(counts, own.names, own.broken(pair.input, pair.output))
    return counts


def looked_at(task: Task, inputs: Sequence[Sequence[Ranked]]) -> list[list[Ranked]]:
    """The rankings of an evaluation, and what each of the first grids breaks."""
    own, found = Invariants(task.demonstrations), []
    for ranked, pair in zip(inputs, task.test, strict=True):
        names = [sorted(own.broken(pair.input, one.grid)) for one in ranked[:LOOKED_AT]]
        found.append(by_invariants(ranked, [dict.fromkeys(broken, 0.0) for broken in names], 0.0))
    return found


def count_wrong(task: Task, inputs: Sequence[Sequence[Ranked]], counts: Counts) -> None:
    """Of the first wrong grids of every test input, which count as one together."""
    names = Invariants(task.demonstrations).names
    for ranked, pair in zip(inputs, task.test, strict=True):
        wrong = [one for one in ranked[:FIRST] if not np.array_equal(one.grid, pair.output)]
        for one in wrong:
            count(counts, names, one.broken, 1 / len(wrong))


def weigh(right: Iterable[Counts], wrong: Iterable[Counts]) -> dict[str, float]:
    """Nats by name, the heaviest first."""
    good_have, good_broken, bad_have, bad_broken = (Counter() for _ in range(4))
    for all_of, own in (((good_have, good_broken), right), ((bad_have, bad_broken), wrong)):
        for have, broken in own:
            all_of[0].update(have)
            all_of[1].update(broken)
    found = {}
    for name, have in good_have.items():
        usual = (good_broken[name] + PRIOR) / (have + 2 * PRIOR)
        others = (bad_broken[name] + 2 * PRIOR * usual) / (bad_have[name] + 2 * PRIOR)
        nats = math.log(others / usual)
        if have >= FEWEST and nats > LEAST:
            found[name] = round(nats, 2)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def reranked(ranked: Sequence[Ranked], nats: Mapping[str, float], weight: float) -> list[Ranked]:
    """Ranked grids by their places and what the first of them break."""
    worth = [{name: nats.get(name, 0.0) for name in one.broken} for one in ranked[:LOOKED_AT]]
    return by_invariants(ranked, worth, weight)


if __name__ == "__main__":
    guarded(main)
