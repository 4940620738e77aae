"""One held-out demonstration: what was predicted for its input, against its output.

A grid that is missing or malformed is wrong, whatever it is compared with: an earlier pipeline
decoded most grids to 0x0 and counted empty equal to empty.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from arctrm.data.parse import parse_grid
from arctrm.data.task import Grid
from arctrm.errors import TaskError

EXACT_SHARE = 0.5
"""Of a probe's score; the rest rewards what is nearly right, so that attempts without an exact
probe can still be told apart."""
SHAPE_SHARE = 0.125
PALETTE_SHARE = 0.125
CELLS_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a prediction has right."""

    predicted: Grid | None
    """None where there was no well-formed grid."""
    truth: Grid
    """The demonstration's output."""
    exact: bool
    """Same size, same cells."""
    shape: bool
    """Same size."""
    cells: float
    """Share of cells (0..1) that are right; 0 where the size is wrong."""
    missing_colours: tuple[int, ...]
    """Colours of the truth that the prediction does not have."""
    extra_colours: tuple[int, ...]
    """Colours of the prediction that the truth does not have."""

    @property
    def palette(self) -> bool:
        """Whether exactly the right colours occur."""
        return not (self.missing_colours or self.extra_colours)

    @property
    def score(self) -> float:
        """0 (no grid) to 1 (exact): half for exactness, half for size, palette and cells."""
        return (
            EXACT_SHARE * self.exact
            + SHAPE_SHARE * self.shape
            + PALETTE_SHARE * self.palette
            + CELLS_SHARE * self.cells
        )


def probe(predicted: Any, truth: Grid) -> ProbeResult:
    """Compare a prediction (array, list of rows, or None) with a demonstration's output."""
    grid = well_formed(predicted)
    shape, cells = False, 0.0
    if grid is not None and grid.shape == truth.shape:
        shape, cells = True, float((grid == truth).mean())
    wanted, got = _colours(truth), _colours(grid)
    return ProbeResult(
        predicted=grid,
        truth=truth,
        exact=shape and cells == 1,
        shape=shape,
        cells=cells,
        missing_colours=tuple(sorted(wanted - got)),
        extra_colours=tuple(sorted(got - wanted)),
    )


def well_formed(value: Any) -> Grid | None:
    """`value` as a grid, or None where it is none (missing, empty, ragged, no colours)."""
    try:
        return to_grid(value, "prediction")
    except TaskError:
        return None


def to_grid(value: Any, where: str) -> Grid:
    """An array, tensor or list of rows as a grid.

    Raises:
        TaskError: it is none.
    """
    return parse_grid(value.tolist() if hasattr(value, "tolist") else value, where)


def _colours(grid: Grid | None) -> set[int]:
    return set() if grid is None else set(np.unique(grid).tolist())
