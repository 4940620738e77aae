"""Checkpoints: safetensors and JSON, written aside and renamed, read back strictly.

A checkpoint is a folder `<run>/checkpoints/step_00001234/`:

    checkpoint.json        step, config, id map, revision, and what every other file must hold
    model.safetensors      "weights.*" as trained, "ema.*" their moving average
    trainer.safetensors    optimisers and whatever else all processes share
    rank_<k>.safetensors   per process: random state, carry, data position

A folder under its final name is complete: until the rename it is called `.tmp-step_...`. A bundle
is the same folder without trainer and rank files; its matrices may be 8-bit ("scales.*" beside
"weights.*"). Nothing is ever unpickled.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from arctrm import __version__
from arctrm.errors import CheckpointError
from arctrm.training.checkpoint_meta import (
    FORMAT_VERSION,
    META,
    CheckpointMeta,
    FileRecord,
    check_id_map,
    check_names,
    check_same_config,
    load_tensors,
    read_meta,
)
from arctrm.training.files import disk_errors, flush_to_disk
from arctrm.training.int8 import BITS, GROUP, dequantise_all, is_layer_matrix, stored
from arctrm.training.state import (
    pack_generator,
    pack_optimiser,
    restore_rng,
    rng_state,
    unpack_generator,
    unpack_optimiser,
)

__all__ = [
    "FORMAT_VERSION",
    "RECIPE_RECORD",
    "RECIPE_RESULT",
    "CheckpointMeta",
    "check_id_map",
    "check_names",
    "check_same_config",
    "export_bundle",
    "latest_checkpoint",
    "model_tensors",
    "pack_generator",
    "pack_optimiser",
    "read_meta",
    "read_model",
    "read_rank",
    "read_trainer",
    "resolve_checkpoint",
    "restore_rng",
    "rng_state",
    "unpack_generator",
    "unpack_optimiser",
    "write_checkpoint",
]

MODEL = "model.safetensors"
TRAINER = "trainer.safetensors"
RECIPE_RECORD, RECIPE_RESULT = "recipe.json", "joint"
"""What makes a folder that of a recipe, and the run inside it that stands for the whole."""
_TEMPORARY = ".tmp-"
_REPLACED = ".old-"


def model_tensors(
    weights: dict[str, Tensor], ema: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Names as they stand in `model.safetensors`: "weights.*" and, if there is one, "ema.*"."""
    named = {f"weights.{name}": tensor for name, tensor in weights.items()}
    return named | {f"ema.{name}": tensor for name, tensor in (ema or {}).items()}


def write_checkpoint(
    run: Path,
    meta: CheckpointMeta,
    model: dict[str, Tensor],
    trainer: dict[str, Tensor],
    rank_state: dict[str, Tensor],
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    keep_last: int = 2,
) -> Path:
    """Write `<run>/checkpoints/step_<meta.step>` so that a kill at any moment loses nothing.

    Every process calls this; only process 0 writes the model, the trainer and the metadata.

    Args:
        run: run folder, shared by all processes.
        meta: `files`, `world_size`, `ema` and the versions are filled in here.
        model: from `model_tensors`; used on process 0 only, as is `trainer`.
        trainer: what all processes share, such as `pack_optimiser`.
        rank_state: what is this process's own, such as `rng_state` and the carry.
        rank: index of this process.
        world_size: number of processes.
        barrier: waits for all processes; called three times.
        keep_last: checkpoints kept, this one included.

    Raises:
        ResourceError: the disk is full; the temporary folder is gone, older checkpoints are whole.
        CheckpointError: the folder cannot be written.
    """
    parent = run / "checkpoints"
    final = parent / f"step_{meta.step:08d}"
    aside = parent / (_TEMPORARY + final.name)
    own = {f"rank_{rank}.safetensors": rank_state}
    try:
        with disk_errors(parent):
            if rank == 0:
                _clear(parent, _TEMPORARY)
                aside.mkdir(parents=True)
                own |= {MODEL: model, TRAINER: trainer}
            barrier()
            for name, tensors in own.items():
                _write_tensors(aside / name, tensors)
            barrier()
            if rank == 0:
                _write_meta(aside, meta, world_size)
                _publish(aside, final)
                _prune(parent, final, keep_last)
            barrier()
    finally:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run folder, or None."""
    found = _complete(run / "checkpoints")
    return found[-1] if found else None


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a run folder (its latest), a checkpoint folder or a bundle folder.

    The folder of a recipe means its joint run.

    Raises:
        CheckpointError: there is none.
    """
    if (path / META).is_file():
        return path
    latest = latest_checkpoint(path)
    if (path / RECIPE_RECORD).is_file():
        latest = latest_checkpoint(path / RECIPE_RESULT)
    if latest is None:
        what = "no checkpoint" if path.is_dir() else "not a folder"
        raise CheckpointError(
            f"{path}: {what}; give a run folder (with checkpoints/step_...), a checkpoint folder "
            f"or a bundle folder (with {META} and {MODEL})"
        )
    return latest


def read_model(path: Path, *, ema: bool, meta: CheckpointMeta | None = None) -> dict[str, Tensor]:
    """Weights of a checkpoint or bundle folder, on the CPU, names without prefix.

    8-bit matrices come back as float32; everything else has the type that it is stored as.
    With `ema`, the moving average; the weights as trained where the run kept no average. `meta`:
    the folder's metadata, where they are read already.

    Raises:
        CheckpointError: a file is missing, truncated, or not what the metadata says.
    """
    meta = meta or read_meta(path)
    prefix = "ema." if ema and meta.ema else "weights."
    tensors = load_tensors(path, MODEL, meta, prefix)
    scales = load_tensors(path, MODEL, meta, "scales.")
    return dequantise_all(tensors, scales, meta.int8_group, path / MODEL, meta.integer_bits)


