"""A reader and a TRM trained apart, in one bundle."""

import json

import pytest
import torch

from arctrm.config import EvalConfig, InferenceConfig, PretrainConfig
from arctrm.config.load import load_config
from arctrm.errors import CheckpointError
from arctrm.solving.evaluate import run as evaluate
from arctrm.solving.weights import load_solver
from arctrm.training import pretrain
from arctrm.training.checkpoint_meta import META
from arctrm.training.checkpoints import (
    export_bundle,
    latest_checkpoint,
    read_meta,
    read_model,
)
from arctrm.training.joining import join_bundles

SMALL = {
    "data.max_tasks": 2,
    "trm.hidden_size": 32,
    "trm.num_heads": 1,
    "trm.num_layers": 1,
    "trm.H_cycles": 2,
    "trm.L_cycles": 1,
    "trm.halt_max_steps": 2,
    "reader.hidden_size": 32,
    "reader.num_heads": 1,
    "reader.num_layers": 1,
    "training.schedule.max_steps": 2,
    "training.tokens_per_batch": 2048,
}


def trained(folder, **fields):
    settings = {**SMALL, **fields}
    sets = [f"{name}={value}" for name, value in settings.items()]
    pretrain.run(load_config(PretrainConfig, [], sets, environ={}), folder, False)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return trained(root / "reader", model="reader"), trained(root / "trm", model="trm")


def test_the_bundle_holds_both_and_answers_with_both(parts, tmp_path):
    reader, trm = parts
    bundle = join_bundles(reader, trm, tmp_path / "both", bits=16)
    for prefix, part in (("reader.", reader), ("trm.", trm)):
        weights = read_model(part / "checkpoints" / "step_00000002", ema=True)
        held = read_model(bundle, ema=True)
        for name, tensor in weights.items():
            expected = tensor.to(torch.bfloat16).float()
            assert torch.equal(held[prefix + name].float(), expected), name
    solver = load_solver(bundle, InferenceConfig(dtype="float32"), torch.device("cpu"))
    assert solver.has_trm
    assert solver.reader is not None
    assert not solver.hybrid.adapters
    assert set(read_meta(bundle).notes["parts"]) == {"reader", "trm"}
    sets = ["evaluation.max_tasks=2", "inference.views=2", 'evaluation.ablate=["no-trm"]']
    settings = load_config(EvalConfig, [], [f"checkpoint={bundle}", *sets], environ={})
    scores = evaluate(settings, tmp_path / "scores")
    assert scores.num_tasks == 2
    assert (tmp_path / "scores" / "ablations.json").is_file()


def test_two_of_a_kind_are_refused(parts, tmp_path):
    reader, trm = parts
    with pytest.raises(CheckpointError, match="does not hold a tiny reader"):
        join_bundles(trm, trm, tmp_path / "both")
    with pytest.raises(CheckpointError, match="does not hold a tiny trm"):
        join_bundles(reader, reader, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_parts_of_different_data_are_refused(parts, tmp_path):
    other = trained(tmp_path / "other", model="trm", **{"data.max_tasks": 3})
    with pytest.raises(CheckpointError, match="id map"):
        join_bundles(parts[0], other, tmp_path / "both")


def test_parts_are_taken_from_hybrids_and_keep_their_provenance(parts, tmp_path):
    once = join_bundles(*parts, tmp_path / "once", bits=16)
    for number, (reader, trm) in enumerate([(once, once), (once, parts[1]), (parts[0], once)]):
        again = join_bundles(reader, trm, tmp_path / str(number), bits=16)
        assert read_meta(again).notes == read_meta(once).notes
        expected, got = (read_model(bundle, ema=True) for bundle in (once, again))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_more_pairs_of_the_same_tasks_are_no_other_tasks_but_another_test_set_is(parts, tmp_path):
    more = trained(tmp_path / "more", model="trm", **{"data.test_pair_weight": 0})
    assert join_bundles(parts[0], more, tmp_path / "both").is_dir()
    for key, value, said in (
        ("config", {"data": {"test_set": "training"}}, "another test set"),
        ("notes", {"task_fingerprints": []}, "tasks of other content"),
    ):
        bundle = export_bundle(latest_checkpoint(parts[1]), tmp_path / key)
        meta = json.loads((bundle / META).read_text())
        meta[key] |= value
        (bundle / META).write_text(json.dumps(meta))
        with pytest.raises(CheckpointError, match=said):
            join_bundles(parts[0], bundle, tmp_path / "neither")
