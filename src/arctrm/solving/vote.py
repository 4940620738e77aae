"""From many candidates to a ranking and two attempts; the result depends on nothing but their set.

Equal grids are one entry. Order: votes, then probe score, then mean q, then a hash of seed and
grid, so neither the order in which views were answered nor the batch they sat in can change who
wins.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, log1p

import numpy as np

from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid

PLACE_NATS = 2.1
"""The grid in place n (from 0) is (n + 1) to this power times less likely to be right than the
first (fitted on held-out training tasks)."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposed output grid, in the colours and orientation of the task (view undone)."""

    grid: Grid | None
    """None where the canvas held no grid."""
    q: float
    """The proposer's confidence: TRM's halting logit."""
    source: str = "trm"
    """Who proposed it."""
    probe: float | None = None
    """Score (0..1) of the held-out demonstrations in the attempt that gave it; None without."""
    steps: int | None = None
    """Supervision steps behind it, where TRM proposed it."""
    view: int | None = None
    """Number of the view under which it was proposed; None where there was none."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """A distinct grid with its share of the vote."""

    grid: Grid
    votes: int
    """Candidates equal to this grid."""
    mean_q: float
    """Mean of their confidences."""
    sources: tuple[str, ...]
    """Who proposed it, sorted."""
    reader_scores: tuple[float, ...] = ()
    """The reader's log-probability of it (nats) under each view; none if not scored."""
    views_by: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Numbers of the views under which each source voted for it, as far as known."""
    votes_by: Mapping[str, int] = field(default_factory=dict)
    """Votes of each source."""
    probe: float | None = None
    """Best probe score of its candidates; None without."""
    inverse_scores: tuple[float, ...] = ()
    """The reader's log-probability of the input, given this grid (nats), under each view; none if
    not asked."""
    broken: tuple[str, ...] = ()
    """Names of what all demonstrations keep and it breaks (`arctrm.invariants`), the heaviest
    first; some weigh nothing."""

    @property
    def reader_score(self) -> float | None:
        """The mean of the reader's scores over the views; None if not scored."""
        return _mean(self.reader_scores)

    @property
    def inverse_score(self) -> float | None:
        """The mean of what it said of the input; None if not asked."""
        return _mean(self.inverse_scores)


@dataclass(frozen=True)
class Evidence:
    """What speaks for an attempt; shown beside it."""

    votes: int
    """Answers that are this grid."""
    views: int
    """Answers counted, malformed ones included: one per view of each source."""
    mean_q: float
    """Mean confidence of its votes (TRM: halting logit); 0 without votes."""
    leave_one_out: float | None = None
    """Share (0..1) of demonstrations answered exactly while held out; None if not measured."""
    votes_by: Mapping[str, int] = field(default_factory=dict)
    """Votes of each source that voted for it."""
    reader_score: float | None = None
    """The reader's log-probability of it (nats), mean over views; None if not judged."""
    probe: float | None = None
    """Score (0..1) of the planner's attempt that gave it; None if none did."""
    broken: tuple[str, ...] = ()
    """Names of what all demonstrations keep and it breaks, the heaviest first."""


