"""The weights in the box are what their card says, and answer as they always have."""

import json
from pathlib import Path

import pytest
import torch

import arctrm
from arctrm.checkpoints import read_meta
from arctrm.config import EvalConfig, InferenceConfig
from arctrm.data.sources import load_tasks
from arctrm.solve.evaluate import evaluate
from arctrm.solve.propose import by_key, write, written
from arctrm.solve.questions import Key, all_questions, views_of
from arctrm.solve.rank import attempts, judged, rank
from arctrm.solve.weights import load_solver

BUNDLED = Path(arctrm.__file__).parent / "bundled"
CARD = (BUNDLED / "README.md").read_text()
GOLDEN = json.loads((Path(__file__).parent / "golden" / "solve.json").read_text())
"""What the reader alone answered before the trunk had two voices: six tasks, eight views."""
SCORE = 1e-3
"""Nats between the scores of two processors, or of two ways to form a batch."""


@pytest.fixture(scope="module")
def solver():
    return load_solver(None, InferenceConfig(dtype="float32"), torch.device("cpu"))


def test_the_bundle_stays_small():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 40 * 2**20


def test_the_card_names_the_data_and_the_step_of_the_checkpoint():
    meta = read_meta(BUNDLED)
    assert meta.data_fingerprint[:12] in CARD
    assert f"{meta.step:,}" in CARD
    assert meta.config["data"]["test_set"] == "evaluation"


def test_every_evaluation_task_is_known_by_its_demonstrations(solver):
    tasks = load_tasks("evaluation")
    rows = {solver.row_of(task) for task in tasks}
    assert None not in rows
    assert len(rows) == len(tasks)
    assert solver.row_of(load_tasks("arc2:0934a4d8")[0]) is not None  # also an ARC-AGI-1 task


def test_views_are_those_under_which_everything_was_measured(solver):
    tasks = {task.id: task for task in load_tasks("evaluation")}
    for one in GOLDEN["tasks"]:
        task = tasks[one["task"]]
        assert solver.row_of(task) == one["row"]
        drawn = views_of(solver, task, 8, GOLDEN["seed"])
        shown = [{"dihedral": v.dihedral, "colours": list(v.colours)} for v, _ in drawn]
        assert shown == one["views"]


def rows_of(grid):
    return None if grid is None else ["".join(map(str, row)) for row in grid.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("golden", GOLDEN["tasks"], ids=lambda one: one["task"])
def test_the_reader_alone_answers_and_ranks_as_it_did(solver, golden):
    task = next(t for t in load_tasks("evaluation") if t.id == golden["task"]).without_answers()
    config = EvalConfig.model_validate({"inference": {"views": 8}, "seed": GOLDEN["seed"]})
    asked = all_questions(solver, [task], 8, config.seed)
    found = by_key(written(asked, write(solver.reader, asked)))
    judge = lambda questions, grids: judged(solver.reader, questions, grids)
    ranked = rank(solver, [task], found, config, judge)
    for index, expected in enumerate(golden["tests"]):
        key = Key(task.id, index)
        assert [rows_of(one.grid) for one in found[key]] == expected["answers_by_view"]
        assert [one.q for one in found[key]] == pytest.approx(expected["q_by_view"], abs=0.01)
        own = ranked[key]
        two = [rows_of(grid) for grid in attempts(own, task.test[index].input)]
        assert two == expected["attempts"]
        for one, before in zip(own, expected["ranking"], strict=True):
            assert rows_of(one.grid) == before["grid"]
            assert (one.votes, set(one.broken)) == (before["votes"], set(before["broken"]))
            for name in ("reader_scores", "inverse_scores"):
                assert list(getattr(one, name)) == pytest.approx(before[name], abs=SCORE)


@pytest.mark.slow
def test_evaluation_solves_what_the_weights_are_known_to_solve(tmp_path):
    known = ("59341089", "66e6c45b", "e133d23d")
    scores = evaluate(
        EvalConfig.model_validate(
            {
                "out": tmp_path,
                "evaluation": {"tasks": known},
                "inference": {"views": 3, "dtype": "float32"},
            }
        )
    )
    assert scores is not None
    assert scores.task_fraction[2] == 1.0
