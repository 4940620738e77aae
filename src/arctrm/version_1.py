"""Checkpoints of format version 1 as version 2 has them, patched forward in this one place.

A tiny reader becomes a trunk whose TRM voice is untrained; everything else is refused.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctrm.config import TINY, DataConfig, ReaderConfig, TrunkConfig
from arctrm.data.task import NUM_COLOURS
from arctrm.errors import CheckpointError
from arctrm.model.trunk import HALT_BIAS

OLDER = "arctrm of commit 4e986ca"  # reads what is refused

_RENAMED = {
    r"^llama\.(model\.)?|self_attn\.|mlp\.|\.weights$": "",
    r"^(embed_tokens|norm)\.weight": r"\1",
    r"input_layernorm\.weight": "input_norm",
    r"post_attention_layernorm\.weight": "post_norm",
    r"^lm_head": "head",
    r"^injection\.": "injections.",
    r"^puzzle_emb": "task_emb",
    r"^colour_flag_emb": "colours_emb",
}
_FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


def new_meta(told: dict[str, Any], where: Path, keys: Collection[str]) -> dict[str, Any]:
    """`checkpoint.json` as version 2 has it, with its `keys`."""
    config, notes = told["config"], told["notes"]
    is_joint, reader = "coupling" in config, config.get("reader", {})
    kind = config.get("llama_model") if is_joint else config.get("model")
    if kind != (TINY if is_joint else "reader") or not notes.get("task_fingerprints"):
        raise CheckpointError(f"{where}: format version 1 without a tiny reader; {OLDER} reads it")
    said = notes.get("parts", {}).get("reader", {})  # of a hybrid: how its reader was trained
    data = {**config["data"], "scaling": reader["scaling"]}
    tables = (("trunk", TrunkConfig, reader), ("reader", ReaderConfig, reader))
    trained = {
        table: {key: held[key] for key in model.model_fields if key in held}
        for table, model, held in (*tables, ("data", DataConfig, data))
    }
    return {key: told[key] for key in keys if key in told} | {
        "version": 2,
        **{key: said.get(key, told[key]) for key in ("step", "elapsed", "examples")},
        "config": {"seed": said.get("seed", config["seed"]), "voice": "reader", "trm": {}}
        | trained,
        "voices": ("reader",),
        "task_fingerprints": notes["task_fingerprints"],
        "notes": {"upgraded": "from version 1: the TRM voice is untrained", "reader": said},
        "files": {name: record["size"] for name, record in told["files"].items()},
    }


def new_tensors(told: dict[str, Any], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a trunk, by their names in version 2."""
    first = "reader." if "coupling" in told["config"] else ""
    trunk = {name.removeprefix(first): t for name, t in old.items() if name.startswith(first)}
    for pattern, new in _RENAMED.items():
        trunk = {re.sub(pattern, new, name): tensor for name, tensor in trunk.items()}
    for fused, parts in _FUSED.items():
        for name in [name for name in trunk if name.endswith(f".{parts[0]}.weight")]:
            names = [name.replace(parts[0], part) for part in parts]
            if all(part in trunk for part in names):  # else whoever loads the trunk says so
                joined = torch.cat([trunk.pop(part) for part in names])
                trunk[name.replace(parts[0], f"{fused}_proj")] = joined
    norm, tasks = trunk["norm"], trunk["task_emb"]
    trunk.pop("mosaic_emb", None)
    trunk = {"inverse_emb": torch.zeros_like(tasks), "scale_emb": tasks[:0]} | trunk
    trunk |= {
        "own_head.weight": trunk["head.weight"][:NUM_COLOURS].clone(),
        "halt_head.weight": norm.new_zeros(1, len(norm)),
        "halt_head.bias": norm.new_full((1,), HALT_BIAS),
        "feedback.layers.0.weight": norm.new_zeros(len(norm), len(norm)),
        "voice_emb": torch.zeros_like(norm),
        "own_task_emb": torch.zeros_like(tasks),
    }
    return {f"trunk.{name}": tensor for name, tensor in trunk.items()}
