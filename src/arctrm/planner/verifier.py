"""The verifier: judges an attempt by demonstrations that were held out, never by the answer.

A probe is a demonstration that was asked for like a test input, without its output. A grid that is
missing or malformed is wrong, whatever it is compared with. A target, where one is given, is
compared with the prediction for the metrics alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from arctrm.data.parse import parse_grid
from arctrm.data.task import Grid, Pair
from arctrm.errors import TaskError

MAX_CELLS = 16  # wrong cells named in one feedback text, over all probes
HEADING = "Feedback on the last attempt:"


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a prediction for a held-out demonstration has right."""

    predicted: Grid | None  # None where there was no well-formed grid
    truth: Grid
    exact: bool  # same size, same cells
    shape: bool
    cells: float  # share of cells (0..1) that are right; 0 where the size is wrong
    missing_colours: tuple[int, ...]
    extra_colours: tuple[int, ...]

    @property
    def palette(self) -> bool:
        """Whether exactly the right colours occur."""
        return not (self.missing_colours or self.extra_colours)

    @property
    def score(self) -> float:
        """0 (no grid) to 1 (exact), half of it for what is nearly right."""
        return 0.5 * self.exact + 0.125 * (self.shape + self.palette) + 0.25 * self.cells


def probe(predicted: Any, truth: Grid) -> ProbeResult:
    """Compare a prediction (array, list of rows, or None) with a demonstration's output."""
    grid = _well_formed(predicted)
    shape = grid is not None and grid.shape == truth.shape
    cells = float(np.mean(grid == truth)) if shape else 0.0
    wanted, got = (set() if g is None else set(g.ravel().tolist()) for g in (truth, grid))
    missing, extra = tuple(sorted(wanted - got)), tuple(sorted(got - wanted))
    return ProbeResult(grid, truth, shape and cells == 1, shape, cells, missing, extra)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the verifier says about one attempt."""

    success: bool  # every probe is exact, and there is at least one
    score: float  # mean score of the probes, 0..1; 0 without probes
    feedback: str = ""  # what the reader is told before its next attempt
    probes: tuple[ProbeResult, ...] = ()  # one per demonstration, in order
    prediction: Grid | None = None  # the attempt's grid for the query; None where there is none
    latent_prefix: Tensor | None = None  # soft prefix [H] or [P, H] for the next attempt
    metrics: Mapping[str, float] = field(default_factory=dict)  # shares 0..1


class GridVerifier:
    """Judges predicted grids of held-out demonstrations (leave-one-out probes).

    `target_grid`, the query's answer if known (an array or a list of rows), feeds metrics only.
    `demonstrations` are `Pair`s, (input, output) tuples or {"input", "output"} objects of the task
    as it was shown; only their outputs are looked at.
    """

    def __init__(self, target_grid: Any = None, demonstrations: Sequence[Any] | None = None):
        self.target = None if target_grid is None else _to_grid(target_grid, "target_grid")
        of = lambda d: (
            d.output if isinstance(d, Pair) else d[1 if isinstance(d, tuple) else "output"]
        )
        given = enumerate(demonstrations or ())
        self.outputs = tuple(_to_grid(of(one), f"demonstrations[{i}].output") for i, one in given)

    def verify(
        self, probes: Sequence[Any], prediction: Any = None, latent_prefix: Tensor | None = None
    ) -> Verdict:
        """Judge one attempt by the grids predicted for the demonstrations, in order, while each
        was held out (None or anything that is no grid: wrong). `latent_prefix` is passed on.
        """
        if len(probes) != len(self.outputs):
            raise ValueError(f"got {len(probes)} probes for {len(self.outputs)} demonstrations")
        found = tuple(probe(p, truth) for p, truth in zip(probes, self.outputs, strict=True))
        grid, of = _well_formed(prediction), max(1, len(found))
        names = ("exact", "shape", "palette", "cells") if found else ()
        metrics = {f"probe_{name}": sum(getattr(one, name) for one in found) / of for name in names}
        if self.target is not None:
            own = probe(grid, self.target)
            metrics |= {"exact_match": float(own.exact), "shape_match": float(own.shape)}
            metrics["cell_accuracy"] = own.cells
        success = bool(found) and all(one.exact for one in found)
        score = sum(one.score for one in found) / of
        told = feedback_text(found)
        return Verdict(success, score, told, found, grid, latent_prefix, metrics)


def feedback_text(probes: Sequence[ProbeResult]) -> str:
    """One line of counts, then one line per wrong probe; empty without probes.

    It is made from probe results only, so it cannot say anything about the query's answer. Wrong
    cells are named as "(row,col) predicted/true", counted from 0, in equal shares of `MAX_CELLS`:
        demonstration 1: no grid, should be 3x3
        demonstration 2: size 3x4, should be 3x3; colours missing 5, extra 7
        demonstration 3: 3 of 9 cells wrong: (0,1) 3/5 (2,2) 0/1 and 1 more
    """
    if not probes:
        return ""
    wrong = [(number, p) for number, p in enumerate(probes, 1) if not p.exact]
    lines = [f"{len(probes) - len(wrong)} of {len(probes)} held-out demonstrations right"]
    for number, p in wrong:
        wanted = "should be {}x{}".format(*p.truth.shape)
        if p.predicted is None:
            lines.append(f"demonstration {number}: no grid, {wanted}")
            continue
        told = "size {}x{}, ".format(*p.predicted.shape) + wanted
        if p.shape:
            places = np.argwhere(p.predicted != p.truth).tolist()
            named = [f"({y},{x}) {p.predicted[y, x]}/{p.truth[y, x]}" for y, x in places]
            told, share = f"{len(named)} of {p.truth.size} cells wrong", MAX_CELLS // len(wrong)
            told += f": {' '.join(named[:share])}" if share else ""
            told += f" and {len(named) - share} more" if 0 < share < len(named) else ""
        if not p.palette:
            kinds = (("missing", p.missing_colours), ("extra", p.extra_colours))
            colours = [f"{kind} {' '.join(map(str, which))}" for kind, which in kinds if which]
            told += f"; colours {', '.join(colours)}"
        lines.append(f"demonstration {number}: {told}")
    return "\n".join(lines)


def _well_formed(value: Any) -> Grid | None:
    """`value` as a grid, or None where it is none (missing, empty, ragged, no colours)."""
    try:
        return _to_grid(value, "prediction")
    except TaskError:
        return None


def _to_grid(value: Any, where: str) -> Grid:
    """An array, tensor or list of rows as a grid."""
    return parse_grid(value.tolist() if hasattr(value, "tolist") else value, where)
