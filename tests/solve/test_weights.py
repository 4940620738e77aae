"""Which tasks weights know, who answers with them, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from arctrm.checkpoints import export_bundle, latest_checkpoint, read_meta, read_model
from arctrm.config import InferenceConfig, JointConfig, TaskChoiceConfig
from arctrm.data.task import Pair, Task
from arctrm.data.views import IDENTITY
from arctrm.errors import CheckpointError, ConfigError
from arctrm.model.layout import Condition
from arctrm.model.trunk import TASK_TABLES
from arctrm.solve.propose import refine
from arctrm.solve.questions import questions
from arctrm.solve.weights import load_solver, weights_fingerprint

CPU = torch.device("cpu")
REFERENCE = Path(__file__).parents[1] / "fixtures" / "trm_reference_small.safetensors"


def load(path: Path | None, **inference):
    return load_solver(path, InferenceConfig(**{"dtype": "float32", **inference}), CPU)


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of a run, to damage."""
    return Path(shutil.copytree(trained.run, tmp_path / "copied"))


def edit_meta(run: Path, **changes) -> None:
    path = latest_checkpoint(run) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- which task is which


def test_a_task_is_known_by_its_demonstrations_and_not_by_its_id(solver, trained):
    ids = read_meta(latest_checkpoint(trained.run)).task_ids
    assert [solver.row_of(t) for t in trained.known] == [ids.index(t.id) for t in trained.known]
    known, other = trained.known[2], trained.others[0]
    row = solver.row_of(known)
    assert solver.row_of(replace(known, id="renamed")) == row
    assert solver.row_of(replace(known, demonstrations=known.demonstrations[::-1])) == row
    assert solver.row_of(replace(known, test=other.test)) == row
    assert solver.row_of(other) is None
    assert solver.row_of(replace(other, id=known.id)) is None
    assert solver.row_of(replace(known, demonstrations=known.demonstrations[1:])) is None
    first = known.demonstrations[0]
    changed = (Pair(first.input, (first.output + 1) % 10), *known.demonstrations[1:])
    assert solver.row_of(replace(known, demonstrations=changed)) is None


def test_what_the_weights_may_know_too_well_or_not_at_all_is_said(solver, trained):
    tasks = [*trained.known, *trained.others]
    own = TaskChoiceConfig(test_set=str(trained.folder))
    assert solver.notes_on(trained.known, own) == []
    (said,) = solver.notes_on(tasks, own)
    assert "3 of 7 tasks are not in the id map: answered from the mean embedding" in said
    said = solver.notes_on(trained.known, TaskChoiceConfig(test_set="evaluation"))
    assert "4 tasks may be scored on pairs that training saw" in said[0]
    held_out = replace(solver, held_out=10)
    assert not held_out.notes_on(trained.known, TaskChoiceConfig(test_set="training", held_out=5))


# -- weights


def test_the_moving_average_answers_and_behind_it_stands_the_mean_of_the_tasks(solver, trained):
    folder = latest_checkpoint(trained.run)
    average, last = read_model(folder), read_model(folder, ema=False)
    state = solver.model.state_dict()
    for name, tensor in state.items():
        expected = average[f"trunk.{name}"]
        if name in TASK_TABLES:
            torch.testing.assert_close(tensor[-1], expected.mean(0))
            tensor = tensor[:-1]
        assert torch.equal(tensor, expected), name
    assert not torch.equal(state["norm"], last["trunk.norm"])
    assert solver.mean_row == len(trained.known)
    # The trunk counts its tasks, and takes an inverse vector from behind them.
    rows = torch.tensor([Condition(solver.mean_row), Condition(0, inverse=1)])
    forward, inverse = solver.model.condition(rows)
    torch.testing.assert_close(forward - state["dihedral_emb"][0] - state["colours_emb"][0],
                               state["task_emb"][-1])  # fmt: skip
    torch.testing.assert_close(inverse - state["dihedral_emb"][0] - state["colours_emb"][0],
                               state["inverse_emb"][0])  # fmt: skip


def test_run_checkpoint_and_bundle_folders_hold_the_same_tasks(solver, trained, tmp_path):
    folder = latest_checkpoint(trained.run)
    same, bundle = load(folder), load(export_bundle(folder, tmp_path / "bundle"))
    for other in (same, bundle):
        assert other.rows == solver.rows
        assert other.voices == ("reader", "trm")
    assert weights_fingerprint(same.model) == weights_fingerprint(solver.model)
    assert weights_fingerprint(bundle.model) != weights_fingerprint(solver.model)


def test_voices_compute_in_the_dtype_that_is_asked_for(trained):
    wide, narrow = load(trained.run), load(trained.run, dtype="bfloat16")
    assert (wide.reader.dtype, narrow.reader.dtype) == (torch.float32, torch.bfloat16)
    assert narrow.refiner.trunk.dtype == torch.bfloat16
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}  # to be trained
    assert weights_fingerprint(narrow.model) == weights_fingerprint(wide.model)


