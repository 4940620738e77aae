"""Checkpoints: safetensors and JSON, written aside and renamed, read back strictly.

A checkpoint is a folder `<run>/checkpoints/step_00001234/`: `checkpoint.json`, `model.safetensors`
("weights.*" as trained, "ema.*" their moving average), `trainer.safetensors` (what all processes
share), `rank_<k>.safetensors` (each its own). Until it is complete it is called `.tmp-step_...`.
A bundle has neither trainer nor rank files, and 8-bit matrices ("scales.*"). Nothing is unpickled.
`python -m arctrm.checkpoints RUN OUT` exports a bundle.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arctrm import __version__, version_1
from arctrm.config import TINY, DataConfig
from arctrm.config.base import StrictModel
from arctrm.config.model import CouplingConfig, HubConfig, ReaderConfig, TRMConfig, TrunkConfig
from arctrm.errors import ArctrmError, CheckpointError
from arctrm.model.trunk import Trunk
from arctrm.quantise import GROUP, dequantise_all, is_quantised, quantise
from arctrm.system import (
    TEMPORARY,
    clear_abandoned,
    disk_errors,
    flush_to_disk,
    read_json,
    temporary,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT_VERSION = 2
META, MODEL, TRAINER = "checkpoint.json", "model.safetensors", "trainer.safetensors"
RETIRED: dict[str, object] = {
    "reader.sequence": "pair",
    "reader.input_attention": "full",
    "reader.task_embedding": True,
    "reader.dropout": 0.0,
    "hub.cells": "auto",
}
"""Keys of a stored configuration that are gone -> the one value at which each is passed over."""


class Trained(StrictModel, extra="ignore"):
    """The part of a stored configuration that says what the weights are."""

    trunk: TrunkConfig
    reader: ReaderConfig
    trm: TRMConfig
    data: DataConfig
    llama_model: str = TINY
    hub: HubConfig = HubConfig()
    coupling: CouplingConfig = CouplingConfig()

    def new_trunk(self, num_tasks: int) -> Trunk:
        """An untrained trunk of this shape."""
        scaling, passes_z = self.data.scaling, self.trm.supervision_steps > 1
        num_scales = scaling.num_ways if scaling.share else 0
        return Trunk(self.trunk, num_tasks, num_scales, passes_z=passes_z)


class CheckpointMeta(StrictModel):
    """Contents of `checkpoint.json`; writing fills in the second half."""

    version: int = FORMAT_VERSION
    step: int = Field(ge=0)  # optimiser steps taken
    elapsed: float = Field(ge=0)  # seconds of training, those before a resume included
    examples: int = Field(ge=0)  # rows seen, over all processes
    config: dict[str, Any]  # resolved
    voices: tuple[Literal["reader", "trm"], ...]  # of the trunk, that were trained
    task_ids: tuple[str, ...]
    """Of each row of the task embeddings; beside it the fingerprint of its demonstrations."""
    task_fingerprints: tuple[str, ...]
    git_revision: str = "unknown"
    data_fingerprint: str = ""
    notes: dict[str, Any] = Field(default_factory=dict)  # where the weights started, a model card

    world_size: int = Field(1, ge=1, le=2**20)  # processes that wrote it
    ema: bool = False  # model.safetensors holds a moving average beside the weights
    int8_group: int | None = Field(None, ge=1, le=2**16)
    """Columns that share a scale in the matrices stored as integers; None: no integers."""
    files: dict[str, int] = Field(default_factory=dict)  # name to size in bytes
    arctrm_version: str = ""
    torch_version: str = ""

    def _problems(self) -> Iterator[str]:
        if len(self.task_ids) != len(self.task_fingerprints):
            yield f"{len(self.task_ids)} task_ids, but {len(self.task_fingerprints)} fingerprints"

    @property
    def trained(self) -> Trained:
        """What the weights are."""
        return Trained.model_validate(self.config)

    def rows_of(self, fingerprints: Iterable[str]) -> list[int | None]:
        """The embedding row of each task, found by content; None where there is none."""
        known = {key: row for row, key in enumerate(self.task_fingerprints)}
        return [known.get(key) for key in fingerprints]


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run folder, or None."""
    return max(_complete(run / "checkpoints"), default=None)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a run folder (its latest), a checkpoint or a bundle folder, or by
    ORG/NAME: the one on the Hugging Face hub.
    """
    found = path if (path / META).is_file() else latest_checkpoint(path)
    if found is None and is_hub_id(path):
        from arctrm.hub import download  # a second, and rarely needed

        return download(str(path))
    if found is None:
        what = "no checkpoint" if path.is_dir() else "not a folder"
        raise CheckpointError(
            f"{path}: {what}; give a run folder (with checkpoints/step_...), or the folder of a "
            f"checkpoint or bundle (with {META} and {MODEL})"
        )
    return found


def is_hub_id(path: Path) -> bool:
    """Whether a path may be ORG/NAME on the hub: not where a folder ORG is here."""
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path), re.ASCII)
    return is_name is not None and not path.parent.exists()


def read_meta(path: Path) -> CheckpointMeta:
    """What a run's latest checkpoint, a checkpoint or a bundle says; version 1 as version 2."""
    return _read(resolve_checkpoint(path))[1]


