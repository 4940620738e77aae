"""Which tasks a checkpoint knows, whose embedding is whose, and which checkpoints are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arctrm.config import DataConfig, InferenceConfig, TRMConfig
from arctrm.data.build import prepare
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.data.views import IDENTITY, View, fixed_colours, transform
from arctrm.errors import CheckpointError
from arctrm.solving.candidates import refined, task_queries
from arctrm.solving.weights import BUNDLED, load_solver
from arctrm.training.checkpoints import export_bundle, latest_checkpoint, read_meta, read_model
from arctrm.training.stream import COLOURS, DIHEDRAL, EMBEDDING, PairStream

CPU = torch.device("cpu")


def load(path: Path | None):
    return load_solver(path, InferenceConfig(), CPU)


@pytest.fixture(scope="module")
def solver(trained):
    return load(trained.run)


@pytest.fixture(scope="module")
def per_view_solver(trained_per_view):
    return load(trained_per_view)


def edit_meta(run: Path, **changes) -> None:
    path = latest_checkpoint(run) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- which task is which


def test_every_trained_task_has_its_own_row(solver, trained):
    ids = read_meta(latest_checkpoint(trained.run)).task_ids
    assert [solver.row_of(task) for task in trained.known] == [
        ids.index(task.id) for task in trained.known
    ]


def test_a_task_is_known_by_its_demonstrations_and_not_by_its_id(solver, trained):
    known, other = trained.known[2], trained.others[0]
    row = solver.row_of(known)
    assert row is not None
    assert solver.row_of(replace(known, id="renamed")) == row
    assert solver.row_of(replace(known, demonstrations=known.demonstrations[::-1])) == row
    assert solver.row_of(replace(known, test=other.test)) == row
    assert solver.row_of(other) is None
    assert solver.row_of(replace(other, id=known.id)) is None
    assert solver.row_of(replace(known, demonstrations=known.demonstrations[1:])) is None


def test_every_bundled_task_would_be_recognised_by_the_model_that_trained_on_it():
    subsets = {name: load_tasks(name) for name in ("training", "evaluation")}
    base = base_set_from_tasks(subsets, "evaluation", 0)
    recorded = dict(zip(base.meta.task_ids, base.task_fingerprints(), strict=True))
    tasks = [task for subset in subsets.values() for task in subset]
    assert recorded == {task.id: task.fingerprint() for task in tasks}


def test_more_pairs_of_a_task_from_another_source_do_not_hide_it(small_tasks):
    """RE-ARC brings a hundred pairs under the id of an ARC task."""
    task, extra = small_tasks[:2]
    more = Task(task.id, extra.demonstrations)
    base = base_set_from_tasks({"training": [task], "re_arc": [more]}, None, 0)
    assert base.task_fingerprints() == [task.fingerprint()]


def test_a_checkpoint_without_recorded_content_knows_tasks_by_id(copied_run, trained):
    edit_meta(copied_run, notes={})
    solver, known = load(copied_run), trained.known[1]
    assert solver.row_of(known) == 1
    assert solver.row_of(replace(trained.others[0], id=known.id)) == 1
    assert solver.row_of(replace(known, id="renamed")) is None


# -- weights


def test_the_moving_average_answers(solver, trained):
    folder = latest_checkpoint(trained.run)
    average, last = read_model(folder, ema=True), read_model(folder, ema=False)
    name = "L_level.layers.0.mlp.down_proj.weight"
    got = solver.trm.state_dict()[name]
    assert torch.equal(got, average[name])
    assert not torch.equal(got, last[name])


def test_the_last_embedding_is_the_mean_of_the_trained_ones(solver, trained):
    trained_rows = read_model(latest_checkpoint(trained.run), ema=True)["puzzle_emb.weights"]
    weights = solver.trm.puzzle_emb.weights
    assert solver.mean_row == len(trained.known)
    assert weights.shape[0] == len(trained.known) + 1
    assert torch.equal(weights[:-1], trained_rows)
    torch.testing.assert_close(weights[solver.mean_row], trained_rows.mean(0))
    assert not torch.equal(weights[0], weights[1])


def test_nothing_of_a_loaded_model_collects_gradients(solver):
    assert not any(parameter.requires_grad for parameter in solver.trm.parameters())


def test_run_checkpoint_and_bundle_folders_hold_the_same_solver(solver, trained, tmp_path):
    folder = latest_checkpoint(trained.run)
    bundle = export_bundle(folder, tmp_path / "bundle", torch.float32)
    for other in (load(folder), load(bundle)):
        assert other.rows == solver.rows
        assert other.by_content
        for name, tensor in solver.trm.state_dict().items():
            assert torch.equal(other.trm.state_dict()[name], tensor)


def test_parameters_are_float32_whatever_the_bundle_and_the_arithmetic(trained, tmp_path):
    bundle = export_bundle(latest_checkpoint(trained.run), tmp_path / "bundle", torch.bfloat16)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        trm = load_solver(bundle, InferenceConfig(dtype=name), CPU).trm
        assert {parameter.dtype for parameter in trm.parameters()} == {torch.float32}
        assert trm.dtype == dtype


def test_an_8_bit_bundle_of_a_trm_answers_as_the_one_of_bfloat16(trained, tmp_path):
    checkpoint, inference = latest_checkpoint(trained.run), InferenceConfig(dtype="float32")
    wide, narrow = (
        load_solver(export_bundle(checkpoint, tmp_path / str(bits), bits=bits), inference, CPU)
        for bits in (16, 8)
    )
    queries = [q for task in trained.known for q in task_queries(wide, task, 4, 0)]
    answers = []
    for solver in (wide, narrow):
        found = refined(solver, queries, inference)
        codes = np.concatenate([own.codes for own in found])
        answers.append((codes, np.array([own.q_halt for own in found])))
    assert (answers[0][0] == answers[1][0]).mean() > 0.97
    np.testing.assert_allclose(answers[0][1], answers[1][1], atol=0.1)
    assert not np.array_equal(answers[0][1], answers[1][1])


# -- one embedding per view


def test_per_view_models_are_asked_exactly_what_training_drew(
    trained_per_view, per_view_solver, trained
):
    meta = read_meta(latest_checkpoint(trained_per_view))
    data = DataConfig.model_validate(meta.config["data"])
    base = prepare(data)
    config = TRMConfig.model_validate(meta.config["trm"])
    rows = PairStream(base, data, config, meta.config["seed"], CPU).draw(3000)
    drawn = {
        int(row[EMBEDDING]): View(int(row[DIHEDRAL]), tuple(row[COLOURS].tolist())) for row in rows
    }
    asked = [pair for task in trained.known for pair in per_view_solver.views_of(task, 100)]
    assert {row: view for view, row in asked} == drawn
    assert len(asked) == len(drawn) == 8 * len(trained.known)


def test_per_view_models_begin_with_the_identity_and_stop_at_the_asked_count(
    per_view_solver, trained
):
    for row, task in enumerate(trained.known):
        views = per_view_solver.views_of(task, 3)
        assert [number for _, number in views] == [8 * row, 8 * row + 1, 8 * row + 2]
        assert views[0][0] == IDENTITY
        fixed = np.flatnonzero(fixed_colours(task))
        assert all(view.colours[colour] == colour for view, _ in views for colour in fixed)


def test_per_view_models_have_no_view_of_an_unknown_task(per_view_solver, trained):
    assert per_view_solver.views_of(trained.others[0], 8) == []


def test_shared_models_answer_any_view(solver, trained):
    assert solver.views_of(trained.known[0], 8) is None


# -- reference checkpoints


def test_a_reference_file_gets_views_and_rows_from_its_identifiers(reference_file):
    solver = load(reference_file)
    task = Task("00576224", ())
    views = solver.views_of(task, 100)
    assert [row for _, row in views] == list(range(1, 9))
    assert views[0][0] == IDENTITY
    assert [view.dihedral for view, _ in views] == list(range(8))
    assert views[3][0].colours == (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)
    assert solver.row_of(task) == 1
    assert solver.views_of(Task("someone", ()), 100) == []
    assert solver.trm.config.layout == "reference"


def test_dihedral_numbers_mean_what_the_reference_means():
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    reference = [
        grid,
        np.rot90(grid, k=1),
        np.rot90(grid, k=2),
        np.rot90(grid, k=3),
        np.fliplr(grid),
        np.flipud(grid),
        grid.T,
        np.fliplr(np.rot90(grid, k=1)),
    ]
    for number, expected in enumerate(reference):
        assert np.array_equal(transform(grid, number), expected)


@pytest.mark.parametrize(
    ("identifiers", "said"),
    [
        (None, "needs the identifiers.json"),
        ("{", "cannot be read"),
        (json.dumps(["<blank>", "00576224"]), "lists 2 embeddings, step_100 holds 9"),
        (json.dumps({"00576224": 1}), "identifiers.json"),
        ("7", "identifiers.json"),
        (json.dumps(["<blank>"] * 8 + ["00576224|||t3"]), "t3"),
        (json.dumps(["<blank>"] * 8 + ["00576224|||t9|||0123456789"]), "t9|||0123456789"),
        (json.dumps(["<blank>"] * 8 + ["00576224|||t-1|||0123456789"]), "t-1|||0123456789"),
        (json.dumps(["<blank>"] * 8 + ["00576224|||t3|||0123"]), "t3|||0123"),
        (json.dumps(["<blank>"] * 8 + ["00576224|||t3|||0113456789"]), "t3|||0113456789"),
        (json.dumps(["<blank>"] * 8 + ["00576224|||t3|||012345678x"]), "t3|||012345678x"),
        (json.dumps(["<blank>"] * 8 + ["00576224|||t3|||0123456789|||1"]), "|||1"),
    ],
)
def test_a_reference_file_without_the_right_identifiers_is_refused(
    reference_file, identifiers, said
):
    path = reference_file.with_name("identifiers.json")
    path.unlink()
    if identifiers is not None:
        path.write_text(identifiers)
    with pytest.raises(CheckpointError) as refused:
        load(reference_file)
    assert said in str(refused.value)
    assert "identifiers.json" in str(refused.value)
    assert "\n" not in str(refused.value)


# -- refusals


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: not a folder; give a run folder"):
        load(tmp_path / "nowhere")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"{}",
        b"PK\x03\x04",
        bytes(range(256)),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        load(path)


def test_a_file_of_other_objects_is_refused(tmp_path):
    for name, content in {"a": {"x": 1}, "b": [torch.zeros(2)], "c": {"x": torch.zeros(2)}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError):
            load(tmp_path / name)


def test_pickled_code_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError):
        load(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_model_is_refused(copied_run):
    path = latest_checkpoint(copied_run) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated \(\d+ bytes"):
        load(copied_run)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", 64, "shape"),
        ("num_layers", 2, "missing"),
        ("num_prefix_slots", 9, "slots.weights"),
        ("layout", "spiral", r"trm\.layout = 'spiral'"),
        ("hidden_size", 33, "33 is not a multiple of"),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_refused(copied_run, key, value, said):
    config = read_meta(latest_checkpoint(copied_run)).config
    edit_meta(copied_run, config=config | {"trm": config["trm"] | {key: value}})
    with pytest.raises(CheckpointError, match=said) as refused:
        load(copied_run)
    assert "step_00000030" in str(refused.value)


def test_an_id_map_of_another_size_than_the_embeddings_is_refused(copied_run):
    ids = read_meta(latest_checkpoint(copied_run)).task_ids
    edit_meta(copied_run, task_ids=ids[:-1])
    with pytest.raises(CheckpointError):
        load(copied_run)


def test_recorded_content_of_another_number_of_tasks_is_refused(copied_run):
    notes = read_meta(latest_checkpoint(copied_run)).notes
    edit_meta(copied_run, notes={"task_fingerprints": notes["task_fingerprints"][:-1]})
    with pytest.raises(CheckpointError):
        load(copied_run)


def test_a_configuration_of_something_else_is_refused(copied_run):
    edit_meta(copied_run, config={"model": "llama"})
    with pytest.raises(CheckpointError, match="arctrm pretrain"):
        load(copied_run)


@pytest.mark.skipif(not (BUNDLED / "checkpoint.json").is_file(), reason="no bundled weights")
def test_without_a_checkpoint_the_bundled_weights_answer():
    solver = load(None)
    assert solver.by_content
    assert any(solver.row_of(task) is not None for task in load_tasks("training", max_tasks=5))


def test_a_changed_demonstration_makes_another_task(solver, trained):
    task = trained.known[0]
    pair = task.demonstrations[0]
    changed = Pair(pair.input, (pair.output + 1) % 10)
    assert solver.row_of(replace(task, demonstrations=(changed, *task.demonstrations[1:]))) is None
