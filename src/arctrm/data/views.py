"""Views: a dihedral transform x a colour permutation, each with its exact inverse.

The dihedral table is data: training gathers on the device with the rows that `View` applies here.
"""

from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np

from arctrm.data.task import NUM_COLOURS, Grid, Pair, Task

DIHEDRALS = np.array(
    [
        (0, 0, 0),  # identity
        (1, 0, 1),  # quarter turn counter-clockwise, np.rot90(k=1)
        (0, 1, 1),  # half turn
        (1, 1, 0),  # quarter turn clockwise, np.rot90(k=3)
        (0, 0, 1),  # left-right
        (0, 1, 0),  # up-down
        (1, 0, 0),  # transpose
        (1, 1, 1),  # anti-transpose
    ],
    dtype=np.int8,
)
"""[8, 3] rows of (transpose, flip_rows, flip_columns): out[r, c] = in[a, b] with (a, b) = (c, r) if
transpose else (r, c), then a = h-1-a if flip_rows and b = w-1-b if flip_columns (h, w of the
input)."""

NUM_DIHEDRALS = len(DIHEDRALS)
SAME_COLOURS = tuple(range(NUM_COLOURS))


def transform(grid: Grid, dihedral: int) -> Grid:
    """Apply row `dihedral` of `DIHEDRALS`; [h, w] -> [h, w] or [w, h]."""
    transpose, flip_rows, flip_columns = DIHEDRALS[dihedral]
    flipped = grid[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return flipped.T if transpose else flipped


@dataclass(frozen=True)
class View:
    """An augmentation: `dihedral` indexes `DIHEDRALS`, `colours[c]` takes the place of colour c."""

    dihedral: int
    colours: tuple[int, ...] = SAME_COLOURS

    def apply(self, grid: Grid) -> Grid:
        """The grid as this view shows it."""
        palette = np.array(self.colours, dtype=np.uint8)
        return np.ascontiguousarray(palette[transform(grid, self.dihedral)])

    def apply_pair(self, pair: Pair) -> Pair:
        """A pair as this view shows it."""
        return Pair(
            self.apply(pair.input), None if pair.output is None else self.apply(pair.output)
        )

    def inverse(self, grid: Grid) -> Grid:
        """The original of a grid seen under this view: `inverse(apply(x)) == x`, exactly."""
        palette = np.argsort(self.colours).astype(np.uint8)
        transpose, flip_rows, flip_columns = DIHEDRALS[self.dihedral]
        upright = grid.T if transpose else grid
        flipped = upright[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(palette[flipped])

    @property
    def identity_colours(self) -> bool:
        """Whether the view keeps every colour (TRM is told so by a flag)."""
        return self.colours == SAME_COLOURS


IDENTITY = View(0)


def fixed_colours(task: Task) -> np.ndarray:
    """bool[10]: colours that no view may move: 0, and those of an output that its input lacks."""
    fixed = np.zeros(NUM_COLOURS, dtype=bool)
    fixed[0] = True
    for pair in task.demonstrations:
        if pair.output is not None:
            fixed[np.setdiff1d(pair.output, pair.input)] = True
    return fixed


def draw_view(rng: np.random.Generator, fixed: np.ndarray, identity_colours: float) -> View:
    """A uniform dihedral; the colours kept with probability `identity_colours`, else permuted."""
    dihedral = int(rng.integers(NUM_DIHEDRALS))
    if rng.random() < identity_colours:
        return View(dihedral)
    colours = np.arange(NUM_COLOURS)
    free = np.flatnonzero(~fixed)
    colours[free] = rng.permutation(free)
    return View(dihedral, tuple(colours.tolist()))


def distinct_views(
    fixed: np.ndarray, count: int, rng: np.random.Generator, identity_colours: float = 0.2
) -> list[View]:
    """`count` distinct views, the identity first; fewer when fewer exist."""
    free = np.flatnonzero(~fixed) if identity_colours < 1 else np.arange(0)
    if count < NUM_DIHEDRALS * factorial(len(free)):
        views = dict.fromkeys([IDENTITY])
        while len(views) < count:
            views[draw_view(rng, fixed, identity_colours)] = None
        return list(views)[:count]
    every = []
    for permuted in permutations(free.tolist()):
        colours = np.arange(NUM_COLOURS)
        colours[free] = permuted
        every += [View(dihedral, tuple(colours.tolist())) for dihedral in range(NUM_DIHEDRALS)]
    order = rng.permutation(len(every) - 1) + 1  # the first is the identity
    return [IDENTITY, *(every[index] for index in order)]
