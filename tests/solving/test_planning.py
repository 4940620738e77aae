"""The planner at solve time: probes are held out, attempts build on each other, time is kept."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import SolveConfig
from arctrm.data.task import Pair
from arctrm.planner import GridVerifier
from arctrm.solving import planning
from arctrm.solving.anytime import solve_task
from arctrm.solving.pace import Pace
from arctrm.solving.planning import RowsOfTask, plan
from arctrm.solving.weights import load_solver

ATTEMPTS = 3


def config(**top) -> SolveConfig:
    inference = {"views": 2, "steps": 2, "tokens_per_batch": 1024, "dtype": "float32"}
    quick = {"adaptation": {"enabled": False}, "attempts": ATTEMPTS, "budget": 60.0}
    return SolveConfig.model_validate({"inference": inference, **quick, **top})


@pytest.fixture(scope="module", params=["pair", "task"])
def solver(joined, request):
    """Coupled, of both sequence forms."""
    folder = joined(True, request.param)
    return load_solver(folder, config().inference, torch.device("cpu"))


@pytest.fixture(scope="module")
def task(trained):
    return trained.others[1].without_answers()


def planned(solver, task, settings=None, seconds=60.0):
    return plan(solver, task, settings or config(), Pace(seconds))


def what_was_said(histories):
    return [
        [(a.text, a.verdict.prediction, a.score) for a in result.reasoning_history]
        for result in histories
    ]


# -- what is asked


def test_the_text_of_a_problem_reads_as_the_tokens_of_its_prompt(solver, task):
    rows = RowsOfTask(solver, task, config())
    for text, reading in zip(rows.texts, rows.readings, strict=True):
        read = rows.module.reader.text_prompt(text)
        assert np.array_equal(read.tokens, reading.prompt.tokens)
        assert np.array_equal(read.positions, reading.prompt.positions)
        assert read.output_start == reading.prompt.output_start
        assert read.condition == reading.prompt.condition


def test_a_probe_sees_no_output_of_its_own(solver, task):
    """Change a held-out output: nothing of that row changes before the scoring."""
    index, num_test = 1, len(task.test)
    pair = task.demonstrations[index]
    changed = list(task.demonstrations)
    changed[index] = Pair(pair.input, np.full((25, 25), 9, np.uint8))
    other = replace(task, demonstrations=tuple(changed))
    a, b = (RowsOfTask(solver, version, config()) for version in (task, other))
    row = num_test + index
    assert np.array_equal(a.readings[row].prompt.tokens, b.readings[row].prompt.tokens)
    assert np.array_equal(a.queries[row].codes, b.queries[row].codes)
    assert a.readings[row].max_output_tokens == b.readings[row].max_output_tokens
    with torch.no_grad():
        for number in range(2):
            said = [rows.module.generate_latent(rows.texts, rows.soft_RPH, 60) for rows in (a, b)]
            for rows, output in zip((a, b), said, strict=True):
                rows.verify(output.z_init, output.text, list(range(len(rows.texts))))
            assert said[0].text[row] == said[1].text[row]
            assert np.array_equal(a.grids[number][row], b.grids[number][row])
            torch.testing.assert_close(a.soft_RPH[row], b.soft_RPH[row], rtol=1e-4, atol=1e-6)


def test_a_probe_in_the_pair_form_sees_no_other_demonstration(solver, task):
    rows = RowsOfTask(solver, task, config())
    starts = [text.count("input") for text in rows.texts[len(task.test) :]]
    others = len(task.demonstrations) - 1
    pair_form = solver.reader.config.sequence == "pair"
    assert starts == [1 if pair_form else 1 + min(2, others)] * len(task.demonstrations)


def test_test_outputs_are_not_read(solver, trained, task):
    known = trained.others[1]
    wrong = replace(known, test=tuple(Pair(p.input, 9 - p.output) for p in known.test))
    said = [str(what_was_said(planned(solver, t).histories)) for t in (task, known, wrong)]
    assert said[0] == said[1] == said[2]


# -- attempts


def test_each_test_input_has_a_history_and_a_candidate_with_its_probe_score(solver, task):
    found = planned(solver, task)
    assert len(found.histories) == len(found.candidates) == len(task.test)
    for index, (key, candidate) in enumerate(found.candidates):
        result = found.histories[index]
        assert key == (task.id, index)
        assert candidate.source == "planner"
        assert candidate.probe == result.best.score
        assert np.array_equal(candidate.grid, result.best.verdict.prediction)
        assert 1 <= result.total_attempts <= ATTEMPTS


def test_the_feedback_is_that_of_the_probes(solver, task):
    found = planned(solver, task)
    for attempt in found.histories[0].reasoning_history:
        expected = GridVerifier(demonstrations=task.demonstrations)
        probes = [result.predicted for result in attempt.verdict.probes]
        assert attempt.feedback == expected.verify(probes).feedback
        assert attempt.score == expected.verify(probes).score


def test_it_stops_when_every_probe_is_right(solver, task, monkeypatch):
    rows = len(task.test)
    truth = [pair.output for pair in task.demonstrations]
    refine = RowsOfTask.refine
    made = []

    def right(self, *given):
        grids, q, soft = refine(self, *given)
        made.append(soft)
        return (grids[:rows] + truth, q, soft) if len(made) == 2 else (grids, q, soft)

    monkeypatch.setattr(RowsOfTask, "refine", right)
    result = planned(solver, task, config(attempts=5)).histories[0]
    assert [result.success, result.total_attempts, result.best.number] == [True, 2, 2]


def test_without_time_no_attempt_is_made(solver, task):
    pace = Pace(60.0)
    pace.record("read", 1, 1000.0)
    assert plan(solver, task, config(), pace).histories == ()


def test_without_time_for_another_one_there_is_one_attempt(solver, task, monkeypatch):
    refine = RowsOfTask.refine

    def slow(self, *given):
        time.sleep(2.0)
        return refine(self, *given)

    monkeypatch.setattr(RowsOfTask, "refine", slow)
    assert planned(solver, task, seconds=10.0).histories[0].total_attempts == 1


def test_the_soft_prefix_changes_what_an_attempt_says(solver, task):
    rows = RowsOfTask(solver, task, config())
    said = []
    with torch.no_grad():
        _, q, soft = rows.refine(rows.drafts, None)
        for prefix in (soft, soft, torch.randn_like(soft)):
            read = rows.module.generate_latent(rows.texts, prefix, 8)
            said.append((rows.refine(rows.drafts, prefix)[1], read.z_init))
    assert said[0][0] == said[1][0] != said[2][0]
    assert said[0][0] != q
    assert torch.equal(said[0][1], said[1][1])
    assert not torch.equal(said[0][1], said[2][1])


def test_each_attempt_starts_from_the_prefix_of_the_one_before(solver, task, monkeypatch):
    refine, given, made = RowsOfTask.refine, [], []

    def recorded(self, drafts, soft):
        result = refine(self, drafts, soft)
        given.append(soft)
        made.append(result[2])
        return result

    monkeypatch.setattr(RowsOfTask, "refine", recorded)
    planned(solver, task)
    assert given[0] is None
    assert all(torch.equal(a, b) for a, b in zip(given[1:], made, strict=False))


def test_an_attempt_without_a_grid_keeps_the_last_draft(solver, task):
    rows = RowsOfTask(solver, task, config())
    numbers = list(range(len(rows.texts)))
    z_init = torch.zeros(len(numbers), 32)
    with torch.no_grad():
        rows.verify(z_init, ["12\n34\n"] * len(numbers), numbers)
        rows.verify(z_init, ["nothing"] * len(numbers), numbers)
    assert all(draft.tolist() == [[1, 2], [3, 4]] for draft in rows.drafts)


# -- in solve


def test_solve_puts_the_kept_attempt_into_the_pool(solver, task, monkeypatch):
    solutions = solve_task(solver, task, config())
    history = solutions[0].history
    assert history is not None
    pooled = [evidence for evidence in solutions[0].evidence if "planner" in evidence.votes_by]
    assert all(evidence.probe == history.best.score for evidence in pooled)


def test_without_adapters_there_is_nothing_to_plan(joined, task):
    solver = load_solver(joined(False), config().inference, torch.device("cpu"))
    assert not planning.can_plan(solver)
    assert planned(solver, task).histories == ()
    assert solve_task(solver, task, config())[0].history is None
