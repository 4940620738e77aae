"""One ranking: votes, the reader both ways, invariants, two attempts."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from arctrm.config import EvalConfig
from arctrm.data.task import Pair, Task
from arctrm.data.views import View
from arctrm.invariants.task import COPY
from arctrm.model.layout import Condition
from arctrm.reader.scoring import score
from arctrm.solve.propose import Candidate
from arctrm.solve.questions import Key, inverse_questions, questions
from arctrm.solve.rank import (
    GAP_SHARE,
    PLACE_NATS,
    Ranked,
    asks_inverse,
    attempts,
    by_experts,
    by_explanation,
    by_invariants,
    checked,
    judged,
    place_nats,
    rank,
    vote,
)
from helpers import grid

KEY = Key("t", 0)


RED, BLUE, GREEN, WIDE = grid("22"), grid("11"), grid("33"), grid("222")


def candidates(*grids_and_q, source="reader"):
    """Each of a view of its own."""
    return [Candidate(KEY, own, q, source, view) for view, (own, q) in enumerate(grids_and_q)]


def same(a, b) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def colours(ranked):
    return [int(one.grid[0, 0]) for one in ranked]


# -- votes


def test_more_votes_beat_a_higher_q():
    ranked = vote(candidates((RED, -3.0), (BLUE, 9.0), (RED.copy(), -2.0)), seed=0)
    assert colours(ranked) == [2, 1]
    assert [(one.votes, one.mean_q) for one in ranked] == [(2, -2.5), (1, 9.0)]


def test_equal_votes_go_to_the_higher_probe_score_then_to_the_higher_mean_q():
    tied = candidates((RED, 1.0), (RED, 1.0), (BLUE, 3.0), (BLUE, 0.0))
    assert colours(vote(tied, seed=0)) == [1, 2]
    probed = replace(tied[0], probe=0.5)
    assert colours(vote([probed, *tied[1:]], seed=0)) == [2, 1]


def test_where_no_grid_came_out_nothing_is_voted_for():
    nothing = candidates(*((None, 9.0) for _ in range(5)))
    assert colours(vote([*nothing, *candidates((RED, -9.0))], seed=0)) == [2]
    assert vote(nothing, seed=0) == []


def test_the_vote_does_not_depend_on_candidate_order():
    draw = random.Random(0)
    found = candidates(*((grid(f"{i // 6}"), draw.gauss(0, 1e3)) for i in range(36)))
    found += candidates(*((grid(f"7{c}"), 0.1) for c in range(10)))
    reference = [(r.grid.tobytes(), r.votes, r.mean_q) for r in vote(found, seed=3)]
    for _ in range(20):
        draw.shuffle(found)
        assert [(r.grid.tobytes(), r.votes, r.mean_q) for r in vote(found, 3)] == reference


def test_a_candidate_remembers_who_proposed_it_and_under_which_view():
    found = [Candidate(KEY, RED, 0, source, n) for n, source in enumerate(["trm", "reader", "trm"])]
    (ranked,) = vote(found, seed=0)
    assert ranked.votes_by == {"reader": 1, "trm": 2}
    assert ranked.views_by == {"reader": (1,), "trm": (0, 2)}


def test_each_view_has_one_vote_for_each_voice():
    """TRM answers in two ways, which share its vote; the reader is heard as loudly."""
    found = [Candidate(KEY, RED, 0.0, "reader", view) for view in range(3)]
    found += [Candidate(KEY, BLUE, 5.0, way, view) for view in range(3) for way in ("joint", "trm")]
    ranked = vote([*found, Candidate(KEY, RED, 0.0, "planner", 0)], seed=0)
    assert colours(ranked) == [2, 1]
    assert [one.votes for one in ranked] == [4, 3]
    assert ranked[1].votes_by == {"joint": 1.5, "trm": 1.5}
    split = [Candidate(KEY, own, 0.0, way) for own, way in ((RED, "joint"), (BLUE, "trm"))]
    assert [one.votes for one in vote(split, seed=0)] == [0.5, 0.5]
    assert [one.votes for one in vote(split[:1], seed=0)] == [1]


def test_there_are_always_two_attempts():
    ranked = vote(candidates((RED, 3), (BLUE, 2), (WIDE, 1)), seed=0)
    query = grid("0")
    for count, expected in [(3, (RED, BLUE)), (1, (RED, RED)), (0, (query, query))]:
        found = attempts(ranked[:count], fallback=query)
        assert all(map(same, found, expected))


# -- the reader


def judged_grids():
    """Three grids, judged but for the last: RED before BLUE before GREEN."""
    found = vote(candidates(*((own, 0.0) for own in (RED, RED, RED, BLUE, BLUE, GREEN))), seed=0)
    return by_experts(found, [[-1.0, -2.0], [-2.0, -2.0]])


def test_the_likelier_under_all_views_together_comes_first_and_the_unjudged_last():
    ranked = judged_grids()
    assert colours(ranked) == [2, 1, 3]
    assert ranked[0].reader_scores == (-1.0, -2.0)
    assert ranked[0].reader_score == -1.5
    assert ranked[2].reader_score is None
    assert colours(by_experts(ranked, [[-9.0, -1.0], [-1.0, -2.0]])) == [1, 2, 3]
    assert colours(by_experts(ranked, [])) == [2, 1, 3]


def test_means_of_both_directions_are_added_by_weight():
    ranked = judged_grids()
    scores = [[-9.0, -5.0], [-9.0, -6.0], [-9.0, -4.0]]  # -9 and -5 in the mean: 4 nats
    assert colours(by_explanation(ranked, scores, 0.1)) == [2, 1, 3]  # 0.5 nats against 0.4
    assert colours(by_explanation(ranked, scores, 0.15)) == [1, 2, 3]
    first = by_explanation(ranked, scores, 0.15)[0]
    assert first.inverse_scores == (-5.0, -6.0, -4.0)
    assert first.reader_scores == (-2.0, -2.0)


def test_the_judge_scores_grids_as_each_view_shows_them(solver, trained):
    task = trained.known[0]
    asked = questions(solver, task, 3, seed=0)
    own = [task.test[0].output, np.rot90(task.test[0].input).copy()]
    found = judged(solver.reader, asked, {Key(task.id, 0): own})
    assert [key for key, _ in found] == [one.key for one in asked]
    for (_, values), one in zip(found, asked, strict=True):
        if one.key.index == 0:
            (expected,) = score(solver.reader, [one.prompt], [[one.shown(g) for g in own]])
            np.testing.assert_allclose(values, expected, rtol=1e-4)
        else:
            assert values == []


def test_the_judge_scores_inputs_of_candidates_by_the_vector_of_the_inverse_task(solver, trained):
    task = trained.known[0]
    asked = inverse_questions(solver, [task], 8)
    own = [task.test[0].output, np.rot90(task.test[0].input).copy()]
    found = judged(solver.reader, asked, {Key(task.id, 0): own})
    for (_, values), one in zip(found, asked, strict=True):
        if one.key.index:
            continue
        view = View(one.number)
        condition = Condition(solver.row_of(task), one.number, 1, inverse=1)
        prompts = [solver.reader.prompt(view.apply(g), condition) for g in own]
        expected = score(solver.reader, prompts, [[view.apply(task.test[0].input)]] * 2)
        np.testing.assert_allclose(values, [value for (value,) in expected], rtol=1e-4)
    forward = [solver.reader.prompt(own[0], condition._replace(inverse=0))]
    (plain,) = score(solver.reader, forward, [[task.test[0].input]])
    assert abs(plain[0] - found[-1][1][0]) > 1e-3  # the task's own vector says something else


def test_adaptation_ends_the_questions_the_other_way_round(solver):
    assert asks_inverse(solver)
    assert not asks_inverse(replace(solver, adapted=True))
    assert not asks_inverse(replace(solver, speakers=solver.speakers._replace(reader=None)))


# -- invariants


TASK = Task(
    "t",
    (
        Pair(grid("020", "002"), grid("030", "003")),
        Pair(grid("200", "000", "020"), grid("300", "000", "030")),
    ),
    (Pair(grid("0022")),),
)
GIVEN, RIGHT, WRONG = grid("0022"), grid("0033"), grid("0044")


def in_order(*grids):
    return [Ranked(own, len(grids) - n, 0.0) for n, own in enumerate(grids)]


def test_a_broken_invariant_outweighs_a_place():
    found = checked(TASK, GIVEN, in_order(WRONG, RIGHT), 1.5)
    assert same(found[0].grid, RIGHT)
    assert "colours they change to" in found[1].broken
    assert [one.broken for one in checked(TASK, GIVEN, in_order(WRONG, RIGHT), 0.0)] == [(), ()]
    assert checked(TASK, GIVEN, [], 1.5) == []


def with_scores(*scores):
    grids = [RED, BLUE, GREEN, WIDE]
    return [Ranked(own, 1, 0.0, reader_scores=s) for own, s in zip(grids, scores, strict=False)]


def test_what_the_reader_finds_far_less_likely_is_not_saved_by_invariants():
    """A right grid with log p -0.03 stood behind one of -43.7 that broke three nats less."""
    ranked = with_scores((-0.03, -0.03), (-43.7, -43.7))
    nats = [{"a": 1.0, "b": 1.0}, {}]
    assert colours(by_invariants(ranked, nats, 1.5, gap_share=0.0)) == [1, 2]
    assert colours(by_invariants(ranked, nats, 1.5)) == [2, 1]
    assert place_nats(ranked)[1] == pytest.approx(GAP_SHARE * 43.67)


def test_a_grid_that_cannot_be_written_so_and_one_that_was_not_judged_have_a_place():
    ranked = with_scores((-1.0,), (-math.inf,), ())
    costs = place_nats(ranked)
    assert costs[1] == math.inf
    assert costs[2] == pytest.approx(PLACE_NATS * math.log(3))
    assert all(map(math.isfinite, place_nats(with_scores((-math.inf,), (-2.0,)))))


# -- all of it


def config(**judge):
    given = {"inference": {"views": 2}, "judge": {"scoring_views": 2, **judge}}
    return EvalConfig.model_validate(given)


def test_every_test_input_is_ranked_even_without_candidates(solver, trained):
    ranked = rank(solver, trained.others, {}, config())
    assert set(ranked) == {Key(t.id, i) for t in trained.others for i in range(len(t.test))}
    assert all(own == [] for own in ranked.values())


def test_copies_of_the_input_come_last_where_every_demonstration_changes(solver):
    found = {KEY: candidates((GIVEN, 9.0), (GIVEN, 9.0), (WRONG, 0.0))}
    for weight in (0.0, 1.5):
        settings = EvalConfig.model_validate({"inference": {"invariant_weight": weight}})
        (own,) = rank(solver, [TASK], found, settings).values()
        assert [one.grid.tolist() for one in own] == [WRONG.tolist(), GIVEN.tolist()]
        assert own[1].broken == (COPY,)
    keeps = replace(TASK, demonstrations=(*TASK.demonstrations, Pair(GIVEN, GIVEN)))
    settings = EvalConfig.model_validate({"inference": {"invariant_weight": 0.0}})
    (own,) = rank(solver, [keeps], found, settings).values()
    assert same(own[0].grid, GIVEN)


def test_the_judge_is_asked_about_the_best_and_may_stop_early(solver, trained):
    task = trained.known[0]
    key = Key(task.id, 0)
    grids = [np.full((1, n), 3, np.uint8) for n in range(1, 5)]
    found = {key: [Candidate(key, own, float(n), "reader", n) for n, own in enumerate(grids)]}
    asked = []

    def judge(questions, wanted):
        asked.append((questions, wanted))
        best = [own[:1] for own in wanted.get(key, ())]
        return [] if questions[0].condition.inverse else [(key, [-2.0, -1.0][: len(best)])]

    ranked = rank(solver, [task], found, config(scored_candidates=2, inverse_candidates=1), judge)
    (forward, wanted), (inverse, explained) = asked
    assert [one.prompt is None for one in forward] == [False] * 2 * len(task.test)
    assert [g.shape[1] for g in wanted[key]] == [4, 3]
    assert [g.shape[1] for g in explained[key]] == [3]
    assert all(one.condition.inverse for one in inverse)
    scored = {one.grid.shape[1]: one.reader_scores for one in ranked[key]}
    assert scored == {3: (-1.0,), 4: (-2.0,), 2: (), 1: ()}
