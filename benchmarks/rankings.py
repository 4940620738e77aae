"""What other rankings would have made of the candidates that an evaluation kept; no model needed.

    arctrm eval --checkpoint runs/arc1 --set evaluation.keep_candidates=true --out scores/arc1
    python benchmarks/rankings.py scores/arc1 --test-set evaluation

Prints task_fraction in percent by the number of views that propose and that judge, and for
`arctrm.solve.rank` with other weights. Choose weights on tasks that were held out of training
(`data.held_out`, `evaluation.held_out`), not on those whose score is to be reported.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from arctrm.config import InferenceConfig, JudgeConfig
from arctrm.console import console
from arctrm.data.sources import load_tasks
from arctrm.invariants.task import COPY, COPY_NATS, weights
from arctrm.solve import scoring
from arctrm.solve.propose import READER
from arctrm.solve.rank import GAP_SHARE, LOOKED_AT, Ranked, by_explanation, by_invariants, counted
from arctrm.solve.results import CANDIDATES, read_candidates
from common import guarded

Rule = Callable[[Sequence[Ranked]], list[Ranked]]
"""Reorders the grids of one test input."""
TRM_WEIGHTS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Nats of the reader's mean score that e times as many votes of TRM are worth."""
INVARIANT_WEIGHTS, USUAL = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0), InferenceConfig().invariant_weight
GAP_SHARES, INVERSE_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4), (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scores", type=Path, help="output folder of arctrm eval")
    parser.add_argument("--test-set", default="evaluation")
    args = parser.parse_args()
    kept = read_candidates(args.scores / CANDIDATES)
    known = scoring.answers(task for task in load_tasks(args.test_set) if task.id in kept)
    everything = [one for inputs in kept.values() for own in inputs for one in own]
    views = [v for one in everything for own in one.views_by.values() for v in own]
    judging = max((len(one.reader_scores) for one in everything), default=0)
    inverse = any(one.inverse_scores for one in everything)
    table = Table(title=f"{len(kept)} tasks, task_fraction (%)")
    for column in ("ranked by", *(f"pass@{k}" for k in scoring.PASSES)):
        table.add_column(column)
    for name, rule in rules(1 + max(views, default=0), judging, inverse):
        table.add_row(name, *row(kept, known, rule))
    console().print(table)


def rules(proposing: int, judging: int, inverse: bool = False) -> list[tuple[str, Rule]]:
    """Names and rules, for so many views that propose and that judge; `inverse`: the reader said
    how likely the inputs are, too.
    """
    found: list[tuple[str, Rule]] = [("the evaluation", list)]
    for n in powers(proposing):
        found.append((f"votes, {n} views", lambda own, n=n: by_votes(first(own, n))))
    if not judging:
        return found
    for n in powers(proposing):
        found.append((f"reader, {n} views", lambda own, n=n: by_reader(first(own, n), judging)))
    for n in powers(judging):
        found.append((f"reader, judging under {n}", lambda own, n=n: by_reader(own, n)))
    for w in INVERSE_WEIGHTS if inverse else ():
        found.append((f"reader, inputs x {w:g}", lambda own, w=w: with_inputs(own, w)))
    for w in INVARIANT_WEIGHTS:
        found.append((f"reader, invariants x {w:g}", lambda own, w=w: with_invariants(own, w)))
    for s in GAP_SHARES:
        name = f"reader, invariants x {USUAL:g}, gap x {s:g}"
        found.append((name, lambda own, s=s: with_invariants(own, USUAL, s)))
    for w in TRM_WEIGHTS:
        found.append((f"reader, TRM's votes x {w:g}", lambda own, w=w: with_trm(own, w)))
    return found


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... and the limit itself."""
    return [2**i for i in range(limit.bit_length()) if 2**i < limit] + [limit]


def first(own: Sequence[Ranked], views: int) -> list[Ranked]:
    """What is left where only the first views propose."""
    found = []
    for one in own:
        left = {s: tuple(v for v in vs if v < views) for s, vs in one.views_by.items()}
        found.append(replace(one, views_by=left))
    return [one for one in counted(found) if one.votes]


def by_votes(own: Sequence[Ranked]) -> list[Ranked]:
    """By votes, then by the proposers' confidence; a copy of the input last, as in `eval`."""
    return sorted(own, key=lambda one: (COPY in one.broken, -one.votes, -one.mean_q))


def by_reader(own: Sequence[Ranked], views: int) -> list[Ranked]:
    """By the mean score of the first views that judged; what was not judged by votes, behind."""
    judged = [replace(one, reader_scores=one.reader_scores[:views]) for one in by_votes(own)]
    return sorted(judged, key=lambda one: -reader_score(one))


def with_trm(own: Sequence[Ranked], weight: float) -> list[Ranked]:
    """By the reader's mean score and the logarithm of TRM's votes (one more than there are)."""

    def value(one: Ranked) -> float:
        votes = one.votes - len(one.views_by.get(READER, ()))
        return reader_score(one) + weight * math.log(votes + 1)

    return sorted(by_votes(own), key=lambda one: -value(one))


def with_inputs(own: Sequence[Ranked], weight: float) -> list[Ranked]:
    """By the reader's mean score and `weight` x that of the input, given the grid; grids about
    which it was not asked stay behind, by its score.
    """
    asked = [one for one in own if one.inverse_scores]
    rest = [one for one in by_votes(own) if not one.inverse_scores]
    views = list(zip(*(one.inverse_scores for one in asked), strict=True))
    behind = sorted(rest, key=lambda one: -reader_score(one))
    return by_explanation(asked, views, weight) + behind


def with_invariants(
    own: Sequence[Ranked], weight: float, gap_share: float = GAP_SHARE
) -> list[Ranked]:
    """By the reader, with the inputs as usual, then by what the first ones break."""
    ranked = with_inputs(own, JudgeConfig().inverse_weight)
    nats = {**weights(), COPY: COPY_NATS}
    worth = [{name: nats.get(name, 0.0) for name in one.broken} for one in ranked[:LOOKED_AT]]
    return by_invariants(ranked, worth, weight, gap_share)


def reader_score(one: Ranked) -> float:
    """The reader's mean score; the least for a grid that it did not judge."""
    return -math.inf if one.reader_score is None else one.reader_score


def row(
    kept: Mapping[str, Sequence[Sequence[Ranked]]], known: scoring.Answers, rule: Rule
) -> list[str]:
    """The scores of a rule, in percent."""
    predictions = {
        task: [[one.grid for one in rule(own)[: scoring.PASSES[-1]]] for own in inputs]
        for task, inputs in kept.items()
    }
    found = scoring.score(predictions, known).task_fraction
    return [f"{100 * found[k]:.1f}" for k in scoring.PASSES]


if __name__ == "__main__":
    guarded(main)
