"""Put a reader and a TRM that were trained apart into one bundle, which pools their candidates.

It is the hybrid without a path between the two; `arctrm joint` trains the paths. Either may come
from a hybrid, which it leaves behind.
"""

from pathlib import Path
from typing import Any

from arctrm.config import CouplingConfig
from arctrm.errors import CheckpointError
from arctrm.training.checkpoint_meta import CheckpointMeta, check_id_map
from arctrm.training.checkpoints import Bits, read_meta, resolve_checkpoint, write_bundle
from arctrm.training.starting import held_by, llama_model, origin, part_weights

APART = CouplingConfig(context=False, draft=False, back=False)


def join_bundles(reader: Path, trm: Path, out: Path, bits: Bits = 8) -> Path:
    """Write the new bundle folder `out` from a reader's and a TRM's run, checkpoint or bundle.

    Raises:
        CheckpointError: one is of the other kind, or they were trained on different tasks.
        ResourceError: the disk is full.
    """
    folders = {"reader": resolve_checkpoint(reader), "trm": resolve_checkpoint(trm)}
    metas = {kind: read_meta(folder) for kind, folder in folders.items()}
    for kind, meta in metas.items():
        if held_by(meta) not in (kind, "hybrid") or llama_model(meta) != "tiny":
            raise CheckpointError(f"{folders[kind]}: does not hold a tiny {kind}; give one")
    _check_same_tasks(folders, metas)
    weights = {
        f"{kind}.{name}": tensor
        for kind, folder in folders.items()
        for name, tensor in part_weights(folder, metas[kind], kind).items()
    }
    return write_bundle(out, _joined(metas), weights, bits=bits)


def _check_same_tasks(folders: dict[str, Path], metas: dict[str, CheckpointMeta]) -> None:
    """The same tasks by id and by content, none of them evaluated by one and not by the other.

    (One of the two may have been trained on more pairs of them.)
    """
    left, right = metas["reader"], metas["trm"]
    names = str(folders["reader"]), str(folders["trm"])
    check_id_map(left.task_ids, right.task_ids, *names)
    for what, values in {
        "tasks of other content": [m.notes.get("task_fingerprints") for m in (left, right)],
        "another test set": [m.config["data"].get("test_set") for m in (left, right)],
    }.items():
        if values[0] != values[1]:
            raise CheckpointError(
                f"{names[0]} was trained with {what} than {names[1]}; join two that were trained "
                "on the same tasks"
            )


def _joined(metas: dict[str, CheckpointMeta]) -> CheckpointMeta:
    reader, trm = metas["reader"], metas["trm"]
    config: dict[str, Any] = {
        **{key: value for key, value in trm.config.items() if key != "recipe"},
        "reader": reader.config["reader"],
        "coupling": APART.model_dump(mode="json"),
    }
    parts = {kind: origin(meta, kind) for kind, meta in metas.items()}
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
