"""Parts of a hybrid from checkpoints of their own: rows by content, strict about the rest."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from joint_parts import new_config, process, small_base, small_tasks
from runs import refused

from arctrm.config import PretrainConfig
from arctrm.data.dataset import base_set_from_tasks
from arctrm.errors import CheckpointError
from arctrm.training.checkpoint_meta import META
from arctrm.training.checkpoints import CheckpointMeta, model_tensors, write_checkpoint
from arctrm.training.joint import joint_stage, new_hybrid
from arctrm.training.stages import new_model
from arctrm.training.starting import starting_points

TRM_KEYS = ("hidden_size", "num_heads", "num_layers", "num_prefix_slots")


def pretrained(folder, kind, base, inverse_share=0.0, **changes):
    """A checkpoint of a random TRM or reader, as `pretrain` writes it."""
    joint = new_config({f"{kind}.{key}": value for key, value in changes.items()})
    reader = joint.reader.model_copy(update={"inverse_share": inverse_share})
    config = PretrainConfig(model=kind, trm=joint.trm, reader=reader)
    torch.manual_seed(3)
    model = new_model(config, base)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model, written(folder, model, config, base)


def written(folder, model, config, base):
    meta = CheckpointMeta(
        step=1,
        elapsed=1.0,
        examples=1,
        config=config.model_dump(mode="json"),
        task_ids=base.meta.task_ids,
        notes={"task_fingerprints": base.task_fingerprints()},
    )
    return write_checkpoint(folder, meta, model_tensors(model.state_dict()), {}, {})


def hybrid_checkpoint(folder, base, changes=None):
    config = new_config(changes)
    torch.manual_seed(4)
    hybrid = new_hybrid(config, base)
    for parameter in hybrid.parameters():
        torch.nn.init.normal_(parameter)
    return hybrid, written(folder, hybrid, config, base)


def started(changes, base):
    return joint_stage(new_config(changes), base, process()).model


def other_base():
    """Three of the tasks under other names and in another order, and one that is new."""
    old, new = small_tasks(), small_tasks(num_tasks=1, seed=9)
    tasks = [
        replace(old[2], id="a"),
        replace(new[0], id="b"),
        replace(old[0], id="c"),
        replace(old[3], id="task_1"),  # the name of another task
    ]
    return base_set_from_tasks({"training": tasks}, None, 50)


@pytest.mark.parametrize("kind", ["trm", "reader"])
def test_embeddings_follow_the_content_of_the_tasks(tmp_path, kind, capsys):
    model, path = pretrained(tmp_path / "run", kind, small_base())
    hybrid = started({f"{kind}_checkpoint": path}, other_base())
    part = getattr(hybrid, kind)
    there, here = model.puzzle_emb.weights, part.puzzle_emb.weights
    for row, old in ((0, 2), (2, 0), (3, 3)):
        assert torch.equal(here[row], there[old])
    torch.testing.assert_close(here[1], there.mean(0))
    assert "knows 3 of 4 tasks" in capsys.readouterr().err.replace("\n", " ")
    for name, tensor in model.state_dict().items():
        if "puzzle_emb" not in name:
            assert torch.equal(part.state_dict()[name], tensor), name


def test_the_vectors_of_inverse_tasks_follow_the_content_of_the_tasks_too(tmp_path):
    share = {"reader.inverse_share": 0.2}
    model, path = pretrained(tmp_path / "run", "reader", small_base(), inverse_share=0.2)
    hybrid = started({"reader_checkpoint": path, **share}, other_base())
    there, here = model.inverse_emb.weights, hybrid.reader.inverse_emb.weights
    for row, old in ((0, 2), (2, 0), (3, 3)):
        assert torch.equal(here[row], there[old])
    torch.testing.assert_close(here[1], there.mean(0))


@pytest.mark.parametrize("kind", ["trm", "reader"])
def test_the_vectors_of_scale_augmentation_are_taken_where_both_have_them(tmp_path, kind):
    """Joint training sees grids as they are: whether either has such vectors does not matter."""
    share = f"{kind}.scaling.share"
    with_scales, path = pretrained(tmp_path / "with", kind, small_base(), **{"scaling.share": 0.5})
    _, plain = pretrained(tmp_path / "without", kind, small_base())
    both = started({f"{kind}_checkpoint": path, share: 0.5}, small_base())
    assert torch.equal(getattr(both, kind).scale_emb.weights, with_scales.scale_emb.weights)
    dropped = getattr(started({f"{kind}_checkpoint": path}, small_base()), kind)
    assert not hasattr(dropped, "scale_emb")
    assert torch.equal(dropped.dihedral_emb.weights, with_scales.dihedral_emb.weights)
    fresh = getattr(started({f"{kind}_checkpoint": plain, share: 0.5}, small_base()), kind)
    assert fresh.scale_emb.weights.shape == with_scales.scale_emb.weights.shape
    changes = {f"{kind}_checkpoint": path, share: 0.5, f"{kind}.scaling.factors": [[2, 2]]}
    with pytest.raises(CheckpointError, match="scale_emb"):
        started(changes, small_base())


def test_the_vectors_of_mosaics_are_taken_where_both_have_them(tmp_path):
    base, share = small_base(), {"reader.mosaic_share": 0.5}
    trained, path = pretrained(tmp_path / "with", "reader", base, mosaic_share=0.5)
    _, plain = pretrained(tmp_path / "without", "reader", base)
    both = started({"reader_checkpoint": path, **share}, base).reader
    assert torch.equal(both.mosaic_emb.weights, trained.mosaic_emb.weights)
    dropped = started({"reader_checkpoint": path}, base).reader
    assert not hasattr(dropped, "mosaic_emb")
    assert torch.equal(dropped.dihedral_emb.weights, trained.dihedral_emb.weights)
    fresh = started({"reader_checkpoint": plain, **share}, base).reader
    assert fresh.mosaic_emb.weights.shape == trained.mosaic_emb.weights.shape


def test_a_run_folder_and_a_bundle_do_as_well(tmp_path):
    model, path = pretrained(tmp_path / "run", "trm", small_base())
    for given in (tmp_path / "run", path):
        hybrid = started({"trm_checkpoint": given}, small_base())
        assert torch.equal(hybrid.trm.puzzle_emb.weights, model.puzzle_emb.weights)


def test_a_hybrid_gives_all_its_parts(tmp_path):
    old, path = hybrid_checkpoint(tmp_path, small_base())
    hybrid = started({"trm_checkpoint": path, "reader_checkpoint": path}, small_base())
    for name, tensor in old.state_dict().items():
        assert torch.equal(hybrid.state_dict()[name], tensor), name


def test_the_metadata_of_a_checkpoint_are_read_once(tmp_path, monkeypatch):
    _, trm = hybrid_checkpoint(tmp_path / "trm", small_base())
    _, reader = pretrained(tmp_path / "reader", "reader", small_base())
    found, read_text = [], Path.read_text

    def read(path, *args, **options):
        found.append(path)
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)
    started({"trm_checkpoint": trm, "reader_checkpoint": reader}, small_base())
    assert [path for path in found if path.name == META] == [trm / META, reader / META]


def test_of_a_hybrid_only_the_adapters_that_are_switched_on_are_taken(tmp_path):
    old, path = hybrid_checkpoint(tmp_path, small_base())
    changes = {"trm_checkpoint": path, "coupling.context": False}
    hybrid = started(changes, small_base())
    assert set(hybrid.adapters) == {"draft", "back"}
    weight = "draft.project.weight"
    assert torch.equal(hybrid.adapters.get_parameter(weight), old.adapters.get_parameter(weight))


def test_a_reader_is_no_trm_and_a_trm_no_reader(tmp_path):
    for kind, other in (("trm", "reader"), ("reader", "trm")):
        _, path = pretrained(tmp_path / kind, kind, small_base())
        changes = {f"{other}_checkpoint": path}
        text = refused(CheckpointError, lambda c=changes: started(c, small_base()))
        assert f"{path}: holds a {kind}, not a {other}" in text


@pytest.mark.parametrize("kind", ["trm", "reader"])
@pytest.mark.parametrize(("key", "value"), [("hidden_size", 64), ("num_heads", 4)])
def test_another_size_is_refused_with_both_values(tmp_path, kind, key, value):
    """Another number of heads would fit every tensor and compute something else."""
    _, path = pretrained(tmp_path, kind, small_base(), **{key: value})
    now = getattr(getattr(new_config(), kind), key)
    text = refused(CheckpointError, lambda: started({f"{kind}_checkpoint": path}, small_base()))
    assert f"{path}: {kind}.{key} = {value} there, {now} here" in text


def test_adapters_for_a_reader_of_another_width_are_refused_with_both_widths(tmp_path):
    _, path = hybrid_checkpoint(tmp_path, small_base(), {"reader.hidden_size": 64})
    for off in ({}, {"coupling.context": False}, {"coupling.draft": False}):
        changes = {"trm_checkpoint": path, **off}
        text = refused(CheckpointError, lambda c=changes: started(c, small_base()))
        assert "reader of width 64" in text
        assert "reader.hidden_size = 32 here" in text
        assert "new_adapters = true" in text


def test_new_adapters_begin_untrained_and_trm_does_not(tmp_path):
    """Also for a reader of another width; for one of the same width they are left out as well."""
    for width in (64, 32):
        sizes = {"reader.hidden_size": width}
        old, path = hybrid_checkpoint(tmp_path / str(width), small_base(), sizes)
        hybrid = started({"trm_checkpoint": path, "new_adapters": True}, small_base())
        assert hybrid.hidden_size == 32
        for name, tensor in old.trm.state_dict().items():
            assert torch.equal(hybrid.trm.state_dict()[name], tensor), name
        fresh = started({}, small_base())
        for name, tensor in fresh.adapters.state_dict().items():
            assert torch.equal(hybrid.adapters.state_dict()[name], tensor), name


def test_what_cannot_fit_is_refused_by_the_metadata_alone(tmp_path):
    """Before anything is built or trained: the weights are not needed for it."""
    _, path = hybrid_checkpoint(tmp_path, small_base(), {"reader.hidden_size": 64})
    config = new_config({"trm_checkpoint": path})
    (path / "model.safetensors").unlink()
    assert "of width 64" in refused(CheckpointError, lambda: starting_points(config))
    points = starting_points(new_config({"trm_checkpoint": path, "new_adapters": True}))
    assert [(point.kind, point.folder) for point in points] == [("trm", path)]


def test_adapters_of_another_shape_are_refused(tmp_path):
    _, path = hybrid_checkpoint(tmp_path, small_base(), {"coupling.num_context_slots": 5})
    text = refused(CheckpointError, lambda: started({"trm_checkpoint": path}, small_base()))
    assert "(65, 32)" in text
    assert "(63, 32)" in text


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    text = refused(CheckpointError, lambda: started({"trm_checkpoint": tmp_path}, small_base()))
    assert f"{tmp_path}: no checkpoint" in text


def test_a_checkpoint_without_fingerprints_is_read_by_task_id(tmp_path):
    model, path = pretrained(tmp_path, "trm", small_base())
    meta = json.loads((path / "checkpoint.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    (copy / "checkpoint.json").write_text(json.dumps({**meta, "notes": {}}))
    hybrid = started({"trm_checkpoint": copy}, other_base())
    there, here = model.puzzle_emb.weights, hybrid.trm.puzzle_emb.weights
    assert torch.equal(here[3], there[1])
    torch.testing.assert_close(here[0], there.mean(0))