def test_only_voices_that_were_trained_answer(copied):
    edit_meta(copied, voices=["reader"])
    alone = load(copied)
    assert (alone.refiner, alone.speaks_both, alone.reader.asks_inverse) == (None, False, True)
    edit_meta(copied, voices=["trm"])
    alone = load(copied)
    assert (alone.reader, alone.refiner.halt_max_steps) == (None, 3)


# -- a hub reader


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_a_hub_checkpoint_answers_with_its_reader_adapters_and_trm(trained, tmp_path, mode):
    from arctrm.train.run import joint
    from hub_models import save_model

    model, run = save_model(tmp_path / "model"), tmp_path / "run"
    folder = str(trained.folder)
    joint(
        JointConfig.model_validate(
            {
                "out": run,
                "llama_model": str(model),
                "hub": {"mode": mode, "max_tokens": 900, "max_pairs": 3},
                "data": {"subsets": [folder], "test_set": folder},
                "trunk": {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "loops": 2},
                "trm": {"halt_max_steps": 2},
                "coupling": {
                    "adapter_heads": 2,
                    "num_context_slots": 4,
                    "reader_tokens_per_batch": 1024,
                },
                "training": {
                    "tokens_per_batch": 4096,
                    "schedule": {"max_steps": 2, "warmup_steps": 1},
                },
            }
        )
    )
    solver = load(run)
    assert (solver.reads_pairs, solver.voices) == (True, ("reader", "trm"))
    stored = read_model(latest_checkpoint(run))
    for name, tensor in solver.reader.pretrained.state_dict().items():
        assert torch.equal(tensor, stored[f"hub.{name}"])
    assert bool(solver.reader.pretrained.state_dict()) == (mode == "full")
    (asked, *_) = questions(solver, trained.known[0], 2, seed=0)
    assert len(asked.pairs) == len(trained.known[0].demonstrations)
    draft = np.full((2, 2), 3, np.uint8)
    heard, deaf = (
        refine(who, [asked], [draft], num_steps=2)
        for who in (solver.refiner, solver.speakers.alone)
    )
    assert any(abs(a.log_p - b.log_p) > 1e-5 for a, b in zip(heard, deaf, strict=True))
    model.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"set inference\.llama_model to where the model is"):
        load(run)
    assert load(run, llama_model=str(tmp_path / "moved")).reader.name == str(tmp_path / "moved")


# -- published checkpoints


@pytest.fixture
def published(tmp_path) -> Path:
    """A checkpoint file of nine embeddings as TRM's authors write it, and its identifiers."""
    with safe_open(REFERENCE, "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118
        weights = {name.removeprefix("weights."): file.get_tensor(name) for name in names}
    path = tmp_path / "step_100"
    torch.save(weights, path)
    task = "00576224"
    names = ["<blank>", task, *(f"{task}|||t{turn}|||0213456789" for turn in range(1, 8))]
    (tmp_path / "identifiers.json").write_text(json.dumps(names))
    return path


def test_a_published_file_is_asked_under_its_own_views(published, small_tasks):
    solver = load(published)
    assert (solver.reader, solver.speaks_both, solver.voices) == (None, False, ("trm",))
    asked = questions(solver, replace(small_tasks[0], id="00576224"), 100, seed=0)
    assert [one.condition.task for one in asked][:: len(small_tasks[0].test)] == list(range(1, 9))
    assert asked[0].view == IDENTITY
    assert asked[-1].view.colours == (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)
    assert questions(solver, Task("someone", (), small_tasks[0].test), 100, seed=0) == []
    (said,) = solver.notes_on([Task("someone", ())], TaskChoiceConfig())
    assert "not answered" in said


# -- refusals


def test_what_is_no_checkpoint_is_refused(tmp_path, trained):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"hello")
    for given in (tmp_path / "nowhere", tmp_path, path):
        with pytest.raises(CheckpointError, match=rf"^{given}: "):
            load(given)
    with pytest.raises(CheckpointError, match="one file of a checkpoint; give its folder"):
        load(latest_checkpoint(trained.run) / "model.safetensors")


def test_pickled_code_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError):
        load(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("hidden_size", 64, "shape"), ("num_layers", 2, "missing"), ("hidden_size", 33, "33")],
)
def test_a_configuration_that_is_not_the_weights_is_refused(copied, key, value, said):
    config = read_meta(latest_checkpoint(copied)).config
    edit_meta(copied, config=config | {"trunk": config["trunk"] | {key: value}})
    with pytest.raises(CheckpointError, match=said) as refused:
        load(copied)
    assert "step_000000" in str(refused.value)


def test_a_place_for_a_hub_reader_is_refused_where_there_is_none(trained):
    with pytest.raises(ConfigError, match=r"inference\.llama_model: .*holds no hub reader"):
        load(trained.run, llama_model="a/b")
