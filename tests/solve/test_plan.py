"""The planner at solve time: probes are held out, attempts build on each other, time is kept; and
what else a hub reader with TRM does in `solve`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import SolveConfig
from arctrm.data.task import Pair
from arctrm.planner import GridVerifier
from arctrm.solve.adapt import adapt, share_of_adaptation
from arctrm.solve.budget import Clock, Session
from arctrm.solve.plan import PLANNER, can_plan, plan, planning_seconds
from arctrm.solve.questions import keys_of
from arctrm.solve.solve import solve_task
from helpers import is_grid
from hub_models import hub_solver

ATTEMPTS = 2
SLOW_HUB = pytest.param("hub", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["tiny", "hub"])
def planner(request, solver, hub_model):
    return solver if request.param == "tiny" else hub_solver(hub_model)


@pytest.fixture(scope="module")
def task(trained):
    own = trained.others[1].without_answers()
    return replace(own, demonstrations=own.demonstrations[:2])


def session_of(solver, task, seconds=120.0, **top):
    given = {"inference": {"views": 2, "steps": 2}, "max_attempts": ATTEMPTS}
    config = SolveConfig.model_validate({**given, "judge": {"scoring_views": 1}, **top})
    return Session(solver, task, config, Clock(seconds))


def said(result):
    return [(one.text, one.feedback, one.score) for one in result.reasoning_history]


@pytest.mark.parametrize("planner", ["tiny", SLOW_HUB], indirect=True)
def test_each_test_input_has_attempts_and_a_candidate_with_its_probe_score(planner, task):
    results, candidates = plan(session_of(planner, task), 0.0)
    assert [one.key for one in candidates] == list(keys_of([task]))
    for result, candidate in zip(results, candidates, strict=True):
        assert candidate.source == PLANNER
        assert candidate.probe == result.best.score
        assert np.array_equal(candidate.grid, result.best.verdict.prediction)
        assert result.success or result.total_attempts == ATTEMPTS
        for attempt in result.reasoning_history:
            told = GridVerifier(demonstrations=task.demonstrations)
            probes = [one.predicted for one in attempt.verdict.probes]
            assert len(probes) == len(task.demonstrations)
            assert attempt.feedback == told.verify(probes).feedback


def test_a_hub_reader_writes_behind_what_trm_said(hub_model, task, monkeypatch):
    prefixes, verify = [], GridVerifier.verify

    def recorded(self, predicted, grid, latent_prefix):
        prefixes.append(latent_prefix)
        return verify(self, predicted, grid, latent_prefix)

    monkeypatch.setattr(GridVerifier, "verify", recorded)
    [result], _ = plan(session_of(hub_solver(hub_model), task), 0.0)
    assert [tuple(prefix.shape) for prefix in prefixes] == [(3, 32)] * result.total_attempts
    first, second = result.reasoning_history[:2]
    assert not torch.equal(first.z_init, second.z_init)


def test_a_trunks_next_attempt_begins_with_its_last_answer(solver, task, monkeypatch):
    drafts, refiner = [], type(solver.refiner)
    refine = refiner.refine

    def recorded(self, asked, *rest, **named):
        found = refine(self, asked, *rest, **named)
        drafts.append((asked[0].query.tolist(), asked[0].draft, found[0].grid))
        return found

    monkeypatch.setattr(refiner, "refine", recorded)
    [result], _ = plan(session_of(solver, task), 0.0)
    if not result.success:
        query = task.test[0].input.tolist()
        own = [(draft, grid) for asked, draft, grid in drafts if asked == query]
        assert np.array_equal(own[1][0], own[0][1])
        assert len({attempt.text for attempt in result.reasoning_history}) == 1


@pytest.mark.parametrize("planner", ["tiny", SLOW_HUB], indirect=True)
def test_no_output_is_read_that_is_asked_for(planner, trained, task):
    """Of the test, and of a probe: change a held-out output, and its prediction stays."""
    (first, pair), test = task.demonstrations, trained.others[1].test
    changed = replace(task, demonstrations=(first, Pair(pair.input, (pair.output + 1) % 10)))
    wrong = replace(task, test=tuple(Pair(one.input, 9 - one.output) for one in test))
    own, other, same = (plan(session_of(planner, one), 0.0)[0][0] for one in (task, changed, wrong))
    probes = [result.reasoning_history[0].verdict.probes[1] for result in (own, other)]
    assert np.array_equal(*(probe.predicted for probe in probes))
    assert said(own) == said(same)


def test_nothing_is_planned_without_time_for_two_attempts(planner, task):
    session = session_of(planner, task)
    session.clock.record("read", 1, 1000.0)
    assert plan(session, 0.0) == ((), [])
    assert plan(session_of(planner, task), 1e6) == ((), [])
    assert plan(session_of(planner, task, max_attempts=1), 0.0) == ((), [])


def test_nothing_is_planned_where_nothing_can_come_back(solver, hub_model, task):
    assert can_plan(solver)
    assert can_plan(hub_solver(hub_model))
    assert not can_plan(hub_solver(hub_model, back=False))
    alone = replace(solver, speakers=solver.speakers._replace(reader=None))
    assert not can_plan(alone)
    assert plan(session_of(alone, task), 0.0) == ((), [])
    one = replace(task, demonstrations=task.demonstrations[:1])
    assert plan(session_of(solver, one), 0.0) == ((), [])
    # Time is kept where a hub reader hears TRM.
    assert planning_seconds(session_of(solver, task)) == 0.0
    hub = session_of(hub_solver(hub_model), task, 100.0)
    assert planning_seconds(hub) == pytest.approx(30, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_a_hub_reader_with_trm_solves(hub_model, task, mode):
    solver = hub_solver(hub_model, mode)
    before = {name: tensor.clone() for name, tensor in solver.model.state_dict().items()}
    adaptation = {"max_steps": 1, "tokens_per_batch": 256}
    top = {"adaptation": adaptation, "max_attempts": 2}
    config = session_of(solver, task, **top).config.model_copy(update={"budget": 60.0})
    solution = solve_task(solver, task, config)
    [answer] = solution.answers
    assert [is_grid(grid) for grid in answer.attempts] == [True, True]
    assert solution.adaptation_steps == (0 if mode == "frozen" else 1)
    assert answer.history is not None
    after = solver.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_of_a_hub_reader_adapts_what_was_trained(hub_model, task):
    assert share_of_adaptation(session_of(hub_solver(hub_model), task)) == 0.0
    solver = hub_solver(hub_model, "full")
    session = session_of(solver, task, adaptation={"max_steps": 2, "tokens_per_batch": 256})
    session.clock.record("read", 1, 1e-6)
    done = adapt(session, share_of_adaptation(session))
    before, after = solver.model.state_dict(), done.solver.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("reader.pretrained.") for name in changed)
    assert done.solver.reader is not solver.reader
