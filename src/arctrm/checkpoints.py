"""Checkpoints: safetensors and JSON, written aside and renamed, read back strictly.

A checkpoint is a folder `<run>/checkpoints/step_00001234/`:

    checkpoint.json        step, config, tasks, revision, and how large every other file must be
    model.safetensors      "weights.*" as trained, "ema.*" their moving average
    trainer.safetensors    optimisers and whatever else all processes share
    rank_<k>.safetensors   per process: random state, carry

A folder under its final name is complete: until the rename it is called `.tmp-step_...`. A bundle
is the same folder without trainer and rank files; its matrices are 8-bit ("scales.*" beside
"weights.*"). Names of weights begin with `trunk.`, `adapters.` or `hub.`. Nothing is unpickled, and
loading never adapts silently: whatever differs is an error that names both sides.

`python -m arctrm.checkpoints RUN OUT` exports a bundle.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arctrm import __version__
from arctrm.config.base import StrictModel
from arctrm.config.data import DataConfig
from arctrm.config.model import (
    TINY,
    CouplingConfig,
    HubConfig,
    ReaderConfig,
    TRMConfig,
    TrunkConfig,
)
from arctrm.data.task import NUM_COLOURS
from arctrm.errors import CheckpointError
from arctrm.model.trunk import HALT_BIAS, Trunk
from arctrm.quantise import GROUP, dequantise_all, is_quantised, quantise
from arctrm.system import clear_abandoned, disk_errors, flush_to_disk, temporary

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT_VERSION = 2
META, MODEL, TRAINER = "checkpoint.json", "model.safetensors", "trainer.safetensors"
OLDER = "arctrm of commit 4e986ca"
"""The last that reads and writes version 1."""
RETIRED: dict[str, object] = {
    "reader.sequence": "pair",
    "reader.input_attention": "full",
    "reader.task_embedding": True,
    "reader.dropout": 0.0,
}
"""Key of a stored configuration that is no more -> the one value at which it is passed over."""
_ASIDE = ".tmp-"


# --- What a checkpoint says about itself


class Trained(StrictModel):
    """The part of a stored configuration that says what the weights are."""

    model_config = ConfigDict(extra="ignore")

    seed: int
    trunk: TrunkConfig
    reader: ReaderConfig
    trm: TRMConfig
    data: DataConfig
    llama_model: str = TINY
    hub: HubConfig = HubConfig()
    coupling: CouplingConfig = CouplingConfig()

    def new_trunk(self, num_tasks: int) -> Trunk:
        """An untrained trunk of this shape."""
        scaling = self.data.scaling
        return Trunk(self.trunk, num_tasks, scaling.num_ways if scaling.share else 0)


class CheckpointMeta(StrictModel):
    """Contents of `checkpoint.json`; writing fills in the second half."""

    version: int = FORMAT_VERSION
    step: int = Field(ge=0)  # optimiser steps taken
    elapsed: float = Field(ge=0)  # seconds of training, those before a resume included
    examples: int = Field(ge=0)  # rows seen, over all processes
    config: dict[str, Any]  # resolved
    voices: tuple[Literal["reader", "trm"], ...]  # of the trunk, that were trained
    task_ids: tuple[str, ...]
    """Row of the task embeddings to task id."""
    task_fingerprints: tuple[str, ...]
    """Row of the task embeddings to the fingerprint of the task's demonstrations."""
    git_revision: str = "unknown"
    data_fingerprint: str = ""
    notes: dict[str, Any] = Field(default_factory=dict)
    """Free: where the weights started, scores, a model card."""

    world_size: int = Field(1, ge=1)  # processes that wrote it
    ema: bool = False  # model.safetensors holds a moving average beside the weights
    int8_group: int | None = Field(None, ge=1, le=2**16)
    """Columns of a row that share a scale in the matrices stored as integers; None: no integers."""
    files: dict[str, int] = Field(default_factory=dict)  # name to size in bytes
    arctrm_version: str = ""
    torch_version: str = ""

    @property
    def trained(self) -> Trained:
        """What the weights are."""
        return Trained.model_validate(self.config)

    def rows_of(self, fingerprints: Iterable[str]) -> list[int | None]:
        """The embedding row of each task, found by content; None where there is none."""
        known = {key: row for row, key in enumerate(self.task_fingerprints)}
        return [known.get(key) for key in fingerprints]


