"""Put a reader and a TRM that were trained apart into one bundle, which pools their candidates.

It is the hybrid without a path between the two; `arctrm joint` trains the paths.
"""

from pathlib import Path
from typing import Any, Literal

from arctrm.config import CouplingConfig
from arctrm.errors import CheckpointError
from arctrm.training.checkpoint_meta import CheckpointMeta, check_id_map
from arctrm.training.checkpoints import read_meta, read_model, resolve_checkpoint, write_bundle

APART = CouplingConfig(context=False, draft=False, back=False)


def join_bundles(reader: Path, trm: Path, out: Path, bits: Literal[16, 8] = 8) -> Path:
    """Write the new bundle folder `out` from a reader's and a TRM's run, checkpoint or bundle.

    Raises:
        CheckpointError: one is of the other kind, or they were trained on different data.
        ResourceError: the disk is full.
    """
    folders = {"reader": resolve_checkpoint(reader), "trm": resolve_checkpoint(trm)}
    metas = {kind: read_meta(folder) for kind, folder in folders.items()}
    for kind, meta in metas.items():
        held = meta.config.get("model", "trm")
        if held != kind or "coupling" in meta.config:
            raise CheckpointError(f"{folders[kind]}: does not hold a {kind} alone; give one")
    _check_same_data(folders, metas)
    weights = {
        f"{kind}.{name}": tensor
        for kind, folder in folders.items()
        for name, tensor in read_model(folder, ema=True).items()
    }
    return write_bundle(out, _joined(metas), weights, bits=bits)


def _check_same_data(folders: dict[str, Path], metas: dict[str, CheckpointMeta]) -> None:
    left, right = metas["reader"], metas["trm"]
    names = str(folders["reader"]), str(folders["trm"])
    check_id_map(left.task_ids, right.task_ids, *names)
    if left.data_fingerprint != right.data_fingerprint:
        raise CheckpointError(
            f"{names[0]} was trained on data {left.data_fingerprint[:12]}, {names[1]} on "
            f"{right.data_fingerprint[:12]}; join two that were trained on the same"
        )


def _joined(metas: dict[str, CheckpointMeta]) -> CheckpointMeta:
    reader, trm = metas["reader"], metas["trm"]
    config: dict[str, Any] = {
        **trm.config,
        "reader": reader.config["reader"],
        "coupling": APART.model_dump(mode="json"),
    }
    parts = {
        kind: {
            "step": meta.step,
            "elapsed": meta.elapsed,
            "world_size": meta.world_size,
            "examples": meta.examples,
            "git_revision": meta.git_revision,
            "seed": meta.config["seed"],
            "data": meta.config["data"],
            "training": meta.config["training"],
        }
        for kind, meta in metas.items()
    }
    notes = {"task_fingerprints": trm.notes.get("task_fingerprints", []), "parts": parts}
    return trm.model_copy(
        update={
            "config": config,
            "notes": notes,
            "elapsed": reader.elapsed + trm.elapsed,
            "step": reader.step + trm.step,
            "examples": reader.examples + trm.examples,
            "files": {},
        }
    )