def read_trainer(path: Path) -> dict[str, Tensor]:
    """State that all processes share; `Raises` as `read_model`."""
    return load_tensors(path, TRAINER, read_meta(path))


def read_rank(path: Path, rank: int) -> dict[str, Tensor]:
    """State of process `rank`; `Raises` as `read_model`, and when there was no such process."""
    meta = read_meta(path)
    name = f"rank_{rank}.safetensors"
    if TRAINER in meta.files and name not in meta.files:
        raise CheckpointError(
            f"{path}: written by {meta.world_size} process(es), so there is no state of process "
            f"{rank}; resume with {meta.world_size} process(es)"
        )
    return load_tensors(path, name, meta)


Bits = Literal[16, 8, 6, 5, 4]
"""Of a stored weight: 16 are bfloat16."""


def export_bundle(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
    bits: Bits = 16,
    **notes: object,
) -> Path:
    """Write what solving needs of a checkpoint to the new folder `out`: one set of weights.

    Weights are stored as `dtype` (the layers compute in bfloat16 on a GPU anyway). With `bits` = 8
    or fewer the matrices of the layers, nearly all of the weights, are stored as integers with
    scales instead.

    The moving average, where there is one, becomes the weights; `notes` are added to the metadata.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: `checkpoint` cannot be read or `out` not be written, or exists.
    """
    if bits not in (16, *BITS):
        sizes = ", ".join(map(str, BITS))
        raise ValueError(f"bits = {bits} is not a size of stored weights; use 16, {sizes}")
    meta = read_meta(checkpoint)
    added = {"exported": "ema" if meta.ema else "weights", **notes}
    exported = meta.model_copy(update={"notes": meta.notes | added})
    return write_bundle(out, exported, read_model(checkpoint, ema=True), dtype, bits)


def write_bundle(
    out: Path,
    meta: CheckpointMeta,
    weights: dict[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
    bits: Bits = 16,
) -> Path:
    """Write one set of weights to the new folder `out`; arguments and errors as `export_bundle`."""
    tensors = _stored(weights, dtype, bits)
    aside = out.with_name(_TEMPORARY + out.name)
    try:
        with disk_errors(out.parent):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            _write_tensors(aside / MODEL, tensors)
            how = {"int8_group": None, "integer_bits": 8}
            if bits < 16:
                how = {"int8_group": GROUP, "integer_bits": bits}
            _write_meta(aside, meta.model_copy(update=how), meta.world_size)
            os.rename(aside, out)
            flush_to_disk(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _stored(weights: dict[str, Tensor], dtype: torch.dtype, bits: int) -> dict[str, Tensor]:
    """Weights as a bundle stores them, by their names in `model.safetensors`."""
    quantised = {
        name: stored(tensor, bits)
        for name, tensor in weights.items()
        if bits < 16 and is_layer_matrix(name, tensor, bits)
    }
    floats = {name: tensor.to(dtype) for name, tensor in weights.items() if name not in quantised}
    integers = {name: integers for name, (integers, _) in quantised.items()}
    return model_tensors(floats | integers) | {
        f"scales.{name}": scales for name, (_, scales) in quantised.items()
    }


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write copies (safetensors refuses tensors that share memory), readable as files usually are.

    safetensors leaves a file that only its owner may read; the umask decides elsewhere.
    """
    path.touch()
    mode = path.stat().st_mode
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in copies.items()}, path)
    path.chmod(mode)
    flush_to_disk(path)


def _write_meta(folder: Path, meta: CheckpointMeta, world_size: int) -> None:
    records = {path.name: FileRecord.of(path) for path in sorted(folder.glob("*.safetensors"))}
    filled = meta.model_copy(
        update={
            "files": records,
            "world_size": world_size,
            "ema": any(name.startswith("ema.") for name in records[MODEL].tensors),
            "arctrm_version": __version__,
            "torch_version": torch.__version__,
            "python_version": platform.python_version(),
        }
    )
    (folder / META).write_text(filled.model_dump_json(indent=1), encoding="utf-8")
    flush_to_disk(folder / META)
    flush_to_disk(folder)


def _publish(aside: Path, final: Path) -> None:
    """Give the checkpoint its name; one of the same step stays readable until that is done."""
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(aside, final)
    flush_to_disk(final.parent)


def _prune(parent: Path, newest: Path, keep_last: int) -> None:
    """Drop the oldest, each renamed first, so that no half-deleted folder looks complete."""
    older = [path for path in _complete(parent) if path != newest]
    for path in older[: max(len(older) - (keep_last - 1), 0)]:
        os.rename(path, path.with_name(_TEMPORARY + path.name))
    _clear(parent, _TEMPORARY)
    _clear(parent, _REPLACED)


def _clear(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _complete(parent: Path) -> list[Path]:
    """Complete checkpoints by step; a replaced one only where its successor is not there."""
    found: dict[str, Path] = {}
    for prefix in ("", _REPLACED):
        for path in _folders(parent, prefix):
            found.setdefault(path.name.removeprefix(prefix), path)
    return [found[name] for name in sorted(found)]


def _folders(parent: Path, prefix: str) -> Iterable[Path]:
    return (path for path in parent.glob(f"{prefix}step_*") if (path / META).is_file())
