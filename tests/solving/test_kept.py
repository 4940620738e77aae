"""candidates.json.gz: what was ranked comes back, and other rankings of it can be scored."""

import gzip
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from arctrm.data.task import Pair, Task
from arctrm.errors import DataError
from arctrm.solving.kept import read_candidates, write_candidates
from arctrm.solving.vote import Candidate, by_experts, by_explanation, vote

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RED, BLUE, GREEN = (np.full((1, 2), colour, np.uint8) for colour in (2, 1, 3))


def ranked():
    """RED by both models, BLUE by the reader alone, GREEN (not judged) by TRM alone."""
    found = vote(
        [
            *(Candidate(RED, 1.0, "reader", view=n) for n in (0, 3)),
            Candidate(RED, 2.0, "hybrid", view=1),
            *(Candidate(BLUE, 4.0, "reader", view=n) for n in (1, 2)),
            Candidate(GREEN, 0.0, "hybrid", view=2),
        ],
        seed=0,
    )
    return by_experts(found, [[-5.0, -3.0], [-1.0, -math.inf]])


def test_what_is_written_is_read(tmp_path):
    task = Task("a", (), (Pair(RED),))
    own = ranked()
    write_candidates(tmp_path / "kept", [task], {("a", 0): own})
    (back,) = read_candidates(tmp_path / "kept")["a"]
    assert len(back) == len(own) == 3
    for found, expected in zip(back, own, strict=True):
        assert np.array_equal(found.grid, expected.grid)
        for name in ("votes", "mean_q", "sources", "reader_scores", "views_by", "votes_by"):
            assert getattr(found, name) == getattr(expected, name), name
    assert back[0].views_by == {"reader": (0, 3), "hybrid": (1,)}
    assert back[1].reader_scores == (-3.0, -math.inf)
    assert back[2].reader_scores == ()


def test_the_same_candidates_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_candidates(tmp_path / name, [Task("a", (), (Pair(RED),))], {("a", 0): ranked()})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_another_file_is_refused(tmp_path):
    (tmp_path / "kept").write_text("no candidates")
    with pytest.raises(DataError, match="keep_candidates=true"):
        read_candidates(tmp_path / "kept")


@pytest.fixture
def rankings(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["rankings"])
    return runpy.run_path(str(BENCHMARKS / "rankings.py"))


def test_the_rules_rank_as_their_names_say(rankings):
    own = ranked()
    assert [one.grid[0, 0] for one in own] == [2, 1, 3]
    assert [one.grid[0, 0] for one in rankings["by_votes"](own)] == [2, 1, 3]
    assert [one.grid[0, 0] for one in rankings["by_reader"](own, 1)] == [1, 2, 3]
    first = rankings["first"](own, 2)
    assert [(one.grid[0, 0], one.votes) for one in first] == [(2, 2), (1, 1)]
    weak, strong = (rankings["with_trm"](own, weight) for weight in (0.0, 100.0))
    assert [one.grid[0, 0] for one in weak] == [one.grid[0, 0] for one in strong] == [2, 1, 3]


def test_what_the_reader_says_of_inputs_is_kept_and_changes_the_order(tmp_path, rankings):
    own = by_explanation(ranked()[:2], [[-9.0, -5.0], [-9.0, -math.inf]], 0.0)
    write_candidates(tmp_path / "kept", [Task("a", (), (Pair(RED),))], {("a", 0): own})
    (back,) = read_candidates(tmp_path / "kept")["a"]
    assert [one.inverse_scores for one in back] == [(-9.0, -9.0), (-5.0, -math.inf)]
    found = vote([Candidate(RED, 0.0, "reader"), Candidate(BLUE, 0.0, "reader")], seed=0)
    first = found[0].grid[0, 0]
    own = by_experts(found, [[-2.0, -3.0] if first == 1 else [-3.0, -2.0]])
    asked = by_explanation(own, [[-20.0, -5.0]], 0.0)
    assert [one.grid[0, 0] for one in asked] == [1, 2]
    by_weight = {w: rankings["with_inputs"](asked, w)[0].grid[0, 0] for w in (0.0, 0.05, 0.1)}
    assert by_weight == {0.0: 1, 0.05: 1, 0.1: 2}
    names = [name for name, _ in rankings["rules"](2, 2, inverse=True)]
    assert "reader, inputs x 0.2" in names
    assert "reader, inputs x 0.2" not in [name for name, _ in rankings["rules"](2, 2)]


def test_files_from_before_inputs_were_asked_for_are_read(tmp_path):
    write_candidates(tmp_path / "kept", [Task("a", (), (Pair(RED),))], {("a", 0): ranked()})
    content = json.loads(gzip.decompress((tmp_path / "kept").read_bytes()))
    for one in content["a"][0]:
        del one["inverse_scores"], one["broken"]
    (tmp_path / "old").write_bytes(gzip.compress(json.dumps(content).encode()))
    (back,) = read_candidates(tmp_path / "old")["a"]
    assert [one.inverse_scores for one in back] == [(), (), ()]
    assert [one.broken for one in back] == [(), (), ()]


def test_what_a_grid_breaks_is_kept_or_looked_up_and_changes_the_order(tmp_path, rankings):
    task = Task("a", (Pair(RED, RED), Pair(BLUE, BLUE)), (Pair(RED),))
    wrong, right = np.array([[3]], np.uint8), RED
    own = vote([Candidate(wrong, 0.0, "reader", view=v) for v in (0, 1)], seed=0)
    own += vote([Candidate(right, 0.0, "reader", view=2)], seed=0)
    found = rankings["looked_at"]({"a": [own]}, [task])
    assert list(found) == ["a"]
    assert [one.grid.tolist() for one in found["a"][0]] == [wrong.tolist(), right.tolist()]
    assert "same colours" in found["a"][0][0].broken
    assert found["a"][0][1].broken == ()
    write_candidates(tmp_path / "kept", [task], {("a", 0): found["a"][0]})
    (back,) = read_candidates(tmp_path / "kept")["a"]
    assert [one.broken for one in back] == [one.broken for one in found["a"][0]]
    first = {w: rankings["with_invariants"](back, w)[0].grid[0, 0] for w in (0.0, 1.5)}
    assert first == {0.0: 3, 1.5: RED[0, 0]}


def test_a_say_of_trm_changes_the_order(rankings):
    found = vote(
        [Candidate(BLUE, 0.0, "reader", view=0), Candidate(RED, 0.0, "hybrid", view=0)], seed=0
    )
    first = found[0].grid[0, 0]
    own = by_experts(found, [[-1.0, -2.0] if first == 1 else [-2.0, -1.0]])
    assert [one.grid[0, 0] for one in rankings["with_trm"](own, 1.0)] == [1, 2]
    assert [one.grid[0, 0] for one in rankings["with_trm"](own, 2.0)] == [2, 1]
