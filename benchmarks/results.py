"""From the scores of evaluations to the tables of RESULTS.md.

    python benchmarks/results.py scores/box

Reads what `arctrm eval --ablate no-reader,no-trm,no-coupling` wrote and prints tables in markdown.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from arctrm.data.sources import load_tasks
from arctrm.data.task import Grid, Pair
from arctrm.solve.results import SUBMISSION, read_submission

NAMES = {
    "everything": "both voices",
    "no-trm": "reader alone",
    "no-reader": "TRM alone",
    "no-coupling": "both, TRM begins without drafts",
}
SIZES, FEW = (25, 100, 225, 400, 900), 10
"""Cells of the answer, at most; wrong cells that are few."""
KINDS = ("solved", "size wrong", f"up to {FEW} cells wrong", f"more than {FEW} wrong")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scores", type=Path, help="output folder of arctrm eval --ablate ...")
    parser.add_argument("--test-set", default="evaluation")
    args = parser.parse_args()
    rows = {"everything": json.loads((args.scores / "scores.json").read_text())}
    if (path := args.scores / "ablations.json").is_file():
        rows |= json.loads(path.read_text())
    submitted = read_submission(args.scores / SUBMISSION)
    tasks = [task for task in load_tasks(args.test_set) if task.id in submitted]
    pairs = [(t.id, *both) for t in tasks for both in zip(t.test, submitted[t.id], strict=True)]
    found = failures(pairs)
    print(score_table(rows), overlap_table(rows), failure_table(found), sep="\n\n")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def score_table(rows: dict) -> str:
    head = ("candidates", "pass@1", "pass@2", "pass@10", "size of attempt_1 right")
    values = lambda own: [*own["task_fraction"].values(), own["shape_accuracy"]]
    body = [(NAMES.get(n, n), *(f"{100 * v:.1f}" for v in values(own))) for n, own in rows.items()]
    return markdown(head, body)


def overlap_table(rows: dict) -> str:
    """Whole tasks by who solves them in two attempts; nothing without both ablations."""
    if not {"no-trm", "no-reader"} <= rows.keys():
        return ""
    solved = {
        name: {task for task, one in own["tasks"].items() if one["solved"] == one["total"]}
        for name, own in rows.items()
    }
    reader, trm, whole = solved["no-trm"], solved["no-reader"], solved["everything"]
    rest = set(rows["everything"]["tasks"]) - reader - trm
    groups = {"both": reader & trm, "reader only": reader - trm, "TRM only": trm - reader}
    groups["neither alone"] = rest
    body = [(name, len(own), len(own & whole)) for name, own in groups.items()]
    return markdown(("whole tasks solved by", "number", "of these by both together"), body)


def failures(pairs: Sequence[tuple[str, Pair, tuple[Grid, Grid]]]) -> np.ndarray:
    """Test pairs by the answer's size and what is wrong with the better attempt [SIZES, KINDS]."""
    found = np.zeros((len(SIZES), len(KINDS)), int)
    for _, pair, attempts in pairs:
        wrong = min(num_wrong(grid, pair.output) for grid in attempts)
        kind = 0 if wrong == 0 else 1 if wrong == np.inf else 2 if wrong <= FEW else 3
        found[np.searchsorted(SIZES, np.size(pair.output)), kind] += 1
    return found


def num_wrong(grid: Grid, answer: Grid | None) -> float:
    """Wrong cells; infinite where the size is wrong."""
    same_size = answer is not None and grid.shape == answer.shape
    return float((grid != answer).sum()) if same_size else np.inf


def failure_table(found: np.ndarray) -> str:
    least = (1, *(most + 1 for most in SIZES))
    names = [*(f"{a}-{b}" for a, b in zip(least, SIZES, strict=False)), "all"]
    body = zip(names, [*found, found.sum(0)], strict=True)
    head = ("cells of the answer", "test pairs", *KINDS)
    return markdown(head, [(name, own.sum(), *own) for name, own in body])


if __name__ == "__main__":
    main()
