"""From the scores of evaluations to the tables and plots of RESULTS.md.

    python benchmarks/results.py scores/hybrid --out results

Reads scores.json, ablations.json and submission.json of `arctrm eval --ablate no-reader,no-trm,...`
and prints, in markdown: the rows, what one part solves and the other does not, and where attempt_1
fails (size wrong, few cells wrong, many) by size of the answer. With `--out` it writes
`failures.svg`, and `examples.svg` with some of the near misses; `--curve LABEL=X:Y,X:Y...` adds
`curve.svg`, a line through the points.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arctrm.data.sources import load_tasks
from arctrm.data.task import Task

NAMES = {
    "everything": "hybrid: everything",
    "no-trm": "reader alone",
    "no-reader": "TRM alone",
    "no-coupling": "both in one pool, no coupling",
    "no-ensemble": "hybrid, first reader only",
    "no-draft": "hybrid, TRM sees no draft",
    "swap-context": "hybrid, TRM hears of another task",
}
SIZES = ((1, 25), (26, 100), (101, 225), (226, 400), (401, 900))
"""Cells of the answer: at least, at most."""
FEW = 10
"""Cells: up to so many wrong ones are few."""
TICK_ROOM = 30
"""Between two numbers on the x axis of a curve, at least."""
KINDS = ("solved", "size wrong", f"up to {FEW} cells wrong", f"more than {FEW} wrong")
COLOURS = ("#2a9d8f", "#9aa0a6", "#e9c46a", "#e76f51")
PALETTE = (
    *("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00"),
    *("#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"),
)


def main() -> None:
    args = arguments()
    rows = read_rows(args.scores)
    print(score_table(rows), "\n")
    if {"no-trm", "no-reader"} <= rows.keys():
        print(overlap_table(rows), "\n")
    tasks = {task.id: task for task in load_tasks(args.test_set)}
    submitted = json.loads((args.scores / "submission.json").read_text())
    found = failures(tasks, submitted)
    print(failure_table(found))
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "failures.svg").write_text(failure_plot(found))
    (args.out / "examples.svg").write_text(example_plot(near_misses(tasks, submitted)))
    if args.curve:
        (args.out / "curve.svg").write_text(curve_plot(args.curve, args.x_label, args.y_label))


def read_rows(scores: Path) -> dict:
    """Scores by the name of the row; of an evaluation without ablations, one row."""
    if (scores / "ablations.json").is_file():
        return json.loads((scores / "ablations.json").read_text())
    return {"everything": json.loads((scores / "scores.json").read_text())}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("scores", type=Path, help="output folder of arctrm eval --ablate ...")
    parser.add_argument("--test-set", default="evaluation")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--curve", action="append", default=[], metavar="LABEL=X:Y,X:Y")
    parser.add_argument("--x-label", default="GPU-minutes")
    parser.add_argument("--y-label", default="task_fraction at two attempts (%)")
    return parser.parse_args()


def score_table(rows: dict) -> str:
    lines = [
        "| candidates | pass@1 | pass@2 | pass@10 | size of attempt_1 right |",
        "|" + "---|" * 5,
    ]
    for name, scores in rows.items():
        passes = [f"{100 * scores['task_fraction'][f'pass@{n}']:.1f}" for n in (1, 2, 10)]
        shape = f"{100 * scores['shape_accuracy']:.1f}"
        lines.append(f"| {NAMES.get(name, name)} | {' | '.join(passes)} | {shape} |")
    return "\n".join(lines)


def solved_by(scores: dict) -> set[str]:
    """Tasks of which every test pair is solved in two attempts."""
    return {name for name, own in scores["tasks"].items() if own["solved"] == own["total"]}


def overlap_table(rows: dict) -> str:
    reader, trm = solved_by(rows["no-trm"]), solved_by(rows["no-reader"])
    whole = solved_by(rows["everything"])
    lines = ["| whole tasks solved by | number | of these by the whole |", "|---|---|---|"]
    for name, chosen in (
        ("reader and TRM", reader & trm),
        ("reader only", reader - trm),
        ("TRM only", trm - reader),
        ("neither alone", set(rows["everything"]["tasks"]) - reader - trm),
    ):
        lines.append(f"| {name} | {len(chosen)} | {len(chosen & whole)} |")
    return "\n".join(lines)


def failures(tasks: dict[str, Task], submitted: dict) -> np.ndarray:
    """Test pairs by the answer's size and what is wrong with the better attempt [SIZES, KINDS]."""
    found = np.zeros((len(SIZES), len(KINDS)), int)
    for task_id, outputs in submitted.items():
        for pair, attempts in zip(tasks[task_id].test, outputs, strict=True):
            assert pair.output is not None
            wrong = min(num_wrong(attempts[name], pair.output) for name in attempts)
            kind = 0 if wrong == 0 else 1 if wrong == np.inf else 2 if wrong <= FEW else 3
            place = next(i for i, (_, most) in enumerate(SIZES) if pair.output.size <= most)
            found[place, kind] += 1
    return found


