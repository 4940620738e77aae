"""A grid that breaks what all demonstrations keep comes behind one that does not."""

import math

import numpy as np
import pytest
import torch
from rich.console import Console

from arctrm.config import EvalConfig, SolveConfig
from arctrm.data.task import Pair, Task
from arctrm.invariants.shared import weights
from arctrm.solving import checked as checked_module
from arctrm.solving.anytime import solve_task
from arctrm.solving.checked import LOOKED_AT, Checker
from arctrm.solving.evaluate import run
from arctrm.solving.kept import KEPT, read_candidates
from arctrm.solving.report import solution_report
from arctrm.solving.vote import PLACE_NATS, Candidate, by_invariants, evidence, vote
from arctrm.solving.weights import load_solver


def grid(*rows):
    return np.array([[int(c) for c in row] for row in rows], dtype=np.uint8)


TASK = Task(
    "t",
    (
        Pair(grid("020", "002"), grid("030", "003")),
        Pair(grid("200", "000", "020"), grid("300", "000", "030")),
    ),
    (Pair(grid("0022")),),
)
RIGHT, WRONG = grid("0033"), grid("0044")


def ranked(*grids):
    """In this order, by votes."""
    return vote(
        [Candidate(g, 0.0) for n, g in enumerate(grids) for _ in range(len(grids) - n)], seed=0
    )


def test_a_broken_invariant_outweighs_a_place():
    found = Checker().checked({("t", 0): ranked(WRONG, RIGHT)}, [TASK], 1.5)["t", 0]
    assert [one.grid.tolist() for one in found] == [RIGHT.tolist(), WRONG.tolist()]
    assert "colours they change to" in found[1].broken
    nats = [weights().get(name, 0.0) for name in found[1].broken]
    assert nats == sorted(nats, reverse=True)
    assert found[0].votes == 1
    first, second = evidence(found, views=3)
    assert first.broken == found[0].broken
    assert second.broken == found[1].broken


def test_without_a_weight_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(checked_module, "Invariants", None)
    own = ranked(WRONG, RIGHT)
    assert Checker().checked({("t", 0): own}, [TASK], 0.0) == {("t", 0): own}


def test_what_comes_behind_the_first_stays_there():
    others = [grid(f"00{n // 10}{n % 10}") for n in range(45, 45 + LOOKED_AT)]
    found = Checker().checked({("t", 0): ranked(*others, RIGHT)}, [TASK], 1.5)["t", 0]
    assert found[-1].grid.tolist() == RIGHT.tolist()
    assert found[-1].broken == ()
    assert sum(bool(one.broken) for one in found) == LOOKED_AT


def test_a_grid_is_looked_at_once(monkeypatch):
    looked = []
    real = checked_module.Invariants

    class Counting(real):
        def broken(self, given, made):
            looked.append(made.tolist())
            return super().broken(given, made)

    monkeypatch.setattr(checked_module, "Invariants", Counting)
    checker = Checker()
    once = checker.checked({("t", 0): ranked(WRONG, RIGHT)}, [TASK], 1.5)
    again = checker.checked({("t", 0): ranked(RIGHT, WRONG)}, [TASK], 1.5)
    assert len(looked) == 2
    assert [r.broken for r in once["t", 0]] == [r.broken for r in again["t", 0]]


@pytest.mark.parametrize("cost", [0.9, 1.1])
def test_places_and_nats_are_weighed(cost):
    """The second place costs PLACE_NATS x log 2."""
    own = ranked(WRONG, RIGHT)
    nats = {"x": cost * PLACE_NATS * math.log(2) / 2}
    found = by_invariants(own, [frozenset({"x", "unknown"}), frozenset()], nats, 2.0)
    assert (found[0].grid.tolist() == RIGHT.tolist()) == (cost > 1)


def test_a_test_input_without_candidates_stays_without():
    assert Checker().checked({("t", 0): []}, [TASK], 1.5) == {("t", 0): []}


def test_the_weights_are_there():
    assert len(weights()) > 50


INFERENCE = {"views": 8, "dtype": "float32"}


def test_eval_ranks_by_what_grids_break(trained, tiny_reader, tmp_path):
    found = {}
    for weight in (0.0, 1.5):
        settings = {
            "checkpoint": tiny_reader,
            "evaluation": {"test_set": str(trained.folder), "keep_candidates": True},
            "inference": {**INFERENCE, "invariant_weight": weight},
            "reader": {"scoring_views": 2},
        }
        run(EvalConfig.model_validate(settings), tmp_path / f"{weight}")
        found[weight] = read_candidates(tmp_path / f"{weight}" / KEPT)
    moved = 0
    for task, inputs in found[0.0].items():
        for before, after in zip(inputs, found[1.5][task], strict=True):
            assert all(one.broken == () for one in before)
            broken = {one.grid.tobytes(): frozenset(one.broken) for one in after}
            looked_at = [broken[one.grid.tobytes()] for one in before[:LOOKED_AT]]
            expected = by_invariants(before, looked_at, weights(), 1.5)
            assert [one.grid.tolist() for one in after] == [one.grid.tolist() for one in expected]
            orders = ([one.grid.tolist() for one in own] for own in (before, after))
            moved += len({str(order) for order in orders}) == 2
    assert moved


def test_solve_ranks_by_what_grids_break_and_says_so(trained, tiny_reader):
    task = trained.known[1].without_answers()
    found = {}
    for weight in (0.0, 1.5):
        settings = {
            "budget": 30.0,
            "inference": {**INFERENCE, "invariant_weight": weight},
            "adaptation": {"max_steps": 1},
            "reader": {"scoring_views": 2},
        }
        config = SolveConfig.model_validate(settings)
        solver = load_solver(tiny_reader, config.inference, torch.device("cpu"))
        found[weight] = solve_task(solver, task, config)
    for before, after in zip(found[0.0], found[1.5], strict=True):
        assert all(one.broken == () for one in before.evidence)
        assert any(one.broken for one in after.evidence)
        nats = [sum(weights().get(n, 0.0) for n in one.broken) for one in after.evidence]
        assert nats[0] <= nats[1] + PLACE_NATS * math.log(LOOKED_AT)
        with (console := Console(width=200)).capture() as capture:
            console.print(solution_report(task, found[1.5]))
        assert "unlike all demonstrations in:" in capture.get()
