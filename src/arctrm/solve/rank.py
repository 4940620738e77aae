"""From many candidates to an order and two attempts: the one ranking of `solve`, `eval` and all.

    votes          equal grids are one; more proposals first
    reader         the best by votes, ordered by the reader's log-probability under several views
    inverse        the best of these, and how likely the reader finds the input, given the grid
    invariants     the first ten, and what each breaks of what all demonstrations keep

A right grid is likely from every side, so log-probabilities of views are summed (a product of
experts). What is likely both ways is right more often (noisy-channel reranking, Yee et al. 2019).
The result depends on the set of candidates only: ties are broken by a hash of seed and grid. TRM is
no judge: its log-probability beside the reader's was worth 0 to 0.4 points.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, inf, isfinite, log1p

import numpy as np

from arctrm.config import EvalConfig, SolveConfig
from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid, Task
from arctrm.invariants.task import COPY, broken, changes
from arctrm.reader.protocol import Reader
from arctrm.reader.scoring import score
from arctrm.solve.propose import Advance, Candidate, prompt_of
from arctrm.solve.questions import Key, Question, all_questions, inverse_questions
from arctrm.solve.weights import Solver

PLACE_NATS = 2.1
"""The grid in place n (from 0) is (n + 1) to this power times less likely to be right than the
first (fitted on held-out training tasks)."""
GAP_SHARE = 0.1
"""So much of the reader's gap in log-probability to the first grid counts, where that is more than
the place says: what the reader finds e**40 times less likely is not saved by an invariant."""
LOOKED_AT = 10
"""Grids of each test input that are checked for invariants; what comes behind them stays there."""

Grids = Mapping[Key, Sequence[Grid]]
Scores = list[tuple[Key, list[float]]]
"""For each question: its test input, and the log-probability (nats) of each of its grids."""
Judge = Callable[[Sequence[Question], Grids], Scores]
"""Scores grids under questions: those of the grids, or (inverse questions) of the input, given each
of the grids. It may leave out the last questions and, of every test input, the last grids."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """A distinct grid, with all that speaks for it and against it."""

    grid: Grid
    votes: int
    """Candidates equal to this grid."""
    mean_q: float
    """Mean of their confidences."""
    votes_by: Mapping[str, int] = field(default_factory=dict)
    """Votes of each source."""
    views_by: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Numbers of the views under which each source proposed it, as far as known."""
    probe: float | None = None
    """Best probe score of its candidates; None without."""
    reader_scores: tuple[float, ...] = ()
    """The reader's log-probability of it (nats) under each view; none if not judged."""
    inverse_scores: tuple[float, ...] = ()
    """The reader's log-probability of the input, given this grid (nats), under each view; none if
    not asked."""
    broken: tuple[str, ...] = ()
    """Names of what all demonstrations keep and it breaks, the heaviest first."""

    @property
    def reader_score(self) -> float | None:
        """Mean of the reader's scores over the views; None if not judged."""
        return _mean(self.reader_scores)

    @property
    def inverse_score(self) -> float | None:
        """Mean of the inverse scores over the views; None if not asked."""
        return _mean(self.inverse_scores)


def rank(
    solver: Solver,
    tasks: Sequence[Task],
    found: Mapping[Key, Sequence[Candidate]],
    config: EvalConfig | SolveConfig,
    judge: Judge | None = None,
) -> dict[Key, list[Ranked]]:
    """The distinct grids of each test input of `tasks`, best first; without a judge, the reader
    has no say. Copies of the input are last where every demonstration changes something.
    """
    ranked: dict[Key, list[Ranked]] = {}
    copies: dict[Key, list[Ranked]] = {}
    inputs = {
        Key(task.id, index): (task, pair.input)
        for task in tasks
        for index, pair in enumerate(task.test)
    }
    for key, (task, given) in inputs.items():
        voted = vote(found.get(key, ()), config.seed)
        same = [changes(task) and np.array_equal(one.grid, given) for one in voted]
        ranked[key] = [one for one, is_copy in zip(voted, same, strict=True) if not is_copy]
        copies[key] = [
            replace(one, broken=(COPY,))
            for one, is_copy in zip(voted, same, strict=True)
            if is_copy
        ]
    if judge is not None:
        ranked = _judged(solver, tasks, ranked, config, judge)
    weight = config.inference.invariant_weight
    return {
        key: checked(task, given, ranked[key], weight) + copies[key]
        for key, (task, given) in inputs.items()
    }