# --- Reading


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run folder, or None."""
    found = _complete(run / "checkpoints")
    return found[-1] if found else None


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a run folder (its latest), a checkpoint or a bundle folder."""
    if (path / META).is_file():
        return path
    latest = latest_checkpoint(path)
    if latest is None:
        what = "no checkpoint" if path.is_dir() else "not a folder"
        raise CheckpointError(
            f"{path}: {what}; give a run folder (with checkpoints/step_...), a checkpoint folder "
            f"or a bundle folder (with {META} and {MODEL})"
        )
    return latest


def read_meta(path: Path) -> CheckpointMeta:
    """What a run's latest checkpoint, a checkpoint or a bundle says; version 1 as version 2."""
    return _read(resolve_checkpoint(path))[1]


def read_model(
    path: Path,
    *,
    ema: bool = True,
    expected: Mapping[str, Iterable[int]] | None = None,
    part: str = "",
) -> dict[str, Tensor]:
    """Weights of a run's latest checkpoint, a checkpoint or a bundle: float32 on the CPU.

    With `ema`, the moving average; the weights as trained where the run kept no average. Names and
    shapes that are `expected` are compared before a tensor is read. `part`: only names that begin
    so. Errors: a file is missing, truncated, or not what the metadata or you expect.
    """
    folder = resolve_checkpoint(path)
    told, meta = _read(folder)

    def of_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        new = upgraded(told, tensors, folder)[1]
        return {name: tensor for name, tensor in new.items() if name.startswith(part)}

    def check(header: dict[str, Tensor]) -> None:
        if expected is not None:
            check_names(expected, of_part(header), folder / MODEL)

    prefix = "ema." if ema and meta.ema else "weights."
    tensors = _load(folder, MODEL, meta, prefix, check)
    scales = _load(folder, MODEL, meta, "scales.")
    tensors = dequantise_all(tensors, scales, meta.int8_group, folder / MODEL)
    return of_part({name: tensor.float() for name, tensor in tensors.items()})


def read_trunk(path: Path) -> tuple[Trunk, CheckpointMeta]:
    """The trunk alone of a checkpoint, float32 on the CPU; errors as `read_model`."""
    folder = resolve_checkpoint(path)
    meta = read_meta(folder)
    with torch.device("meta"):
        trunk = meta.trained.new_trunk(len(meta.task_ids))
    wanted = {f"trunk.{name}": tensor.shape for name, tensor in trunk.state_dict().items()}
    weights = read_model(folder, expected=wanted, part="trunk.")
    trunk.load_state_dict({n.removeprefix("trunk."): t for n, t in weights.items()}, assign=True)
    return trunk, meta


