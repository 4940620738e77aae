"""`eval` and `solve` of hybrids with a hub reader: a small random model stands for the real one."""

import json
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_models import save_model
from hub_runs import CPU, NO_PATH, QUICK, config

from arctrm.config import BaselineConfig, EvalConfig
from arctrm.errors import ArctrmError
from arctrm.reader.prompts import pairs_prompt, viewed
from arctrm.solving import evaluate, rounds
from arctrm.solving.anytime import solve_task
from arctrm.solving.baseline import run as baseline
from arctrm.solving.pace import Pace
from arctrm.solving.planning import RowsOfTask
from arctrm.solving.reading import task_readings
from arctrm.solving.vote import is_well_formed
from arctrm.solving.weights import load_solver
from arctrm.training.checkpoints import latest_checkpoint, read_model


@pytest.fixture(scope="module")
def solver(joined_hub):
    return load_solver(joined_hub(), config().inference, CPU)


def refused(checkpoint, **inference):
    """The one sentence of a refusal to load."""
    settings = config(inference={**QUICK, **inference}).inference
    with pytest.raises(ArctrmError) as caught:
        load_solver(checkpoint, settings, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- loading


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_the_trained_weights_are_those_that_answer(joined_hub, mode):
    run = joined_hub(mode)
    weights = read_model(latest_checkpoint(run), ema=True)
    loaded = load_solver(run, config().inference, CPU).model
    state = loaded.state_dict()
    assert set(state) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(state[name][: len(tensor)], tensor), name  # then the mean embedding
    of_model = dict(loaded.hub.model.named_parameters())
    trained = [n for n in weights if n.startswith("reader.pretrained.")]
    assert bool(trained) == (mode != "frozen")
    for name in trained:
        assert torch.equal(of_model[name.removeprefix("reader.pretrained.")], weights[name])


def test_a_model_that_is_gone_is_one_sentence_and_may_be_named_anew(
    joined_hub, hub_model, tmp_path
):
    moved = Path(shutil.copytree(hub_model, tmp_path / "moved"))
    run = Path(shutil.copytree(joined_hub(), tmp_path / "run"))
    meta = latest_checkpoint(run) / "checkpoint.json"
    content = json.loads(meta.read_text())
    content["config"]["hub"] |= {"name": "/nowhere/model", "trust_remote_code": True}
    meta.write_text(json.dumps(content))
    text = refused(run)
    assert "/nowhere/model: there is no such folder" in text
    assert "set inference.llama_model" in text
    settings = config(inference={**QUICK, "llama_model": str(moved)}).inference
    found = load_solver(run, settings, CPU)
    assert found.hub.name == str(moved)
    assert not found.hub.config.trust_remote_code  # not the checkpoint's to say


def test_a_model_of_another_width_is_refused_before_its_weights_are_read(joined_hub, tmp_path):
    wide = save_model(tmp_path / "wide", hidden_size=64, max_position_embeddings=4096)
    (wide / "model.safetensors").unlink()
    text = refused(joined_hub(), llama_model=str(wide))
    assert "a reader of width 32, this reader has width 64" in text


def test_a_model_with_other_layers_or_too_few_positions_is_refused(joined_hub, tmp_path):
    deep = save_model(tmp_path / "deep", num_hidden_layers=3, max_position_embeddings=4096)
    assert "tensors missing, first 'reader.pretrained." in refused(
        joined_hub(), llama_model=str(deep)
    )
    short = save_model(tmp_path / "short", max_position_embeddings=1024)
    assert "holds 1024" in refused(joined_hub(), llama_model=str(short))


def test_a_checkpoint_without_a_hub_reader_takes_no_model(trained, hub_model):
    assert "holds no hub reader" in refused(trained.run, llama_model=str(hub_model))


# -- what is asked


def test_a_prompt_is_the_models_own_with_the_demonstrations_before_the_query(solver, trained):
    for task in (trained.known[0], trained.others[1]):
        for reading in task_readings(solver, task.without_answers(), 3, 0):
            query = reading.view.apply(reading.query)
            twos = permutations(viewed(task, reading.view), 2)  # reader.max_pairs with the query
            expected = [pairs_prompt(solver.hub.spelling, two, query, 4096).prompt for two in twos]
            (same,) = [p for p in expected if np.array_equal(p.tokens, reading.prompt.tokens)]
            assert np.array_equal(same.positions, reading.prompt.positions)
            assert same.output_start == reading.prompt.output_start


def test_the_text_of_a_problem_reads_as_the_tokens_of_its_prompt(solver, trained):
    rows = RowsOfTask(solver, trained.others[1].without_answers(), config())
    for text, reading in zip(rows.texts, rows.readings, strict=True):
        read = rows.module.reader.text_prompt(f"{text}\n\nwhat was wrong: size 3x3")
        assert np.array_equal(read.tokens, reading.prompt.tokens)
        assert read.output_start == reading.prompt.output_start


@torch.no_grad()
def test_the_planner_lets_it_write_grids_only_and_the_prefix_counts(solver, trained):
    rows = RowsOfTask(solver, trained.others[1].without_answers(), config())
    soft = torch.randn(len(rows.texts), 4, solver.hub.hidden_size)
    first, second = (rows.module.generate_latent(rows.texts, p, 12) for p in (None, soft))
    assert set("".join(first.text)) <= set("0123456789\n")
    assert not torch.equal(first.z_init, second.z_init)
    assert rows.refine(rows.drafts, soft)[1] != rows.refine(rows.drafts, None)[1]


# -- eval and solve


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_eval_pools_reader_trm_and_what_joins_them(joined_hub, trained, tmp_path, mode):
    settings = EvalConfig.model_validate(
        {
            "checkpoint": joined_hub(mode),
            "evaluation": {
                "test_set": str(trained.folder),
                "tasks": [trained.known[0].id],
                "ablate": ["no-reader", "swap-context"],
            },
            "inference": QUICK,
            "reader": {"rank": "experts", "scoring_views": 1, "scored_candidates": 2},
        }
    )
    evaluate.run(settings, tmp_path)
    assert set(json.loads((tmp_path / "submission.json").read_text())) == {trained.known[0].id}
    assert json.loads((tmp_path / "scores.json").read_text())["reader"]["rank"] == "experts"
    rows = json.loads((tmp_path / "ablations.json").read_text())
    assert list(rows) == ["everything", "no-reader", "swap-context"]


@pytest.mark.parametrize("coupled", [True, False])
def test_candidates_are_those_of_both_models(joined_hub, trained, coupled):
    solver = load_solver(joined_hub(**({} if coupled else NO_PATH)), config().inference, CPU)
    task, result = trained.known[1].without_answers(), rounds.Round()
    common = (solver, task, config(), Pace(60.0), lambda text: None)
    rounds.refine_views(result, rounds.read_views(result, *common), *common)
    candidates = result.candidates[task.id, 0]
    expected = {"reader", "hybrid"} if coupled else {"reader", "trm"}
    assert {candidate.source for candidate in candidates} == expected
    assert len(candidates) == 2 * QUICK["views"]


def test_solve_adapts_plans_and_answers_and_leaves_the_model_as_it_was(solver, trained):
    before = {name: tensor.clone() for name, tensor in solver.model.state_dict().items()}
    task = trained.others[1].without_answers()
    for solution in solve_task(solver, task, config()):
        assert [is_well_formed(grid) for grid in solution.attempts] == [True, True]
        assert solution.adaptation_steps == 2
        assert solution.history.total_attempts >= 1
        evidence = solution.evidence[0]
        assert evidence.votes == 0 or evidence.reader_score <= 0
    after = solver.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_baseline_asks_for_a_reader_that_stands_alone(joined_hub, trained, tmp_path):
    settings = BaselineConfig.model_validate(
        {"checkpoint": joined_hub(), "evaluation": {"test_set": str(trained.folder)}}
    )
    with pytest.raises(ArctrmError, match="no reader that baseline can ask"):
        baseline(settings, tmp_path / "results.json", False)
