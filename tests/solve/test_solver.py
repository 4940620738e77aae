"""`Solver` as scripts use it."""

import json
from dataclasses import replace
from html import unescape

import pytest

import arctrm
from arctrm.errors import ArctrmError
from helpers import is_grid

QUICK = {
    "inference.views": 2,
    "inference.dtype": "float32",
    "judge.scoring_views": 1,
    "adaptation.max_steps": 1,
}


@pytest.fixture(scope="module")
def loaded(trained):
    return arctrm.Solver.from_pretrained(trained.run, device="cpu", settings=QUICK)


def refused(call, *given, **named):
    with pytest.raises(ArctrmError) as error:
        call(*given, **named)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_task_is_solved_and_told_of_on_the_way(loaded, trained):
    task, told = trained.others[0], []
    solution = loaded.solve(task, "30s", told.append, settings=QUICK)
    assert len(solution.attempts) == len(solution.evidence) == len(task.test)
    assert all(is_grid(grid) for both in solution.attempts for grid in both)
    assert [len(own) > 0 for own in solution.candidates] == [True] * len(task.test)
    assert not any(pair.output is not None for pair in solution.task.test)
    assert {one.budget for one in told} == {30.0}
    assert solution.adaptation_steps == 2
    assert task.id in solution.to_html()
    shown = solution._repr_html_()  # in a notebook: the page within a frame
    assert unescape(shown.split('"')[1]) == solution.to_html()


def test_a_solver_is_shown_in_a_line(loaded, trained):
    assert repr(loaded).startswith(f"<Solver: {trained.run}")
    assert repr(loaded).endswith("reader and trm, 4 tasks known, cpu>")


def test_what_cannot_be_done_is_one_sentence(loaded, trained):
    task = trained.known[0]
    said = refused(loaded.solve, task, settings={"inference.viewz": 1})
    assert said.startswith("settings['inference.viewz']: unknown key inference.viewz; did you mean")
    assert "budget = 'soon' is not a duration" in refused(loaded.solve, task, "soon")
    assert "no test input" in refused(loaded.solve, replace(task, test=()))
    wrong = {"inference.dtype": "int8"}
    assert "settings" in refused(arctrm.Solver.from_pretrained, trained.run, settings=wrong)


def test_evaluate_is_the_command_with_the_weights_at_hand(loaded, trained, tmp_path):
    out, chosen = tmp_path / "scores", {"evaluation.max_tasks": 2, "inference.views": 2}
    scores = loaded.evaluate(str(trained.folder), out=out, settings=chosen)
    assert scores.num_tasks == 2
    written = json.loads((out / "scores.json").read_text())
    assert written["task_fraction"]["pass@2"] == scores.task_fraction[2]
    assert (out / "submission.json").is_file()


def test_a_planner_attempts_a_task_through_the_text_module(loaded, trained):
    task = trained.known[0]
    module = loaded.text_module(task)
    text = f"input\n{arctrm.grid_text(task.test[0].input)}"
    z_init, answer = module.generate_latent(text, max_length=64)
    assert list(z_init.shape) == [module.hidden_size]
    verifier = arctrm.GridVerifier(demonstrations=task.demonstrations)
    probes = [None] * len(task.demonstrations)
    verify = lambda z_init, text: verifier.verify(probes, arctrm.parse_grid_text(text))
    result = arctrm.ARCPlanner(module, 2, 64).multi_attempt_solve(text, verify)
    assert (result.total_attempts, result.reasoning_history[0].text) == (2, answer)


def test_the_text_module_takes_the_reader_of_a_solver_and_refuses_the_rest(loaded, trained):
    unknown, known = (loaded.text_module(t) for t in (trained.others[0], trained.known[0]))
    assert unknown.reader.condition.task == loaded.mean_row
    assert known.reader.condition.task == loaded.row_of(trained.known[0])
    assert arctrm.TextReasoningModule(loaded.reader).hidden_size == known.hidden_size
    said = refused(arctrm.TextReasoningModule, loaded.model)
    assert said.startswith("TextReasoningModule: got Trunk, which reads no text; give a hub id")
    deaf = replace(loaded, speakers=loaded.speakers._replace(reader=None))
    assert "has no reader" in refused(deaf.text_module)