def vote(candidates: Iterable[Candidate], seed: int) -> list[Ranked]:
    """Rank the distinct grids among `candidates`, best first; malformed ones are left out."""
    groups: dict[tuple[tuple[int, ...], bytes], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        if is_well_formed(candidate.grid):
            groups[_key(candidate.grid)].append(candidate)
    ranked = [_ranked(group) for group in groups.values()]
    return sorted(
        ranked, key=lambda r: (-r.votes, -(r.probe or 0.0), -r.mean_q, _tie_break(r.grid, seed))
    )


def by_experts(ranked: Sequence[Ranked], scores: Sequence[Sequence[float]]) -> list[Ranked]:
    """The first of `ranked` reordered by the reader: `scores` has one list per view, one
    log-probability per grid. What was not scored keeps its order behind them.
    """
    by_grid = zip(*scores, strict=True)
    scored = [
        replace(entry, reader_scores=own) for entry, own in zip(ranked, by_grid, strict=False)
    ]
    # Stable: votes decide ties.
    best_first = sorted(scored, key=lambda entry: -fsum(entry.reader_scores))
    return best_first + list(ranked[len(scored) :])


def by_explanation(
    ranked: Sequence[Ranked], scores: Sequence[Sequence[float]], weight: float
) -> list[Ranked]:
    """The first of `ranked` reordered by the reader's mean log-probability of each and `weight` x
    that of the input, given it: `scores` has one list per view, one for each of the first grids.
    """
    by_grid = list(zip(*scores, strict=True))
    asked = [
        replace(entry, inverse_scores=own) for entry, own in zip(ranked, by_grid, strict=False)
    ]

    def value(entry: Ranked) -> float:
        return (entry.reader_score or 0.0) + weight * (entry.inverse_score or 0.0)

    return sorted(asked, key=lambda entry: -value(entry)) + list(ranked[len(asked) :])


def by_invariants(
    ranked: Sequence[Ranked],
    broken: Sequence[frozenset[str]],
    nats: Mapping[str, float],
    weight: float,
) -> list[Ranked]:
    """The first of `ranked` reordered by their places and what each of them breaks: `broken` has
    the names of each, `nats` what each name is worth, and `weight` multiplies that.
    """
    looked_at = [
        replace(entry, broken=tuple(sorted(names, key=lambda name: (-nats.get(name, 0.0), name))))
        for entry, names in zip(ranked, broken, strict=False)
    ]
    costs = [
        PLACE_NATS * log1p(place) + weight * fsum(nats.get(name, 0.0) for name in entry.broken)
        for place, entry in enumerate(looked_at)
    ]
    best_first = [looked_at[place] for place in sorted(range(len(costs)), key=costs.__getitem__)]
    return best_first + list(ranked[len(looked_at) :])


def attempts(ranked: Sequence[Ranked], fallback: Grid) -> tuple[Grid, Grid]:
    """attempt_1 and attempt_2: always two grids.

    A lone candidate is both of them; `fallback` (such as the query's input) is, if there is none.
    """
    if not ranked:
        return fallback, fallback
    return ranked[0].grid, ranked[min(1, len(ranked) - 1)].grid


def submitted(ranked: Sequence[Grid], fallback: Grid) -> list[Grid]:
    """What is scored of the grids of a test input, best first: where there is none, `fallback`, as
    `attempts` submits it.
    """
    return list(ranked) or [fallback]


def evidence(
    ranked: Sequence[Ranked], views: int, leave_one_out: float | None = None
) -> tuple[Evidence, Evidence]:
    """What speaks for each of the two grids that `attempts` returns for the same ranking."""
    if not ranked:
        nothing = Evidence(0, views, 0.0, leave_one_out)
        return nothing, nothing
    first, second = (
        Evidence(
            entry.votes,
            views,
            entry.mean_q,
            leave_one_out,
            entry.votes_by,
            entry.reader_score,
            entry.probe,
            entry.broken,
        )
        for entry in (ranked[0], ranked[min(1, len(ranked) - 1)])
    )
    return first, second


def is_well_formed(grid: Grid | None) -> bool:
    """Whether this is a grid at all: 2-D, 1..30 x 1..30, colours 0..9."""
    return (
        grid is not None
        and grid.ndim == 2
        and grid.size > 0
        and max(grid.shape) <= MAX_SIDE
        and int(grid.min()) >= 0
        and int(grid.max()) < NUM_COLOURS
    )


def _ranked(group: list[Candidate]) -> Ranked:
    # fsum is exact, so the mean does not depend on the order of the candidates.
    mean_q = fsum(candidate.q for candidate in group) / len(group)
    votes_by = Counter(sorted(candidate.source for candidate in group))
    views: dict[str, tuple[int, ...]] = {
        source: tuple(sorted(c.view for c in group if c.source == source and c.view is not None))
        for source in votes_by
    }
    probes = [candidate.probe for candidate in group if candidate.probe is not None]
    return Ranked(
        np.asarray(group[0].grid, dtype=np.uint8),
        len(group),
        mean_q,
        tuple(votes_by),
        views_by=views,
        votes_by=votes_by,
        probe=max(probes, default=None),
    )


def _mean(scores: Sequence[float]) -> float | None:
    return fsum(scores) / len(scores) if scores else None


def _key(grid: Grid | None) -> tuple[tuple[int, ...], bytes]:
    cells = np.ascontiguousarray(grid, dtype=np.uint8)
    return cells.shape, cells.tobytes()


def _tie_break(grid: Grid, seed: int) -> bytes:
    shape, cells = _key(grid)
    return hashlib.blake2b(f"{seed} {shape} ".encode() + cells, digest_size=16).digest()
