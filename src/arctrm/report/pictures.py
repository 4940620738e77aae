"""Grids and curves as SVG.

A row of a grid is one dashed line for each run of a colour, with a dash for each cell: much smaller
than a rectangle for each cell. What shows between the dashes is the line between the cells.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import log2

import numpy as np
from markupsafe import Markup, escape

from arctrm.console import ARC_PALETTE
from arctrm.data.task import Grid

HIDDEN = len(ARC_PALETTE)  # a cell that shows nothing yet
MAX_CELL = 72  # pixels
GRID_STYLE = (
    ".grid rect{fill:#555}.grid g{fill:none}"
    ".grid path{stroke-width:.94;stroke-dasharray:.94 .06}"
    ".grid .mark{stroke:#000;stroke-linecap:round}"
    ".grid .mark path{stroke-width:.56;stroke-dasharray:none}"
    ".grid .mark path+path{stroke:#fff;stroke-width:.34}"
    + "".join(f".c{n}{{stroke:{shade}}}" for n, shade in enumerate((*ARC_PALETTE, "#777")))
)
"""Style sheet of grids, for a page or for the <style> of a picture."""


def grid_svg(grid: Grid, side: int = 160, marks: Mapping[str, np.ndarray] | None = None) -> Markup:
    """A grid whose longer side has about `side` pixels; `marks`: bool [H, W] by name, dots on cells
    that a page can show name by name.
    """
    height, width = grid.shape
    cell = max(2, min(MAX_CELL, side // max(height, width)))
    runs: dict[int, list[str]] = {}
    for y, row in enumerate(grid.tolist()):
        starts = [0, *(x for x in range(1, width) if row[x] != row[x - 1]), width]
        for x, end in pairwise(starts):
            runs.setdefault(row[x], []).append(f"M{x} {y}h{end - x}")
    lines = "".join(f'<path class="c{c}" d="{"".join(own)}"/>' for c, own in sorted(runs.items()))
    dots = ""
    for name, mask in (marks or {}).items():
        path = "".join(f"M{x} {y}h0" for y, x in np.argwhere(mask).tolist())
        twice = f'<path d="{path}"/>' * 2  # a ring and its middle
        head = f'<g class="mark" data-name="{escape(name)}" transform="translate(.5 .5)">'
        dots += f"{head}{twice}</g>" if path else ""
    return Markup(
        f'<svg class="grid" viewBox="0 0 {width} {height}" width="{width * cell}" '
        f'height="{height * cell}" role="img" aria-label="grid, {height} by {width}">'
        f'<rect width="{width}" height="{height}"/>'
        f'<g transform="translate(.03 .5)">{lines}</g>{dots}</svg>'
    )


def curve_svg(
    curves: Mapping[str, Mapping[int, float]], wide: int = 520, high: int = 240
) -> Markup:
    """Shares (0..1) against a number of views, which doubles from step to step."""
    views = sorted({count for own in curves.values() for count in own})
    tenths = [10 * share for own in curves.values() for share in own.values()]
    low, top = min(9, int(min(tenths))), min(10, int(max(tenths)) + 1)
    left, right, above, below = 34, wide - 12, 12, high - 34
    span = max(1.0, log2(views[-1] / views[0]))
    x = lambda count: left + (right - left) * log2(count / views[0]) / span
    y = lambda tenth: below - (below - above) * (tenth - low) / (top - low)
    text = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    parts = [f'<path class="rule" d="M{left} {y(n):.1f}H{right}"/>' for n in range(low, top + 1)]
    parts += [text.format(left - 8, y(n) + 4, "end", 10 * n) for n in range(low, top + 1)]
    parts += [text.format(x(count), below + 18, "middle", count) for count in views]
    for number, (name, own) in enumerate(curves.items()):
        points = [(x(count), y(10 * share)) for count, share in sorted(own.items())]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points)
        drawn = f'<title>{escape(name)}</title><path d="M{line}"/>{dots}'
        parts.append(f'<g class="curve curve-{number}">{drawn}</g>')
    return Markup(
        f'<svg class="chart" viewBox="0 0 {wide} {high}" role="img" '
        f'aria-label="share solved against the number of views">{"".join(parts)}</svg>'
    )
