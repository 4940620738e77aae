"""`solve` gives two grids for every test input, in time, and never sees an answer."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from arctrm.config import SolveConfig
from arctrm.data.task import Pair
from arctrm.errors import CheckpointError, TaskError
from arctrm.solving.adaptation import Adapter, held_out
from arctrm.solving.report import Solution
from arctrm.solving.solve import run, solve_task
from arctrm.solving.submission import check_complete, read_submission
from arctrm.solving.vote import is_well_formed
from arctrm.solving.weights import load_solver

QUICK = {"views": 4, "steps": 2, "tokens_per_batch": 1024, "dtype": "float32"}


def config(checkpoint=None, budget=4.0, steps=4, **top) -> SolveConfig:
    """Ends at `steps` steps of adaptation and a few views, long before the budget."""
    return SolveConfig.model_validate(
        {
            "checkpoint": checkpoint,
            "budget": budget,
            "inference": QUICK,
            "adaptation": {"max_steps": steps, "tokens_per_batch": 256, "known_share": 0.3},
            **top,
        }
    )


@pytest.fixture
def solver(trained):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_solver(trained.run, config().inference, device)


@pytest.fixture
def rounds(monkeypatch):
    """Which demonstrations each round of adaptation was given."""
    given = []
    train = Adapter.train

    def recorded(self, tasks, *rest, **named):
        given.append(list(tasks[0].demonstrations))
        return train(self, tasks, *rest, **named)

    monkeypatch.setattr(Adapter, "train", recorded)
    return given


def grids_of(solutions: list[Solution]) -> list[list]:
    return [[grid.tolist() for grid in solution.attempts] for solution in solutions]


# -- one task


def test_every_test_input_gets_two_grids_with_evidence(solver, trained):
    for task in (trained.known[0], *trained.others):
        solutions = solve_task(solver, task.without_answers(), config())
        has_probe = task is not trained.known[0] and len(task.demonstrations) > 2
        assert len(solutions) == len(task.test)
        for solution in solutions:
            assert [is_well_formed(grid) for grid in solution.attempts] == [True, True]
            assert all(0 <= e.votes <= e.views for e in solution.evidence)
            assert solution.adaptation_steps == (8 if has_probe else 4)
            assert 0 < solution.seconds <= 6


def test_two_grids_come_even_when_the_budget_is_over_at_once(solver, trained):
    for task in (trained.known[0], *trained.others):
        solutions = solve_task(solver, task.without_answers(), config(budget=0.001))
        assert all(len(solution.attempts) == 2 for solution in solutions)
        assert len(solutions) == len(task.test)


def test_two_grids_come_from_a_model_that_draws_no_grid(solver, trained):
    with torch.no_grad():
        solver.trm.lm_head.weight.zero_()  # every code is PAD
    task = trained.others[2].without_answers()
    no_adaptation = config(adaptation={"enabled": False})
    [solution] = solve_task(solver, task, no_adaptation)
    assert all(np.array_equal(grid, task.test[0].input) for grid in solution.attempts)
    assert {evidence.votes for evidence in solution.evidence} == {0}


def test_a_budget_is_used_and_kept(solver, trained):
    """Most of it adapts; the answers of the adapted model still come in time."""
    begin = time.monotonic()
    [solution] = solve_task(
        solver, trained.others[2].without_answers(), config(budget=6.0, steps=100_000)
    )
    assert 3.0 < time.monotonic() - begin < 9.0
    assert solution.adaptation_steps > 10
    assert solution.evidence[0].views >= 1


def test_many_views_stop_at_the_end_of_the_budget(solver, trained):
    settings = config(
        budget=2.0,
        inference={**QUICK, "views": 5000, "steps": 16},
        adaptation={"enabled": False},
    )
    begin = time.monotonic()
    [solution] = solve_task(solver, trained.known[0].without_answers(), settings)
    assert time.monotonic() - begin < 3.0
    assert solution.adaptation_steps == 0
    assert 1 < solution.evidence[0].views < 5000


def test_solving_leaves_the_model_bit_identical(solver, trained):
    before = {name: tensor.clone() for name, tensor in solver.trm.state_dict().items()}
    for task in (trained.known[0], trained.others[0]):
        solve_task(solver, task.without_answers(), config())
    after = solver.trm.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_same_seed_gives_the_same_grids(solver, trained):
    task = trained.others[0].without_answers()
    a, b = (grids_of(solve_task(solver, task, config())) for _ in range(2))
    assert a == b


def test_test_outputs_change_no_answer(solver, trained):
    """Even a task that still carries its answers is solved as if it had none."""
    task = trained.others[1]
    wrong = replace(task, test=tuple(Pair(p.input, (p.output + 1) % 10) for p in task.test))
    first, *others = (
        [
            (grids_of([s]), [(e.votes, e.views, e.mean_q, e.leave_one_out) for e in s.evidence])
            for s in solve_task(solver, version, config())
        ]
        for version in (task.without_answers(), task, wrong)
    )
    assert all(other == first for other in others)


# -- leave one out


def test_an_unknown_task_is_probed_on_what_it_was_not_yet_trained_on(solver, trained, rounds):
    task = trained.others[1].without_answers()
    solutions = solve_task(solver, task, config(steps=6))
    index = held_out(task, 0)
    before, after = rounds[0], rounds[-1]
    assert len(before) == len(task.demonstrations) - 1
    assert all(pair is not task.demonstrations[index] for pair in before)
    assert {id(pair) for pair in after} == {id(pair) for pair in task.demonstrations}
    assert 0 <= solutions[0].evidence[0].leave_one_out <= 1


def test_a_task_that_the_model_knows_has_nothing_left_to_hold_out(solver, trained, rounds):
    task = trained.known[0].without_answers()
    solutions = solve_task(solver, task, config())
    assert solutions[0].evidence[0].leave_one_out is None
    assert [len(given) for given in rounds] == [len(task.demonstrations)]


def test_two_demonstrations_are_too_few_to_hold_one_out(solver, trained, rounds):
    task = trained.others[0].without_answers()
    task = replace(task, demonstrations=task.demonstrations[:2])
    solutions = solve_task(solver, task, config())
    assert solutions[0].evidence[0].leave_one_out is None
    assert [len(given) for given in rounds] == [2]


def test_without_adaptation_nothing_is_trained(solver, trained, rounds):
    task = trained.others[2].without_answers()
    [solution] = solve_task(solver, task, config(adaptation={"enabled": False}))
    assert rounds == []
    assert solution.adaptation_steps == 0
    assert solution.evidence[0].leave_one_out is None
    assert solution.evidence[0].views == 4


def test_the_held_out_demonstration_is_learned_too_however_fast_steps_are(
    solver, trained, monkeypatch
):
    """The bound on steps must not be used up before the round that has every demonstration."""
    learned = []
    train = Adapter.train

    def recorded(self, tasks, *rest, **named):
        before = self.steps
        train(self, tasks, *rest, **named)
        learned.append((len(tasks[0].demonstrations), self.steps - before))

    monkeypatch.setattr(Adapter, "train", recorded)
    task = trained.others[1].without_answers()
    solve_task(solver, task, config(budget=30.0, steps=8))
    assert learned[-1][0] == len(task.demonstrations)
    assert learned[-1][1] > 0


# -- many tasks


def test_a_folder_is_answered_into_one_submission(trained, write_tasks, tmp_path):
    tasks = [trained.known[0], *trained.others]
    folder = write_tasks(tmp_path / "tasks", tasks)
    run(config(trained.run), str(folder), tmp_path / "out", False)
    check_complete(json.loads((tmp_path / "out/submission.json").read_text()), tasks)
    assert len(read_submission(tmp_path / "out/submission.json")) == len(tasks)


def test_a_kaggle_file_is_answered(trained, write_kaggle, tmp_path):
    challenges, _ = write_kaggle(tmp_path / "kaggle", trained.others)
    run(config(trained.run), str(challenges), tmp_path / "out", False)
    check_complete(json.loads((tmp_path / "out/submission.json").read_text()), trained.others)


def test_answers_in_the_file_change_nothing_in_the_submission(trained, write_tasks, tmp_path):
    task = trained.others[0]
    wrong = replace(task, test=tuple(Pair(p.input, (p.output + 1) % 10) for p in task.test))
    written = []
    for number, version in enumerate((task, wrong, task.without_answers())):
        folder = write_tasks(tmp_path / f"tasks{number}", [version])
        run(config(trained.run), str(folder), tmp_path / f"out{number}", bool(number))
        written.append((tmp_path / f"out{number}/submission.json").read_bytes())
    assert written[0] == written[1] == written[2]


def test_solving_hands_on_no_answer(trained, tmp_path, write_tasks, monkeypatch):
    from arctrm.solving import solve

    seen = []
    original = solve.solve_task

    def recorded(solver, task, *rest):
        seen.append(task)
        return original(solver, task, *rest)

    monkeypatch.setattr(solve, "solve_task", recorded)
    folder = write_tasks(tmp_path / "tasks", trained.others[:2])
    run(config(trained.run), str(folder), None, True)
    assert [task.id for task in seen] == [task.id for task in trained.others[:2]]
    assert all(pair.output is None for task in seen for pair in task.test)


def test_an_interrupt_keeps_what_was_answered(trained, tmp_path, write_tasks, monkeypatch):
    from arctrm.solving import solve

    original = solve.solve_task

    def interrupted(solver, task, *rest):
        if task.id == trained.others[1].id:
            raise KeyboardInterrupt
        return original(solver, task, *rest)

    monkeypatch.setattr(solve, "solve_task", interrupted)
    folder = write_tasks(tmp_path / "tasks", trained.others)
    with pytest.raises(KeyboardInterrupt):
        run(config(trained.run), str(folder), tmp_path / "out", False)
    assert list(read_submission(tmp_path / "out/submission.json")) == [trained.others[0].id]


def test_a_bad_task_ends_the_run_before_anything_is_written(trained, tmp_path, write_tasks):
    folder = write_tasks(tmp_path / "tasks", trained.others[:1])
    (folder / "bad.json").write_text('{"train": [], "test": []}')
    with pytest.raises(TaskError, match=r"bad\.json"):
        run(config(trained.run), str(folder), tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_keep_going_reports_the_bad_task_and_answers_the_others(
    trained, tmp_path, write_tasks, capsys
):
    folder = write_tasks(tmp_path / "tasks", trained.others[:1])
    (folder / "bad.json").write_text('{"train": [], "test": []}')
    run(config(trained.run, keep_going=True), str(folder), tmp_path / "out", False)
    assert list(read_submission(tmp_path / "out/submission.json")) == [trained.others[0].id]
    assert "bad.json" in "".join(capsys.readouterr().err.split())


# -- checkpoints that cannot adapt


def test_a_per_view_checkpoint_is_refused(trained, trained_per_view, tmp_path):
    with pytest.raises(CheckpointError, match="per_view"):
        run(config(trained_per_view), str(trained.folder), tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_a_reference_checkpoint_is_refused(trained, reference_file, tmp_path):
    with pytest.raises(CheckpointError, match=r"trm\.layout = 'reference'.*arctrm eval"):
        run(config(reference_file), str(trained.folder), tmp_path / "out", False)
    assert not (tmp_path / "out").exists()