def _judged(
    solver: Solver,
    tasks: Sequence[Task],
    ranked: dict[Key, list[Ranked]],
    config: EvalConfig | SolveConfig,
    judge: Judge,
) -> dict[Key, list[Ranked]]:
    """The best by votes, ordered by the reader both ways."""
    chosen, views = config.judge, config.judge.scoring_views
    best = {key: _grids(own[: chosen.scored_candidates]) for key, own in ranked.items()}
    scores = _of_views(judge(all_questions(solver, tasks, views, config.seed), best))
    ranked = {key: by_experts(own, scores.get(key, ())) for key, own in ranked.items()}
    if not chosen.inverse_weight or not asks_inverse(solver):
        return ranked
    best = {
        key: _grids(one for one in own[: chosen.inverse_candidates] if one.reader_scores)
        for key, own in ranked.items()
    }
    scores = _of_views(judge(inverse_questions(solver, tasks, views), best))
    return {
        key: by_explanation(own, scores.get(key, ()), chosen.inverse_weight)
        for key, own in ranked.items()
    }


def asks_inverse(solver: Solver) -> bool:
    """Whether the reader can say how likely an input is; adaptation spoils what it knew of that."""
    return solver.reader is not None and solver.reader.asks_inverse and not solver.adapted


def judged(
    reader: Reader,
    questions: Sequence[Question],
    grids: Grids,
    *,
    batch_size: int | None = None,
    advance: Advance = lambda done: None,
) -> Scores:
    """The plain judge: every question about every grid; `advance` is told of the questions.

    Raises:
        ResourceError: out of memory; says which key to lower.
    """
    prompts, candidates = [], []
    for question in questions:
        shown = [question.shown(grid) for grid in grids.get(question.key, ())]
        if question.condition.inverse:
            prompts += [reader.prompt(grid, question.condition) for grid in shown]
            candidates += [[question.query] for _ in shown]
        else:
            prompts.append(prompt_of(question))
            candidates.append(shown)
    size = batch_size or reader.batch_rows
    found = iter(score(reader, prompts, candidates, batch_size=size))
    scores: Scores = []
    for question in questions:
        if question.condition.inverse:
            own = [next(found)[0] for _ in grids.get(question.key, ())]
        else:
            own = next(found)
        scores.append((question.key, own))
    advance(len(questions))
    return scores


# ---- the stages, each a function of the order before it ----


