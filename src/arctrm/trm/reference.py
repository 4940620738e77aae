"""Import of checkpoints written by the reference TRM implementation.

Keys are matched by name after stripping the wrappers' prefixes; loading is strict on both sides.
Only tensors are read: `torch.load(..., weights_only=True)`.
"""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctrm.config.trm import TRMConfig
from arctrm.errors import CheckpointError
from arctrm.trm.carry import ReferenceTRM
from arctrm.trm.model import TRM
from arctrm.trm.strict import check_names

_PREFIXES = re.compile(r"^(?:weights\.|_orig_mod\.|module\.|model\.|inner\.)+")
_IGNORED = re.compile(r"rotary_emb\.|embed_pos\.|local_(weights|ids)$")
REFERENCE_ROPE_BASE = 10000.0
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    struct.error,
)
"""What torch raises for a file that is not its own, depending on where it stumbles."""


def reference_config(config: Mapping[str, Any]) -> TRMConfig:
    """Our configuration for a reference `arch` configuration; refuses what we do not compute."""
    for key, allowed in (("mlp_t", False), ("pos_encodings", "rope")):
        got = config.get(key, allowed)
        if got != allowed:
            raise CheckpointError(
                f"reference configuration: {key} = {got!r} is not supported, only {allowed!r}; "
                "use a checkpoint of the attention variant with rotary positions"
            )
    return TRMConfig(
        layout="reference",
        hidden_size=config["hidden_size"],
        num_heads=config["num_heads"],
        num_layers=config["L_layers"],
        expansion=config.get("expansion", 4),
        H_cycles=config["H_cycles"],
        L_cycles=config["L_cycles"],
        num_prefix_slots=config.get("puzzle_emb_len", 16),
        rope_base=config.get("rope_theta", REFERENCE_ROPE_BASE),
        qk_norm=False,
        stablemax=True,
        halt_max_steps=config.get("halt_max_steps", 16),
        halt_exploration_prob=config.get("halt_exploration_prob", 0.1),
        condition_cells=False,
    )


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the wrappers' key prefixes and the buffers that hold no learned value."""
    stripped = {_PREFIXES.sub("", key): value for key, value in state_dict.items()}
    return {key: value for key, value in stripped.items() if not _IGNORED.search(key)}


def infer_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published ARC models' configuration, with the sizes read off the weights.

    Cycles and heads leave no trace in the weights; the published ARC models use H3 / L4 and heads
    of 64.
    """
    weights = strip_prefixes(state_dict)
    layers = {key.split(".")[2] for key in weights if key.startswith("L_level.layers.")}
    if "embed_tokens.embedding_weight" not in weights or not layers:
        raise CheckpointError(
            "the file holds no TRM weights (no embed_tokens.embedding_weight and L_level.layers); "
            f"it has {', '.join(sorted(weights)[:3]) or 'no tensors'}"
        )
    width = weights["embed_tokens.embedding_weight"].shape[1]
    return {
        "hidden_size": width,
        "num_heads": max(1, width // 64),
        "L_layers": len(layers),
        "H_cycles": 3,
        "L_cycles": 4,
    }


def load_reference(
    state_dict: Mapping[str, Tensor], config_dict: Mapping[str, Any]
) -> ReferenceTRM:
    """Model with the reference weights; `config_dict` is the reference's `arch` configuration.

    Raises CheckpointError naming the first missing, unexpected or wrongly shaped tensor.
    """
    weights = strip_prefixes(state_dict)
    if "puzzle_emb.weights" not in weights:
        raise CheckpointError("the reference checkpoint has no tensor puzzle_emb.weights")
    trm = TRM(reference_config(config_dict), weights["puzzle_emb.weights"].shape[0])
    expected = {name: tensor.shape for name, tensor in trm.state_dict().items()}
    check_names(expected, weights, Path("the reference checkpoint"))
    trm.load_state_dict({key: value.float() for key, value in weights.items()})
    return ReferenceTRM(trm)


def read_reference_file(path: Path) -> ReferenceTRM:
    """Load a published checkpoint (a PyTorch state dict) without unpickling anything else."""
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: not a PyTorch state dict of plain tensors ({type(error).__name__}); "
            "give a file that torch.save wrote from a state_dict, or an arctrm checkpoint folder"
        ) from error
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(value, Tensor) for value in state_dict.values()
    ):
        raise CheckpointError(f"{path}: not a state dict of tensors, but {type(state_dict)}")
    try:
        return load_reference(state_dict, infer_config(state_dict))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
