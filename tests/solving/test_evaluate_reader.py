"""`eval` of a tiny reader's checkpoint on real tasks, and what is refused of such a checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from arctrm.config import EvalConfig, InferenceConfig
from arctrm.data.task import Pair
from arctrm.errors import CheckpointError
from arctrm.reader.interface import left_padded
from arctrm.solving.evaluate import describe, run
from arctrm.solving.kept import KEPT, read_candidates
from arctrm.solving.reading import task_readings
from arctrm.solving.submission import check_complete, read_submission
from arctrm.solving.weights import load_solver
from arctrm.training.checkpoints import export_bundle, latest_checkpoint, read_meta, read_model

CPU = torch.device("cpu")
NUM_TASKS = 3


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory, write_tasks) -> Path:
    """Two tasks that the reader knows, with answers, and one that it does not."""
    tasks = [*trained.known[: NUM_TASKS - 1], trained.others[0]]
    return write_tasks(tmp_path_factory.mktemp("tasks"), tasks)


@pytest.fixture(scope="module")
def tasks(trained):
    chosen = [*trained.known[: NUM_TASKS - 1], trained.others[0]]
    return sorted(chosen, key=lambda task: task.id)


def config(checkpoint, folder, views=3, seed=0, blank=False, **reader) -> EvalConfig:
    return EvalConfig.model_validate(
        {
            "seed": seed,
            "checkpoint": checkpoint,
            "evaluation": {"test_set": str(folder)},
            "inference": {"views": views, "dtype": "float32", "blank_task_embedding": blank},
            "reader": {"rank": "votes", **reader},
        }
    )


@pytest.fixture(scope="module")
def evaluated(tiny_reader, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "out"
    return run(config(tiny_reader, folder), out), out


def submitted(out):
    return (out / "submission.json").read_bytes()


# -- what it writes


def test_scores_and_submission_are_those_of_any_checkpoint(evaluated, tasks, tiny_reader):
    scores, out = evaluated
    written = json.loads((out / "scores.json").read_text())
    for name in ("task_fraction", "pair_fraction", "whole_task"):
        assert list(written[name]) == ["pass@1", "pass@2", "pass@10"]
        assert written[name]["pass@2"] == getattr(scores, name)[2]
    assert written["checkpoint"].startswith(str(tiny_reader))
    assert written["steps"] is None  # there is no TRM
    assert written["reader"]["rank"] == "votes"
    assert set(written["tasks"]) == {task.id for task in tasks}
    check_complete(json.loads((out / "submission.json").read_text()), tasks)
    answers = read_submission(out / "submission.json")
    inputs = {task.id: [pair.input for pair in task.test] for task in tasks}
    decoded = [
        grid
        for name, grids in answers.items()
        for pair, query in zip(grids, inputs[name], strict=True)
        for grid in pair
        if not np.array_equal(grid, query)
    ]
    assert decoded  # not only the fallback


def test_kept_candidates_are_what_was_submitted_and_who_proposed_it(
    evaluated, tasks, tiny_reader, folder, tmp_path
):
    asked = config(tiny_reader, folder, rank="experts", scoring_views=2)
    keep = asked.evaluation.model_copy(update={"keep_candidates": True})
    run(asked.model_copy(update={"evaluation": keep}), tmp_path / "out")
    kept = read_candidates(tmp_path / "out" / KEPT)
    answers = read_submission(tmp_path / "out" / "submission.json")
    assert kept.keys() == {task.id for task in tasks}
    found = [
        (own, attempts)
        for name, inputs in kept.items()
        for own, attempts in zip(inputs, answers[name], strict=True)
        if own
    ]
    assert found
    for own, attempts in found:
        for one, grid in zip((own[0], own[min(1, len(own) - 1)]), attempts, strict=True):
            assert np.array_equal(one.grid, grid)
        views = [view for one in own for view in one.views_by["reader"]]
        assert sorted(views) == sorted(set(views))
        assert set(views) <= set(range(3))
        assert all(len(one.reader_scores) == 2 for one in own)
    assert not (evaluated[1] / KEPT).exists()


def test_the_same_seed_writes_the_same_submission(evaluated, tiny_reader, folder, tmp_path):
    run(config(tiny_reader, folder, batch_size=1), tmp_path / "same")
    assert submitted(tmp_path / "same") == submitted(evaluated[1])


def test_test_outputs_change_the_scores_and_nothing_else(
    evaluated, tasks, tiny_reader, tmp_path, write_tasks
):
    answers = read_submission(evaluated[1] / "submission.json")
    tampered = [
        replace(
            task,
            test=tuple(
                Pair(pair.input, grids[0])
                for pair, grids in zip(task.test, answers[task.id], strict=True)
            ),
        )
        for task in tasks
    ]
    folder = write_tasks(tmp_path / "tampered", tampered)
    again = run(config(tiny_reader, folder), tmp_path / "out")
    assert submitted(tmp_path / "out") == submitted(evaluated[1])
    assert again.task_fraction[1] > evaluated[0].task_fraction[1]


def test_experts_and_thresholds_answer_every_test_input(tiny_reader, folder, tasks, tmp_path):
    settings = config(
        tiny_reader,
        folder,
        rank="experts",
        scoring_views=2,
        scored_candidates=3,
        min_probability=0.2,
    )
    run(settings, tmp_path)
    check_complete(json.loads((tmp_path / "submission.json").read_text()), tasks)
    written = json.loads((tmp_path / "scores.json").read_text())["reader"]
    assert (written["rank"], written["min_probability"]) == ("experts", 0.2)


def test_unknown_tasks_are_answered_from_the_mean_and_said_to_be(
    tiny_reader, folder, tmp_path, capsys
):
    run(config(tiny_reader, folder, views=1), tmp_path)
    assert "1 of 3 tasks are not in the id map" in " ".join(capsys.readouterr().err.split())


def test_a_blank_task_embedding_hides_the_task_from_the_reader(tiny_reader, trained):
    whole, blank = (
        load_solver(
            tiny_reader, InferenceConfig(dtype="float32", blank_task_embedding=hidden), CPU
        ).reader
        for hidden in (False, True)
    )
    assert whole.puzzle_emb.weights.abs().min() > 0
    assert blank.puzzle_emb.weights.abs().max() == 0
    assert torch.equal(whole.dihedral_emb.weights, blank.dihedral_emb.weights)


def test_a_dry_run_counts_and_names_no_steps(tiny_reader, folder, tasks, tmp_path):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(describe(config(tiny_reader, folder, views=7), tmp_path))
    text = console.export_text()
    assert f"{7 * sum(len(task.test) for task in tasks)} (7 views)" in text
    assert "supervision steps" not in text


def test_a_reader_of_whole_tasks_answers_too(trained_reader, folder, tasks, tmp_path):
    out = trained_reader(steps=4, sequence="task", max_tokens=2048, num_layers=1)
    run(config(out, folder, views=2), tmp_path)
    check_complete(json.loads((tmp_path / "submission.json").read_text()), tasks)


# -- 8-bit bundles


def logits_of(solver, task):
    readings = task_readings(solver, task, 4, 0)
    tokens, positions, mask = left_padded([r.prompt for r in readings])
    condition = torch.tensor([r.prompt.condition for r in readings])
    cache = solver.reader.new_cache(tokens.shape[1])
    with torch.no_grad():
        logits = solver.reader.logits(tokens, positions, condition, mask, cache)
    return logits[mask.bool()]


def test_an_8_bit_bundle_gives_nearly_the_logits_of_bfloat16(tiny_reader, trained, tmp_path):
    checkpoint = latest_checkpoint(tiny_reader)
    inference = InferenceConfig(dtype="float32")
    exact, wide, narrow = (
        load_solver(path, inference, CPU)
        for path in (
            checkpoint,
            export_bundle(checkpoint, tmp_path / "16"),
            export_bundle(checkpoint, tmp_path / "8", bits=8),
        )
    )
    for parameter in narrow.reader.parameters():
        assert parameter.dtype == torch.float32
    for task in trained.known:
        logits = logits_of(wide, task)
        assert not torch.equal(logits, logits_of(exact, task))
        error = (logits_of(narrow, task) - logits).square().mean().sqrt()
        assert error < 0.02 * logits.std()


def test_an_8_bit_bundle_answers_nearly_as_the_run_did(evaluated, tiny_reader, folder, tmp_path):
    bundle = export_bundle(latest_checkpoint(tiny_reader), tmp_path / "8", bits=8)
    run(config(bundle, folder), tmp_path / "out")
    before, after = (
        read_submission(out / "submission.json") for out in (evaluated[1], tmp_path / "out")
    )
    first = [
        np.array_equal(a[0], b[0])
        for name in before
        for a, b in zip(before[name], after[name], strict=True)
    ]
    assert np.mean(first) > 0.5


# -- what is refused


@pytest.fixture
def copied(tiny_reader, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_reader, tmp_path / "copied"))


def edit_meta(folder: Path, **changes) -> None:
    path = latest_checkpoint(folder) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(path):
    return load_solver(path, InferenceConfig(), CPU)


def test_every_weight_of_a_checkpoint_is_loaded_as_it_is(tiny_reader):
    saved = read_model(latest_checkpoint(tiny_reader), ema=True)
    loaded = load_solver(tiny_reader, InferenceConfig(dtype="float32"), CPU).reader.state_dict()
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        got = loaded[name][:-1] if name == "puzzle_emb.weights" else loaded[name]
        assert torch.equal(got, tensor), name


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", 64, "has shape"),
        ("num_layers", 3, r"tensors missing, first 'llama\.model\.layers\.2\."),
        ("num_layers", 1, r"unexpected, first 'llama\.model\.layers\.1\."),
        ("expansion", 5.0, "has shape"),
        ("hidden_size", 33, "33 is not a multiple of"),
        ("sequence", "novel", r"reader\.sequence = 'novel'"),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_refused(copied, key, value, said):
    before = read_meta(latest_checkpoint(copied)).config
    edit_meta(copied, config=before | {"reader": before["reader"] | {key: value}})
    with pytest.raises(CheckpointError, match=said) as caught:
        load(copied)
    assert "\n" not in str(caught.value)


def test_a_reader_is_not_loaded_as_a_trm_nor_a_trm_as_a_reader(copied, copied_run):
    for folder, model in ((copied, "trm"), (copied_run, "reader")):
        edit_meta(folder, config=read_meta(latest_checkpoint(folder)).config | {"model": model})
        with pytest.raises(CheckpointError, match=r"tensors missing, first .* unexpected, first"):
            load(folder)


def test_an_id_map_of_another_size_is_refused(copied):
    meta = read_meta(latest_checkpoint(copied))
    notes = {"task_fingerprints": meta.notes["task_fingerprints"][:-1]}
    edit_meta(copied, task_ids=meta.task_ids[:-1], notes=notes)
    with pytest.raises(CheckpointError, match=r"'puzzle_emb\.weights' has shape"):
        load(copied)
