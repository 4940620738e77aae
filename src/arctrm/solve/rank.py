"""From many candidates to an order and two attempts: the one ranking of `solve`, `eval` and all.

    votes          equal grids are one; more proposals first
    reader         the best by votes, ordered by the reader's log-probability under several views
    inverse        the best of these, and how likely the reader finds the input, given the grid
    invariants     the first ten, and what each breaks of what all demonstrations keep

A right grid is likely from every side, so log-probabilities of views are summed (a product of
experts); what is likely both ways is right more often (noisy-channel reranking, Yee et al. 2019).
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, isfinite, log1p

import numpy as np

from arctrm.config import EvalConfig, SolveConfig
from arctrm.data.task import Grid, Task, grid_key
from arctrm.invariants.task import COPY, broken, changes
from arctrm.reader.protocol import Reader
from arctrm.reader.scoring import score
from arctrm.solve.propose import JOINT, TRM, Advance, Candidate, prompt_of
from arctrm.solve.questions import Key, Question, all_questions, inverse_questions
from arctrm.solve.weights import Solver

PLACE_NATS = 2.1
"""The grid in place n (from 0) is (n + 1) to this power times less likely to be right than the
first (fitted on held-out training tasks)."""
GAP_SHARE = 0.1
"""So much of the reader's gap to the first grid counts, where that is more than the place says."""
LOOKED_AT = 10  # grids of a test input that are checked for invariants; others stay behind

Grids = Mapping[Key, Sequence[Grid]]
Scores = list[tuple[Key, list[float]]]  # for each question: test input, nats of each of its grids
Judge = Callable[[Sequence[Question], Grids], Scores]
"""Scores grids under questions: those of the grids, or (inverse questions) of the input, given each
of the grids. It may leave out the last questions and, of every test input, the last grids."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """A distinct grid, with all that speaks for it and against it."""

    grid: Grid
    votes: float  # see `counted`
    mean_q: float  # of the confidences of its candidates
    votes_by: Mapping[str, float] = field(default_factory=dict)  # source -> votes
    views_by: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # source -> views
    probe: float | None = None  # best probe score of its candidates
    reader_scores: tuple[float, ...] = ()
    """The reader's log-probability of it (nats) under each view; none if not judged."""
    inverse_scores: tuple[float, ...] = ()
    """The same of the input, given this grid; none if not asked."""
    broken: tuple[str, ...] = ()
    """Names of what all demonstrations keep and it breaks, the heaviest first."""

    @property
    def num_proposals(self) -> int:
        """Candidates that are this grid."""
        return sum(map(len, self.views_by.values()))

    @property
    def reader_score(self) -> float | None:
        """Mean of the reader's scores over the views; None if not judged."""
        return fsum(self.reader_scores) / len(self.reader_scores) if self.reader_scores else None

    @property
    def inverse_score(self) -> float | None:
        """Mean of the inverse scores over the views; None if not asked."""
        return fsum(self.inverse_scores) / len(self.inverse_scores) if self.inverse_scores else None


def rank(
    solver: Solver,
    tasks: Sequence[Task],
    found: Mapping[Key, Sequence[Candidate]],
    config: EvalConfig | SolveConfig,
    judge: Judge | None = None,
) -> dict[Key, list[Ranked]]:
    """The distinct grids of each test input, best first; without a judge the reader has no say."""
    ranked: dict[Key, list[Ranked]] = {}
    copies: dict[Key, list[Ranked]] = {}
    inputs = {
        Key(task.id, index): (task, pair.input)
        for task in tasks
        for index, pair in enumerate(task.test)
    }
    for key, (task, given) in inputs.items():
        ranked[key], copies[key] = [], []  # copies are last where every demonstration changes
        changing = changes(task)
        for one in vote(found.get(key, ()), config.seed):
            if changing and np.array_equal(one.grid, given):
                copies[key].append(replace(one, broken=(COPY,)))
            else:
                ranked[key].append(one)
    if judge is not None:
        chosen, views = config.judge, config.judge.scoring_views
        best = {k: [one.grid for one in r[: chosen.scored_candidates]] for k, r in ranked.items()}
        scores = _of_views(judge(all_questions(solver, tasks, views, config.seed), best))
        ranked = {key: by_experts(own, scores[key]) for key, own in ranked.items()}
        if chosen.inverse_weight and asks_inverse(solver):
            firsts = {key: own[: chosen.inverse_candidates] for key, own in ranked.items()}
            best = {key: [one.grid for one in r if one.reader_scores] for key, r in firsts.items()}
            scores = _of_views(judge(inverse_questions(solver, tasks, views), best))
            weight = chosen.inverse_weight
            ranked = {key: by_explanation(r, scores[key], weight) for key, r in ranked.items()}
    weight = config.inference.invariant_weight
    return {
        key: checked(task, given, ranked[key], weight) + copies[key]
        for key, (task, given) in inputs.items()
    }


