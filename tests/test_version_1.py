"""Version 1 of the checkpoint format: a tiny reader is read, everything else is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from arctrm.checkpoints import read_trunk
from arctrm.errors import CheckpointError
from arctrm.model.trunk import Trunk

SIZES = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "loops": 2}
OLD_READER = {
    **SIZES,
    "injection": True,
    "sequence": "pair",
    "input_attention": "full",
    "inverse_share": 0.25,
    "task_embedding": True,
    "dropout": 0.0,
    "max_pairs": 6,
    "scaling": {"share": 0.0},
}


def old_checkpoint(folder, reader=None, **fields):
    """A reader alone, as version 1 stored it; its tensors by their names."""
    folder.mkdir()
    width, inner = 16, 64
    shapes = {
        "llama.model.embed_tokens.weight": (16, width),
        "llama.model.norm.weight": (width,),
        "llama.lm_head.weight": (16, width),
        "puzzle_emb.weights": (2, width),
        "inverse_emb.weights": (2, width),
        "dihedral_emb.weights": (8, width),
        "colour_flag_emb.weights": (2, width),
        "injection.layers.0.weight": (width, width),
        "injection.layers.1.weight": (width, width),
    }
    layer = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    layer |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    layer |= {"mlp.down_proj": (width, inner)}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes |= {f"llama.model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    path = folder / "model.safetensors"
    save_file({f"weights.{name}": tensor for name, tensor in tensors.items()}, path)
    told = {
        "version": 1,
        "step": 5,
        "elapsed": 1.0,
        "examples": 3,
        "config": {
            "seed": 0,
            "model": "reader",
            "trm": {"H_cycles": 2},
            "reader": OLD_READER | (reader or {}),
            "data": {"subsets": ["training"], "test_set": None, "translate": 0.0},
        },
        "task_ids": ["x", "y"],
        "notes": {"task_fingerprints": ["1", "2"]},
        "int8_group": None,
        "integer_bits": 8,
        "files": {"model.safetensors": {"size": path.stat().st_size, "tensors": {}}},
    }
    (folder / "checkpoint.json").write_text(json.dumps(told | fields))
    return tensors


def test_a_tiny_reader_of_version_1_is_a_trunk_whose_trm_voice_is_untrained(tmp_path):
    old = old_checkpoint(tmp_path / "old")
    trunk, told = read_trunk(tmp_path / "old")
    assert (told.version, told.voices, told.step) == (2, ("reader",), 5)
    assert "TRM voice is untrained" in told.notes["upgraded"]
    assert told.trained.reader.inverse_share == 0.25
    new = trunk.state_dict()
    layer = "llama.model.layers.0."
    qkv = torch.cat([old[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(new["layers.0.qkv_proj.weight"], qkv)
    gate_up = torch.cat([old[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(new["layers.0.gate_up_proj.weight"], gate_up)
    for name, there in (
        ("layers.0.input_norm", f"{layer}input_layernorm.weight"),
        ("layers.0.post_norm", f"{layer}post_attention_layernorm.weight"),
        ("injections.layers.1.weight", "injection.layers.1.weight"),
        ("head.weight", "llama.lm_head.weight"),
        ("task_emb", "puzzle_emb.weights"),
        ("colours_emb", "colour_flag_emb.weights"),
    ):
        assert torch.equal(new[name], old[there]), name
    assert torch.equal(new["own_head.weight"], old["llama.lm_head.weight"][:10])
    fresh = Trunk(trunk.config, 2).state_dict()
    for name in (
        "halt_head.weight",
        "halt_head.bias",
        "feedback.layers.0.weight",
        "voice_emb",
        "own_task_emb",
    ):
        assert torch.equal(new[name], fresh[name]), name


@pytest.mark.parametrize(
    ("reader", "fields", "said"),
    [
        ({"sequence": "task"}, {}, "reader.sequence = 'task', where only 'pair' is left"),
        ({"input_attention": "causal"}, {}, "reader.input_attention = 'causal'"),
        ({}, {"notes": {}}, "without a tiny reader"),
        ({}, {"config": {"seed": 0, "model": "trm", "trm": {}}}, "without a tiny reader"),
    ],
    ids=["task", "causal", "no fingerprints", "trm"],
)
def test_everything_else_of_version_1_is_refused_and_says_who_reads_it(
    tmp_path, reader, fields, said
):
    old_checkpoint(tmp_path / "old", reader, **fields)
    with pytest.raises(CheckpointError) as caught:
        read_trunk(tmp_path / "old")
    assert said in str(caught.value)
    assert str(caught.value).endswith("arctrm of commit 4e986ca reads it")
