"""What the reader is told about an attempt: a compact diff of the held-out demonstrations.

It is made from probe results only, so it cannot say anything about the query's answer. The same
results give the same text.
"""

from collections.abc import Sequence

import numpy as np

from arctrm.planner.probes import ProbeResult

MAX_CELLS = 16
"""Wrong cells named in one feedback text, over all probes."""

HEADING = "Feedback on the last attempt:"


def feedback_text(probes: Sequence[ProbeResult], max_cells: int = MAX_CELLS) -> str:
    """One line of counts, then one line per wrong probe; empty without probes.

    Wrong cells are named as "(row,col) predicted/true", counted from 0, row by row, at most
    `max_cells` in all: equal shares, and what a probe does not need goes to the others.

    A line looks like one of:
        demonstration 1: no grid, should be 3x3
        demonstration 2: size 3x4, should be 3x3; colours missing 5, extra 7
        demonstration 3: 3 of 9 cells wrong: (0,1) 3/5 (2,2) 0/1 and 1 more
    """
    if not probes:
        return ""
    wrong = [(number, p) for number, p in enumerate(probes, 1) if not p.exact]
    lines = [f"{len(probes) - len(wrong)} of {len(probes)} held-out demonstrations right"]
    cells = [_wrong_cells(result) for _, result in wrong]
    shares = _shares([len(found) for found in cells], max_cells)
    for (number, result), found, share in zip(wrong, cells, shares, strict=True):
        parts = filter(None, (_size(result), _cells(result, found, share), _palette(result)))
        lines.append(f"demonstration {number}: {'; '.join(parts)}")
    return "\n".join(lines)


def prompt_with_feedback(problem: str, feedback: str) -> str:
    """The problem as the next attempt reads it: unchanged, so that its cache is reused, then what
    went wrong."""
    return f"{problem}\n\n{HEADING}\n{feedback}" if feedback else problem


def _size(result: ProbeResult) -> str:
    wanted = "should be {}x{}".format(*result.truth.shape)
    if result.predicted is None:
        return f"no grid, {wanted}"
    return "" if result.shape else "size {}x{}, ".format(*result.predicted.shape) + wanted


def _palette(result: ProbeResult) -> str:
    if result.predicted is None or result.palette:
        return ""
    named = (("missing", result.missing_colours), ("extra", result.extra_colours))
    return "colours " + ", ".join(
        f"{what} {' '.join(map(str, colours))}" for what, colours in named if colours
    )


def _wrong_cells(result: ProbeResult) -> list[str]:
    """Every wrong cell; empty where the size is wrong."""
    if result.predicted is None or not result.shape:
        return []
    places = np.argwhere(result.predicted != result.truth).tolist()
    return [f"({y},{x}) {result.predicted[y, x]}/{result.truth[y, x]}" for y, x in places]


def _shares(needs: Sequence[int], total: int) -> list[int]:
    """How much each gets of `total`: as even as possible, nobody more than needed."""
    shares = [0] * len(needs)
    left = max(0, total)
    for place, i in enumerate(sorted(range(len(needs)), key=lambda i: needs[i])):
        shares[i] = min(needs[i], left // (len(needs) - place))
        left -= shares[i]
    return shares


def _cells(result: ProbeResult, wrong: list[str], share: int) -> str:
    if not wrong:
        return ""
    head = f"{len(wrong)} of {result.truth.size} cells wrong"
    if not share:
        return head
    more = f" and {len(wrong) - share} more" if share < len(wrong) else ""
    return f"{head}: {' '.join(wrong[:share])}{more}"