def _of_views(scores: Scores) -> dict[Key, list[list[float]]]:
    """Scores of the grids of each test input, one list for each view."""
    found: dict[Key, list[list[float]]] = defaultdict(list)
    for key, own in scores:
        found[key].append(own)
    return found


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
    """The plain judge: every question about every grid; `advance` is told of the questions."""
    prompts, candidates = [], []
    for one in questions:
        shown = [one.shown(grid) for grid in grids.get(one.key, ())]
        inverse = one.condition.inverse
        prompts += [reader.prompt(g, one.condition) for g in shown] if inverse else [prompt_of(one)]
        candidates += [[one.query]] * len(shown) if inverse else [shown]
    found = iter(score(reader, prompts, candidates, batch_size=batch_size or reader.batch_rows))
    scores: Scores = []
    for one in questions:
        inputs = grids.get(one.key, ())
        own = [next(found)[0] for _ in inputs] if one.condition.inverse else next(found)
        scores.append((one.key, own))
    advance(len(questions))
    return scores


def vote(candidates: Iterable[Candidate], seed: int) -> list[Ranked]:
    """The distinct grids, best first by votes, probe score, mean q, a hash of seed and grid."""
    groups: dict[Hashable, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[grid_key(candidate.grid)].append(candidate)
    found = []
    for own in groups.values():
        if (grid := own[0].grid) is None:
            continue
        views: dict[str, tuple[int, ...]] = {}
        for one in sorted(own, key=lambda one: (one.source, one.view)):
            views[one.source] = (*views.get(one.source, ()), one.view)
        probe = max((one.probe for one in own if one.probe is not None), default=None)
        # fsum is exact, so the mean does not depend on the order of the candidates.
        mean_q = fsum(one.q for one in own) / len(own)
        found.append(Ranked(grid, 0, mean_q, views_by=views, probe=probe))
    text = lambda grid: f"{seed} {grid.shape} ".encode() + grid.tobytes()
    tie_break = lambda grid: hashlib.blake2b(text(grid), digest_size=16).digest()
    return sorted(
        counted(found),
        key=lambda r: (-r.votes, -(r.probe or 0.0), -r.mean_q, tie_break(r.grid)),
    )


def counted(ranked: Sequence[Ranked]) -> list[Ranked]:
    """The grids of a test input with their votes, from `views_by`: each view has one vote for each
    voice, and what a voice proposes in several ways (TRM: from a draft, from nothing) shares it.
    """
    voice = lambda source: TRM if source == JOINT else source
    shares = Counter(
        (voice(s), view) for one in ranked for s, views in one.views_by.items() for view in views
    )
    found = []
    for one in ranked:
        votes = {s: fsum(1 / shares[voice(s), v] for v in own) for s, own in one.views_by.items()}
        found.append(replace(one, votes=fsum(votes.values()), votes_by=votes))
    return found


def first_views(ranked: Sequence[Ranked], count: int) -> list[Ranked]:
    """The grids that the first `count` views proposed, best first by votes alone."""
    seen = lambda one: {s: tuple(v for v in own if v < count) for s, own in one.views_by.items()}
    cut = [replace(one, views_by={s: v for s, v in seen(one).items() if v}) for one in ranked]
    found = counted([one for one in cut if one.views_by])
    return sorted(found, key=lambda one: (COPY in one.broken, -one.votes, -one.mean_q))


def by_experts(ranked: Sequence[Ranked], scores: Sequence[Sequence[float]]) -> list[Ranked]:
    """The first of `ranked` reordered by the reader: `scores` has a list of grids' scores per view.
    What was not scored keeps its order behind them.
    """
    both = zip(ranked, zip(*scores, strict=True), strict=False)
    scored = [replace(entry, reader_scores=own) for entry, own in both]
    # Stable: votes decide ties.
    best_first = sorted(scored, key=lambda entry: -fsum(entry.reader_scores))
    return best_first + list(ranked[len(scored) :])


def by_explanation(
    ranked: Sequence[Ranked], scores: Sequence[Sequence[float]], weight: float
) -> list[Ranked]:
    """The same by the reader's mean score of each and `weight` x that of the input, given it."""
    both = zip(ranked, zip(*scores, strict=True), strict=False)
    asked = [replace(entry, inverse_scores=own) for entry, own in both]
    value = lambda one: (one.reader_score or 0.0) + weight * (one.inverse_score or 0.0)
    return sorted(asked, key=lambda one: -value(one)) + list(ranked[len(asked) :])


def by_invariants(
    ranked: Sequence[Ranked],
    nats: Sequence[Mapping[str, float]],
    weight: float,
    gap_share: float = GAP_SHARE,
) -> list[Ranked]:
    """The same by their places and what each breaks: `nats` has for each the names, heaviest first,
    with what a name is worth; `weight` multiplies that.
    """
    names = zip(ranked, nats, strict=False)
    looked_at = [replace(entry, broken=tuple(own)) for entry, own in names]
    both = zip(place_nats(looked_at, gap_share), nats, strict=False)
    costs = [place + weight * fsum(own.values()) for place, own in both]
    order = sorted(range(len(looked_at)), key=costs.__getitem__)
    return [looked_at[place] for place in order] + list(ranked[len(looked_at) :])


def place_nats(ranked: Sequence[Ranked], gap_share: float = GAP_SHARE) -> list[float]:
    """How much less likely than the first each is to be right: by place, or the reader's gap."""
    first = ranked[0].reader_score if ranked else None

    def gap(entry: Ranked) -> float:
        if first is None or not isfinite(first) or entry.reader_score is None:
            return 0.0
        return first - entry.reader_score  # infinite where it cannot be written

    gaps = [gap_share * gap(entry) if gap_share else 0.0 for entry in ranked]
    return [max(PLACE_NATS * log1p(place), own) for place, own in enumerate(gaps)]


def checked(task: Task, given: Grid, ranked: Sequence[Ranked], weight: float) -> list[Ranked]:
    """The ranking of the test input `given` after a look at what its first grids break."""
    if not weight:
        return list(ranked)
    nats = [dict(broken(task, given, entry.grid)) for entry in ranked[:LOOKED_AT]]
    return by_invariants(ranked, nats, weight)


def filled(ranked: Sequence[Ranked], spare: Sequence[Ranked]) -> list[Ranked]:
    """At least two grids where two were proposed: behind `ranked` the best of `spare`, which other
    weights proposed and which has no votes here.
    """
    new = [one for one in spare if not any(np.array_equal(one.grid, own.grid) for own in ranked)]
    new = [replace(one, votes=0.0, votes_by={}, views_by={}) for one in new]
    both = [*ranked, *new[: max(0, 2 - len(ranked))]]
    return sorted(both, key=lambda one: COPY in one.broken)  # stable: copies of the input stay last


def attempts(ranked: Sequence[Ranked], fallback: Grid) -> tuple[Grid, Grid]:
    """attempt_1 and attempt_2: a lone grid is both of them, `fallback` is if there is none."""
    if not ranked:
        return fallback, fallback
    return ranked[0].grid, ranked[min(1, len(ranked) - 1)].grid
