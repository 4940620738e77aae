"""The vote: order, ties, and what never wins."""

import random

import numpy as np

from arctrm.solving.vote import Candidate, Evidence, attempts, evidence, vote


def grid(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


RED, BLUE, WIDE = grid([2, 2]), grid([1, 1]), grid([2, 2, 2])
QUERY = grid([0])


def same(a, b) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def test_more_votes_beat_a_higher_q():
    ranked = vote([Candidate(RED, -3.0), Candidate(BLUE, 9.0), Candidate(RED.copy(), -2.0)], seed=0)
    assert same(ranked[0].grid, RED)
    assert (ranked[0].votes, ranked[0].mean_q) == (2, -2.5)
    assert (ranked[1].votes, ranked[1].mean_q) == (1, 9.0)


def test_equal_votes_go_to_the_higher_mean_q():
    candidates = [
        Candidate(RED, 1.0),
        Candidate(RED, 1.0),
        Candidate(BLUE, 3.0),
        Candidate(BLUE, 0),
    ]
    assert same(vote(candidates, seed=0)[0].grid, BLUE)


def test_a_malformed_grid_never_wins():
    empty, no_rows = np.zeros((0, 0), np.uint8), np.zeros((0, 3), np.uint8)
    too_large, no_colour = np.zeros((31, 2), np.uint8), grid([10])
    malformed = [None, empty, no_rows, too_large, no_colour]
    candidates = [Candidate(bad, 9.0) for bad in malformed for _ in range(5)]
    ranked = vote([*candidates, Candidate(RED, -9.0)], seed=0)
    assert len(ranked) == 1
    assert same(ranked[0].grid, RED)
    assert vote(candidates, seed=0) == []


def test_grids_of_equal_bytes_but_different_shape_are_different_candidates():
    square, row = grid([1, 2], [3, 4]), grid([1, 2, 3, 4])
    assert [r.votes for r in vote([Candidate(square, 0), Candidate(row, 0)], seed=0)] == [1, 1]


def test_views_in_another_memory_layout_or_type_count_as_the_same_grid():
    upright = grid([1, 2], [3, 4], [5, 6])
    transposed_twice = np.asfortranarray(upright).astype(np.int64)
    ranked = vote([Candidate(upright, 0), Candidate(transposed_twice, 0)], seed=0)
    assert [r.votes for r in ranked] == [2]
    assert ranked[0].grid.dtype == np.uint8


def test_the_vote_does_not_depend_on_candidate_order():
    draw = random.Random(0)
    candidates = [Candidate(grid([i // 6]), draw.gauss(0, 1e3)) for i in range(36)]
    candidates += [Candidate(grid([7, c]), 0.1) for c in range(10)]
    reference = [(r.grid.tobytes(), r.votes, r.mean_q) for r in vote(candidates, seed=3)]
    for _ in range(20):
        draw.shuffle(candidates)
        assert [(r.grid.tobytes(), r.votes, r.mean_q) for r in vote(candidates, 3)] == reference


def test_the_seed_decides_ties_and_no_grid_is_favoured():
    tied = [Candidate(RED, 0.5), Candidate(BLUE, 0.5)]
    wins = sum(same(vote(tied, seed)[0].grid, RED) for seed in range(200))
    assert 60 < wins < 140


def test_a_candidate_remembers_who_proposed_it():
    candidates = [Candidate(RED, 0, "trm"), Candidate(RED, 0, "reader"), Candidate(RED, 0, "trm")]
    assert vote(candidates, seed=0)[0].sources == ("reader", "trm")


def test_there_are_always_two_attempts():
    ranked = vote([Candidate(RED, 3), Candidate(BLUE, 2), Candidate(WIDE, 1)], seed=0)
    for count, expected in [(3, (RED, BLUE)), (1, (RED, RED)), (0, (QUERY, QUERY))]:
        first, second = attempts(ranked[:count], fallback=QUERY)
        assert same(first, expected[0])
        assert same(second, expected[1])


def test_the_evidence_belongs_to_the_attempt_of_the_same_place():
    ranked = vote([Candidate(RED, 3), Candidate(RED, 1), Candidate(BLUE, 5)], seed=0)
    assert evidence(ranked, views=4, leave_one_out=0.5) == (
        Evidence(votes=2, views=4, mean_q=2.0, leave_one_out=0.5, votes_by={"trm": 2}),
        Evidence(votes=1, views=4, mean_q=5.0, leave_one_out=0.5, votes_by={"trm": 1}),
    )
    assert evidence(ranked[:1], views=4)[1] == Evidence(2, 4, 2.0, votes_by={"trm": 2})
    assert [e.votes for e in evidence([], views=4)] == [0, 0]