def vote(candidates: Iterable[Candidate], seed: int) -> list[Ranked]:
    """Rank the distinct grids among `candidates`, best first; malformed ones are left out.

    Order: votes, probe score, mean q, a hash of seed and grid.
    """
    groups: dict[tuple[tuple[int, ...], bytes], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        if is_well_formed(candidate.grid):
            groups[_content(candidate.grid)].append(candidate)
    return sorted(
        map(_ranked, groups.values()),
        key=lambda r: (-r.votes, -(r.probe or 0.0), -r.mean_q, _tie_break(r.grid, seed)),
    )


def by_experts(ranked: Sequence[Ranked], scores: Sequence[Sequence[float]]) -> list[Ranked]:
    """The first of `ranked` reordered by the reader: `scores` has one list per view, one
    log-probability per grid. What was not scored keeps its order behind them.
    """
    both = zip(ranked, zip(*scores, strict=True), strict=False)
    scored = [replace(entry, reader_scores=own) for entry, own in both]
    # Stable: votes decide ties.
    best_first = sorted(scored, key=lambda entry: -fsum(entry.reader_scores))
    return best_first + list(ranked[len(scored) :])


def by_explanation(
    ranked: Sequence[Ranked], scores: Sequence[Sequence[float]], weight: float
) -> list[Ranked]:
    """The first of `ranked` reordered by the reader's mean log-probability of each and `weight` x
    that of the input, given it: `scores` has one list per view, one for each of the first grids.
    """
    both = zip(ranked, zip(*scores, strict=True), strict=False)
    asked = [replace(entry, inverse_scores=own) for entry, own in both]

    def value(entry: Ranked) -> float:
        return (entry.reader_score or 0.0) + weight * (entry.inverse_score or 0.0)

    return sorted(asked, key=lambda entry: -value(entry)) + list(ranked[len(asked) :])


def by_invariants(
    ranked: Sequence[Ranked],
    nats: Sequence[Mapping[str, float]],
    weight: float,
    gap_share: float = GAP_SHARE,
) -> list[Ranked]:
    """The first of `ranked` reordered by their places and what each of them breaks: `nats` has for
    each the names, heaviest first, with what a name is worth, and `weight` multiplies that.
    """
    looked_at = [
        replace(entry, broken=tuple(names)) for entry, names in zip(ranked, nats, strict=False)
    ]
    costs = [
        place + weight * fsum(names.values())
        for place, names in zip(place_nats(looked_at, gap_share), nats, strict=False)
    ]
    order = sorted(range(len(looked_at)), key=costs.__getitem__)
    return [looked_at[place] for place in order] + list(ranked[len(looked_at) :])


def place_nats(ranked: Sequence[Ranked], gap_share: float = GAP_SHARE) -> list[float]:
    """How much less likely than the first each of the ranked grids is to be right: by its place,
    or by the reader's gap between the two where that says more.
    """
    first = ranked[0].reader_score if ranked else None

    def gap(entry: Ranked) -> float:
        if first is None or not isfinite(first) or entry.reader_score is None:
            return 0.0
        return first - entry.reader_score if isfinite(entry.reader_score) else inf

    return [
        max(PLACE_NATS * log1p(place), gap_share * gap(entry) if gap_share else 0.0)
        for place, entry in enumerate(ranked)
    ]


def checked(task: Task, given: Grid, ranked: Sequence[Ranked], weight: float) -> list[Ranked]:
    """The ranking of the test input `given` after a look at what its first grids break."""
    if not weight:
        return list(ranked)
    nats = [dict(broken(task, given, entry.grid)) for entry in ranked[:LOOKED_AT]]
    return by_invariants(ranked, nats, weight)


def attempts(ranked: Sequence[Ranked], fallback: Grid) -> tuple[Grid, Grid]:
    """attempt_1 and attempt_2: always two grids.

    A lone candidate is both of them; `fallback` (such as the query's input) is, if there is none.
    """
    if not ranked:
        return fallback, fallback
    return ranked[0].grid, ranked[min(1, len(ranked) - 1)].grid


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
    votes_by = Counter(sorted(candidate.source for candidate in group))
    views: dict[str, tuple[int, ...]] = {
        source: tuple(sorted(c.view for c in group if c.source == source and c.view is not None))
        for source in votes_by
    }
    probes = [candidate.probe for candidate in group if candidate.probe is not None]
    # fsum is exact, so the mean does not depend on the order of the candidates.
    mean_q = fsum(candidate.q for candidate in group) / len(group)
    grid = np.asarray(group[0].grid, dtype=np.uint8)
    return Ranked(grid, len(group), mean_q, votes_by, views, max(probes, default=None))


def _grids(ranked: Iterable[Ranked]) -> list[Grid]:
    return [one.grid for one in ranked]


def _of_views(scores: Scores) -> dict[Key, list[list[float]]]:
    """Scores of the grids of each test input, one list for each view."""
    found: dict[Key, list[list[float]]] = defaultdict(list)
    for key, own in scores:
        found[key].append(own)
    return found


def _mean(scores: Sequence[float]) -> float | None:
    return fsum(scores) / len(scores) if scores else None


def _content(grid: Grid | None) -> tuple[tuple[int, ...], bytes]:
    cells = np.ascontiguousarray(grid, dtype=np.uint8)
    return cells.shape, cells.tobytes()


def _tie_break(grid: Grid, seed: int) -> bytes:
    shape, cells = _content(grid)
    return hashlib.blake2b(f"{seed} {shape} ".encode() + cells, digest_size=16).digest()