def read_model(
    path: Path, *, ema: bool = True, expected: Mapping[str, Any] | None = None, part: str = ""
) -> dict[str, Tensor]:
    """Float32 weights, with `ema` their average, if any. `part`: names that begin so; `expected` is
    compared before a tensor is read.
    """
    folder = resolve_checkpoint(path)
    told, meta = _read(folder)

    def of_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = version_1.new_tensors(told, tensors) if told["version"] == 1 else tensors
        return {name: tensor for name, tensor in own.items() if name.startswith(part)}

    def check(header: Mapping[str, Tensor]) -> None:
        if expected is not None:
            check_names(expected, of_part(header), folder / MODEL)

    tensors = _load(folder, MODEL, meta, "ema." if ema and meta.ema else "weights.", check)
    if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{folder / MODEL}: {odd[0]!r} is not finite; use another checkpoint")
    scales = _load(folder, MODEL, meta, "scales.")
    tensors = dequantise_all(tensors, scales, meta.int8_group, folder / MODEL)
    return of_part({name: tensor.float() for name, tensor in tensors.items()})


def read_trunk(path: Path) -> tuple[Trunk, CheckpointMeta]:
    """The trunk alone of a checkpoint, float32 on the CPU; errors as `read_model`."""
    folder = resolve_checkpoint(path)
    meta = read_meta(folder)
    with torch.device("meta"):
        trunk = meta.trained.new_trunk(len(meta.task_ids))
    wanted = {f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    weights = read_model(folder, expected=wanted, part="trunk.")
    trunk.load_state_dict({n.removeprefix("trunk."): t for n, t in weights.items()}, assign=True)
    return trunk, meta


def read_state(folder: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """What all processes of a run share, and what was process `rank`'s own, if it was there."""
    meta = read_meta(folder)
    own = _load(folder, f"rank_{rank}.safetensors", meta) if rank < meta.world_size else None
    return _load(folder, TRAINER, meta), own


def check_names(
    expected: Mapping[str, Any],
    got: Mapping[str, Tensor],
    path: Path,
    expected_by: str = "the model",
) -> None:
    """Compare names and shapes (`expected`: shapes or tensors); the error names what differs."""
    want = {name: tuple(getattr(of, "shape", of)) for name, of in expected.items()}
    have = {name: tuple(tensor.shape) for name, tensor in got.items()}
    missing, unexpected = (sorted(a.keys() - b.keys()) for a, b in ((want, have), (have, want)))
    differing = [name for name in want if have.get(name, want[name]) != want[name]]
    faults = [
        *(f"{len(missing)} tensors missing, first {name!r}" for name in missing[:1]),
        *(f"{len(unexpected)} unexpected, first {name!r}" for name in unexpected[:1]),
        *(f"{n!r} has shape {have[n]}, {expected_by} expects {want[n]}" for n in differing[:1]),
    ]
    if faults:
        raise CheckpointError(
            f"{path}: does not fit {expected_by}: {'; '.join(faults)}; "
            "use the configuration that the checkpoint was trained with"
        )


def write_checkpoint(
    run: Path,
    meta: CheckpointMeta,
    model: Mapping[str, Tensor],
    trainer: Mapping[str, Tensor],
    rank_state: Mapping[str, Tensor],
    processes: "Accelerator",
    keep_last: int = 2,
) -> Path:
    """Write `<run>/checkpoints/step_<meta.step>` so that a kill at any moment loses nothing. Every
    process calls this with its own `rank_state`; process 0 writes the rest, too.
    """
    parent = run / "checkpoints"
    final = parent / f"step_{meta.step:08d}"
    aside = parent / (TEMPORARY + final.name)  # one name for all processes: the run is locked
    rank, barrier = processes.process_index, processes.wait_for_everyone
    own = {f"rank_{rank}.safetensors": rank_state}
    try:
        with disk_errors(parent, ", lower training.keep_last"):
            if rank == 0:
                clear_abandoned(parent)
                aside.mkdir(parents=True)
                own |= {MODEL: model, TRAINER: trainer}
            barrier()
            for name, tensors in own.items():
                _write_tensors(aside / name, tensors)
            barrier()
            if rank == 0:
                ema = any(name.startswith("ema.") for name in model)
                _write_meta(aside, meta, world_size=processes.num_processes, ema=ema)
                shutil.rmtree(final, ignore_errors=True)
                os.rename(aside, final)
                flush_to_disk(parent)
                older = [path for path in reversed(_complete(parent)) if path != final]
                for path in older[keep_last - 1 :]:
                    # Renamed first, so that no half-deleted folder looks complete.
                    os.rename(path, path.with_name(TEMPORARY + path.name))
                clear_abandoned(parent)
            barrier()
    finally:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return final


def export_bundle(checkpoint: Path, out: Path, **notes: object) -> Path:
    """Write what solving needs to the new folder `out`: the moving average, where there is one;
    matrices in 8 bits, the rest in bfloat16. `notes` are added to the metadata.
    """
    folder = resolve_checkpoint(checkpoint)
    meta, tensors = read_meta(folder), {}
    for name, tensor in read_model(folder).items():
        if is_quantised(name, tensor):
            tensors[f"weights.{name}"], tensors[f"scales.{name}"] = quantise(tensor)
        else:
            tensors[f"weights.{name}"] = tensor.to(torch.bfloat16)
    added = {"exported": "ema" if meta.ema else "weights", **notes}
    aside = temporary(out)
    try:
        with disk_errors(out.parent):
            aside.mkdir(parents=True)
            _write_tensors(aside / MODEL, tensors)
            _write_meta(aside, meta, notes=meta.notes | added, int8_group=GROUP, ema=False)
            os.rename(aside, out)
            flush_to_disk(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write copies (safetensors refuses tensors that share memory), readable as the umask says."""
    path.touch()
    mode = path.stat().st_mode
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in copies.items()}, path)
    path.chmod(mode)
    flush_to_disk(path)


def _write_meta(folder: Path, meta: CheckpointMeta, **changes: object) -> None:
    files = sorted(folder.glob("*.safetensors"))
    changes["files"] = {path.name: path.stat().st_size for path in files}
    changes |= {"arctrm_version": __version__, "torch_version": torch.__version__}
    text = meta.model_copy(update=changes).model_dump_json(indent=1)
    (folder / META).write_text(text, encoding="utf-8")
    flush_to_disk(folder / META)
    flush_to_disk(folder)


def _complete(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("step_*") if (path / META).is_file())


def _read(folder: Path) -> tuple[dict[str, Any], CheckpointMeta]:
    file = folder / META
    try:
        told = read_json(file)
        if told["version"] > FORMAT_VERSION:
            raise CheckpointError(f"{file}: format version {told['version']}; upgrade arctrm")
        for key, value in RETIRED.items():
            table, _, name = key.partition(".")
            got = told["config"].get(table, {}).pop(name, value)
            if got != value:
                left = f"only {value!r} is left; {version_1.OLDER} reads it"
                raise CheckpointError(f"{folder}: {key} = {got!r}, where {left}")
        keys = CheckpointMeta.model_fields
        new = version_1.new_meta(told, folder, keys) if told["version"] == 1 else told
        meta = CheckpointMeta.model_validate(new)
        Trained.model_validate(meta.config)
        return told, meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: not a checkpoint's metadata ({reason})") from error


def _load(
    folder: Path,
    name: str,
    meta: CheckpointMeta,
    prefix: str = "",
    check: Callable[[Mapping[str, Tensor]], None] = lambda header: None,
) -> dict[str, Tensor]:
    """Tensors named `prefix`..., without the prefix; `check` sees their shapes before."""
    path, size = folder / name, meta.files.get(name)
    if size is None:
        raise CheckpointError(f"{folder}: has no {name}; give a checkpoint that training wrote")
    try:
        if (got := path.stat().st_size) != size:
            raise OSError(f"{got} bytes instead of {size}")
        with safe_open(path, framework="pt") as file:
            held = {n.removeprefix(prefix): n for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
            shapes = {name: file.get_slice(n).get_shape() for name, n in held.items()}
            check({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
            return {name: file.get_tensor(n) for name, n in held.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from error


if __name__ == "__main__":
    try:
        run, out = map(Path, sys.argv[1:])
        print(export_bundle(run, out))
    except (ArctrmError, ValueError) as error:
        usage = "usage: python -m arctrm.checkpoints RUN OUT"
        print(error if isinstance(error, ArctrmError) else usage, file=sys.stderr)
        sys.exit(2)
