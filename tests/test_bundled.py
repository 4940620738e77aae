"""The weights in the box are what their card says."""

from pathlib import Path

import pytest
import torch

import arctrm
from arctrm.config import EvalConfig, InferenceConfig
from arctrm.data.sources import load_tasks
from arctrm.solving import evaluate
from arctrm.solving.weights import load_solver
from arctrm.training.checkpoints import read_meta

BUNDLED = Path(arctrm.__file__).parent / "bundled"
CARD = (BUNDLED / "README.md").read_text()


def test_the_bundle_stays_small():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 40 * 2**20


def test_the_card_names_the_data_and_the_step_of_the_checkpoint():
    meta = read_meta(BUNDLED)
    assert meta.data_fingerprint[:12] in CARD
    assert f"{meta.step:,}" in CARD
    assert meta.config["data"]["test_set"] == "evaluation"


def test_every_evaluation_task_is_known_by_its_demonstrations():
    solver = load_solver(None, InferenceConfig(), torch.device("cpu"))
    tasks = load_tasks("evaluation")
    rows = {solver.row_of(task) for task in tasks}
    assert None not in rows
    assert len(rows) == len(tasks)
    assert solver.row_of(load_tasks("arc2:0934a4d8")[0]) is not None  # also an ARC-AGI-1 task


@pytest.mark.slow
def test_evaluation_solves_what_the_weights_are_known_to_solve(tmp_path):
    known = ("59341089", "66e6c45b", "e133d23d")
    config = EvalConfig.model_validate(
        {"evaluation": {"tasks": known}, "inference": {"views": 3, "dtype": "float32"}}
    )
    scores = evaluate.run(config, tmp_path)
    assert scores is not None
    assert scores.task_fraction[2] == 1.0