def read_state(folder: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """What all processes of a run share, and what was process `rank`'s own, if it was there."""
    told, meta = _read(folder)
    if told["version"] != FORMAT_VERSION:
        raise CheckpointError(f"{folder}: a run of format version 1; {OLDER} resumes it")
    own = _load(folder, f"rank_{rank}.safetensors", meta) if rank < meta.world_size else None
    return _load(folder, TRAINER, meta), own


def check_names(
    expected: Mapping[str, Iterable[int]],
    got: Mapping[str, Tensor],
    path: Path,
    expected_by: str = "the model",
) -> None:
    """Compare names and shapes of tensors; the error names the first of each kind that differs."""
    want = {name: tuple(shape) for name, shape in expected.items()}
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


# --- Version 1


def upgraded(
    told: dict[str, Any], tensors: Mapping[str, Tensor], where: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and weights of version 1 as version 2 has them; those of version 2 as they are.

    A tiny reader becomes a trunk whose TRM voice is untrained; a TRM and adapters beside it go.
    """
    if told["version"] != 1:
        return told, dict(tensors)
    config, notes = told["config"], told["notes"]
    is_joint, reader = "coupling" in config, config.get("reader", {})
    kind = config.get("llama_model") if is_joint else config.get("model")
    if kind != (TINY if is_joint else "reader") or not notes.get("task_fingerprints"):
        raise CheckpointError(f"{where}: format version 1 without a tiny reader; {OLDER} reads it")
    said = notes.get("parts", {}).get("reader", {})  # of a hybrid: how its reader was trained
    data = {**config["data"], "scaling": reader["scaling"]}
    tables = (("trunk", TrunkConfig, reader), ("reader", ReaderConfig, reader))
    new = {key: told[key] for key in CheckpointMeta.model_fields if key in told} | {
        "version": FORMAT_VERSION,
        **{key: said.get(key, told[key]) for key in ("step", "elapsed", "examples")},
        "config": {
            "seed": said.get("seed", config["seed"]),
            "voice": "reader",
            "trm": {},
            **{
                table: {key: held[key] for key in model.model_fields if key in held}
                for table, model, held in (*tables, ("data", DataConfig, data))
            },
        },
        "voices": ("reader",),
        "task_fingerprints": notes["task_fingerprints"],
        "notes": {"upgraded": "from version 1: the TRM voice is untrained", "reader": said},
        "files": {name: record["size"] for name, record in told["files"].items()},
    }
    first = "reader." if is_joint else ""
    old = {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}
    return new, _trunk_of_version_1(old) if tensors else {}


_RENAMED = (
    (r"^llama\.(model\.)?|self_attn\.|mlp\.|\.weights$", ""),
    (r"^(embed_tokens|norm)\.weight", r"\1"),
    (r"input_layernorm\.weight", "input_norm"),
    (r"post_attention_layernorm\.weight", "post_norm"),
    (r"^lm_head", "head"),
    (r"^injection\.", "injections."),
    (r"^puzzle_emb", "task_emb"),
    (r"^colour_flag_emb", "colours_emb"),
)
_FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


def _trunk_of_version_1(old: dict[str, Tensor]) -> dict[str, Tensor]:
    trunk = dict(old)
    for pattern, new in _RENAMED:
        trunk = {re.sub(pattern, new, name): tensor for name, tensor in trunk.items()}
    for fused, parts in _FUSED.items():
        for first in [name for name in trunk if name.endswith(f".{parts[0]}.weight")]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in trunk for name in names):  # else whoever loads the trunk says so
                joined = torch.cat([trunk.pop(name) for name in names])
                trunk[first.replace(parts[0], f"{fused}_proj")] = joined
    norm, head, tasks = (trunk[name] for name in ("norm", "head.weight", "task_emb"))
    trunk.pop("mosaic_emb", None)
    trunk = {"inverse_emb": torch.zeros_like(tasks), "scale_emb": tasks[:0]} | trunk
    trunk |= {
        "own_head.weight": head[:NUM_COLOURS].clone(),
        "halt_head.weight": norm.new_zeros(1, len(norm)),
        "halt_head.bias": norm.new_full((1,), HALT_BIAS),
        "feedback.layers.0.weight": norm.new_zeros(len(norm), len(norm)),
        "voice_emb": torch.zeros_like(norm),
    }
    return {f"trunk.{name}": tensor for name, tensor in trunk.items()}


# --- Writing


def write_checkpoint(
    run: Path,
    meta: CheckpointMeta,
    model: Mapping[str, Tensor],
    trainer: Mapping[str, Tensor],
    rank_state: Mapping[str, Tensor],
    processes: "Accelerator",
    keep_last: int = 2,
) -> Path:
    """Write `<run>/checkpoints/step_<meta.step>` so that a kill at any moment loses nothing.

    Every process calls this with its own `rank_state`; only process 0 writes the rest: `model`
    ("weights.*" and "ema.*"), `trainer` (what all share), the metadata.

    Raises:
        ResourceError, CheckpointError: as `system.disk_errors`; older checkpoints are whole.
    """
    parent = run / "checkpoints"
    final = parent / f"step_{meta.step:08d}"
    aside = parent / (_ASIDE + final.name)  # one name for all processes: the run is locked
    rank, barrier = processes.process_index, processes.wait_for_everyone
    own = {f"rank_{rank}.safetensors": rank_state}
    try:
        with disk_errors(parent):
            if rank == 0:
                clear_abandoned(parent)
                aside.mkdir(parents=True)
                own |= {MODEL: model, TRAINER: trainer}
            barrier()
            for name, tensors in own.items():
                _write_tensors(aside / name, tensors)
            barrier()
            if rank == 0:
                _write_meta(aside, meta, world_size=processes.num_processes)
                shutil.rmtree(final, ignore_errors=True)
                os.rename(aside, final)
                flush_to_disk(parent)
                older = [path for path in _complete(parent) if path != final]
                for path in older[: max(len(older) - (keep_last - 1), 0)]:
                    # Renamed first, so that no half-deleted folder looks complete.
                    os.rename(path, path.with_name(_ASIDE + path.name))
                clear_abandoned(parent)
            barrier()
    finally:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return final


def export_bundle(checkpoint: Path, out: Path, **notes: object) -> Path:
    """Write what solving needs of a checkpoint to the new folder `out`: the moving average, where
    there is one; matrices in 8 bits, the rest in bfloat16. `notes` are added to the metadata.
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
            _write_meta(aside, meta, notes=meta.notes | added, int8_group=GROUP)
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
    with safe_open(folder / MODEL, framework="pt") as file:
        ema = any(name.startswith("ema.") for name in file.keys())  # noqa: SIM118
    changes |= {"files": {path.name: path.stat().st_size for path in files}, "ema": ema}
    changes |= {"arctrm_version": __version__, "torch_version": torch.__version__}
    text = meta.model_copy(update=changes).model_dump_json(indent=1)
    (folder / META).write_text(text, encoding="utf-8")
    flush_to_disk(folder / META)
    flush_to_disk(folder)


def _complete(parent: Path) -> list[Path]:
    """Complete checkpoints by step."""
    return sorted(path for path in parent.glob("step_*") if (path / META).is_file())


# --- Files against the metadata


def _read(folder: Path) -> tuple[dict[str, Any], CheckpointMeta]:
    """`checkpoint.json` as it stands, and what it says in version 2."""
    file = folder / META
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format version {told['version']} is newer than {FORMAT_VERSION}, the "
                "newest this arctrm reads; upgrade arctrm"
            )
        for key, value in RETIRED.items():
            table, _, name = key.partition(".")
            got = told["config"].get(table, {}).pop(name, value)
            if got != value:
                raise CheckpointError(
                    f"{folder}: {key} = {got!r}, where only {value!r} is left; {OLDER} reads it"
                )
        meta = CheckpointMeta.model_validate(upgraded(told, {}, folder)[0])
        Trained.model_validate(meta.config)
        if len(meta.task_ids) != len(meta.task_fingerprints):
            raise ValueError(f"{len(meta.task_fingerprints)} fingerprints of {len(meta.task_ids)}")
        return told, meta
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CheckpointError(
            f"{file}: not a checkpoint's metadata ({reason}); use another checkpoint"
        ) from error


def _load(
    folder: Path,
    name: str,
    meta: CheckpointMeta,
    prefix: str = "",
    check: Callable[[dict[str, Tensor]], None] = lambda header: None,
) -> dict[str, Tensor]:
    """Tensors of a file that begin with `prefix`, which is removed; `check` sees them before they
    are read, on the meta device.
    """
    path, size = folder / name, meta.files.get(name)
    if size is None:
        raise CheckpointError(
            f"{folder}: has no {name}, so training cannot resume from it; give a checkpoint folder "
            "that training wrote"
        )
    try:
        got = path.stat().st_size
        if got != size:
            what = "truncated" if got < size else "not the file that was written"
            problem = f"{path}: {what} ({got} bytes, {size} expected); use another checkpoint"
            raise CheckpointError(problem)
        with safe_open(path, framework="pt") as file:
            held = {n.removeprefix(prefix): n for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
            shapes = {name: file.get_slice(n).get_shape() for name, n in held.items()}
            check({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
            return {name: file.get_tensor(n) for name, n in held.items()}
    except (OSError, SafetensorError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise CheckpointError(f"{path}: {what}; use another checkpoint") from error


if __name__ == "__main__":
    print(export_bundle(Path(sys.argv[1]), Path(sys.argv[2])))