def num_wrong(grid: Sequence[Sequence[int]], answer: np.ndarray) -> float:
    """Wrong cells; infinite where the size is wrong."""
    array = np.array(grid)
    return float((array != answer).sum()) if array.shape == answer.shape else np.inf


def failure_table(found: np.ndarray) -> str:
    lines = [f"| cells of the answer | test pairs | {' | '.join(KINDS)} |", "|" + "---|" * 6]
    for (least, most), row in zip(SIZES, found, strict=True):
        lines.append(f"| {least}-{most} | {row.sum()} | {' | '.join(map(str, row))} |")
    total = found.sum(0)
    lines.append(f"| all | {total.sum()} | {' | '.join(map(str, total))} |")
    return "\n".join(lines)


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    )
    back = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([opening, back, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'
    )


def failure_plot(found: np.ndarray) -> str:
    """Stacked bars, one for each size."""
    parts, width = [], 480
    for i, ((least, most), row) in enumerate(zip(SIZES, found, strict=True)):
        y, x = 40 + 30 * i, 110.0
        parts.append(text(100, y + 15, f"{least}-{most} cells", "end"))
        for count, colour in zip(row, COLOURS, strict=True):
            share = width * count / max(row.sum(), 1)
            parts.append(rect(x, y, share, 20, colour))
            if share > 18:
                parts.append(text(x + share / 2, y + 15, str(count), "middle"))
            x += share
    for i, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
        parts += [rect(110 + 125 * i, 12, 12, 12, colour), text(126 + 125 * i, 22, kind)]
    return svg(620, 60 + 30 * len(SIZES), parts)


def near_misses(
    tasks: dict[str, Task], submitted: dict, count: int = 6
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(id, input, answer, attempt_1) of the unsolved test pairs with the fewest wrong cells."""
    found = []
    for task_id, outputs in sorted(submitted.items()):
        for pair, attempts in zip(tasks[task_id].test, outputs, strict=True):
            assert pair.output is not None
            wrong = {name: num_wrong(grid, pair.output) for name, grid in attempts.items()}
            first = np.array(attempts["attempt_1"])
            if min(wrong.values()) > 0 and wrong["attempt_1"] < np.inf and pair.output.size <= 225:
                found.append((wrong["attempt_1"], task_id, pair.input, pair.output, first))
    found.sort(key=lambda one: one[:2])
    return [one[1:] for one in found[:count]]


def example_plot(examples: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> str:
    """A row for each example: input, answer, attempt_1."""
    parts, side, gap = [], 150, 30
    for column, name in enumerate(("input", "answer", "attempt_1")):
        parts.append(text(90 + column * (side + gap), 20, name))
    for row, (task_id, *grids) in enumerate(examples):
        top = 30 + row * (side + 10)
        parts.append(text(5, top + 15, task_id))
        for column, grid in enumerate(grids):
            cell = side / max(grid.shape)
            left = 90 + column * (side + gap)
            for (y, x), colour in np.ndenumerate(grid):
                place = (left + x * cell, top + y * cell)
                parts.append(rect(*place, cell * 0.96, cell * 0.96, PALETTE[colour]))
    return svg(90 + 3 * (side + gap), 40 + len(examples) * (side + 10), parts)


def curve_plot(curves: Sequence[str], x_label: str, y_label: str) -> str:
    """Lines through points, the x axis logarithmic."""
    lines = {}
    for curve in curves:
        label, _, points = curve.partition("=")
        lines[label] = [tuple(map(float, point.split(":"))) for point in points.split(",")]
    xs = np.log([x for points in lines.values() for x, _ in points])
    low, high = xs.min() - 0.2, xs.max() + 0.2
    top = 10 * np.ceil(max(y for points in lines.values() for _, y in points) / 10)

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 460 * (np.log(x) - low) / (high - low), 270 - 240 * y / top

    parts = [rect(60, 270, 460, 1, "#333"), rect(60, 30, 1, 240, "#333")]
    parts += [text(290, 310, x_label, "middle"), text(10, 20, y_label)]
    for y in range(0, int(top) + 1, 10):
        parts += [text(52, place(1, y)[1] + 4, str(y), "end")]
    coloured = zip(lines.items(), (*COLOURS, *PALETTE), strict=False)
    for number, ((label, points), colour) in enumerate(coloured):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*p) for p in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in points:
            a, b = place(x, y)
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>')
            parts.append(text(a, b - 8, f"{y:g}", "middle"))
        parts.append(rect(540, 32 + 20 * number, 10, 10, colour))
        parts.append(text(556, 42 + 20 * number, label))
    last = -math.inf
    for x in sorted({x for points in lines.values() for x, _ in points}):
        a, _ = place(x, 0)
        if a - last >= TICK_ROOM:  # else it would cover the one before
            parts.append(text(a, 286, f"{x:g}", "middle"))
            last = a
    return svg(780, 320, parts)


if __name__ == "__main__":
    main()
