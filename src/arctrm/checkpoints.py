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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arctrm import __version__
from arctrm.config import (
    TINY,
    CouplingConfig,
    DataConfig,
    HubConfig,
    ReaderConfig,
    StrictModel,
    TRMConfig,
    TrunkConfig,
)
from arctrm.data.task import NUM_COLOURS
from arctrm.errors import CheckpointError
from arctrm.model.trunk import HALT_BIAS, Trunk
from arctrm.quantise import GROUP, dequantise_all, is_quantised, quantise
from arctrm.system import clear_abandoned, disk_errors, flush_to_disk, temporary

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
    """Format of the folder."""
    step: int = Field(ge=0)
    """Optimiser steps taken."""
    elapsed: float = Field(ge=0)
    """Seconds of training, those before a resume included."""
    examples: int = Field(ge=0)
    """Examples (rows x supervision steps) seen, over all processes."""
    config: dict[str, Any]
    """The resolved configuration."""
    voices: tuple[Literal["reader", "trm"], ...]
    """Voices of the trunk that were trained."""
    task_ids: tuple[str, ...]
    """Row of the task embeddings to task id."""
    task_fingerprints: tuple[str, ...]
    """Row of the task embeddings to the fingerprint of the task's demonstrations."""
    git_revision: str = "unknown"
    """Revision of arctrm that trained."""
    data_fingerprint: str = ""
    """Fingerprint of the data trained on."""
    notes: dict[str, Any] = Field(default_factory=dict)
    """Free: where the weights started, scores, a model card."""

    world_size: int = Field(1, ge=1)
    """Processes that wrote it."""
    ema: bool = False
    """Whether model.safetensors holds a moving average beside the weights."""
    int8_group: int | None = Field(None, ge=1, le=2**16)
    """Columns of a row that share a scale in the matrices stored as integers; None: no integers."""
    files: dict[str, int] = Field(default_factory=dict)
    """File name to its size in bytes."""
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
    """The checkpoint meant by a run folder (its latest), a checkpoint folder or a bundle folder.

    Raises:
        CheckpointError: there is none.
    """
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
    """What a run's latest checkpoint, a checkpoint or a bundle says; version 1 as version 2.

    Raises:
        CheckpointError: missing, not JSON, from a newer format, or not a checkpoint's metadata.
    """
    return _read(resolve_checkpoint(path))[1]


def read_model(
    path: Path, *, ema: bool = True, expected: Mapping[str, Iterable[int]] | None = None
) -> dict[str, Tensor]:
    """Weights of a run's latest checkpoint, a checkpoint or a bundle: float32 on the CPU.

    With `ema`, the moving average; the weights as trained where the run kept no average. Where
    names and shapes are `expected`, they are compared before a tensor is read.

    Raises:
        CheckpointError: a file is missing, truncated, or not what the metadata or you expect.
    """
    folder = resolve_checkpoint(path)
    told, meta = _read(folder)
    prefix = "ema." if ema and meta.ema else "weights."
    with _opened(folder, MODEL, meta) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        if expected is not None:
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            header = {
                n.removeprefix(prefix): torch.empty(s, device="meta") for n, s in shapes.items()
            }
            check_names(expected, upgraded(told, header, folder)[1], folder / MODEL)
        stored = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    scales = _load(folder, MODEL, meta, "scales.")
    tensors = dequantise_all(stored, scales, meta.int8_group, folder / MODEL)
    return upgraded(told, {name: t.float() for name, t in tensors.items()}, folder)[1]


def read_trunk(path: Path) -> tuple[Trunk, CheckpointMeta]:
    """The trunk alone of a checkpoint, float32 on the CPU; errors as `read_model`."""
    folder = resolve_checkpoint(path)
    meta = read_meta(folder)
    with torch.device("meta"):  # compared before anything of the configured size is made
        trunk = meta.trained.new_trunk(len(meta.task_ids))
    weights = {
        name.removeprefix("trunk."): tensor
        for name, tensor in read_model(folder).items()
        if name.startswith("trunk.")
    }
    check_names({n: t.shape for n, t in trunk.state_dict().items()}, weights, folder / MODEL)
    trunk.load_state_dict(weights, assign=True)
    return trunk, meta


def read_trainer(path: Path) -> dict[str, Tensor]:
    """State that all processes of a run share; errors as `read_model`."""
    told, meta = _read(path)
    if told["version"] != FORMAT_VERSION:
        raise CheckpointError(f"{path}: a run of format version 1; {OLDER} resumes it")
    return _load(path, TRAINER, meta)


def read_rank(path: Path, rank: int) -> dict[str, Tensor]:
    """State of process `rank`; errors as `read_model`."""
    return _load(path, f"rank_{rank}.safetensors", _read(path)[1])


def check_names(
    expected: Mapping[str, Iterable[int]],
    got: Mapping[str, Tensor],
    path: Path,
    expected_by: str = "the model",
) -> None:
    """Compare names and shapes of tensors.

    Raises:
        CheckpointError: names the first missing, first unexpected and first differing tensor.
    """
    want = {name: tuple(shape) for name, shape in expected.items()}
    have = {name: tuple(tensor.shape) for name, tensor in got.items()}
    missing, unexpected = (sorted(a.keys() - b.keys()) for a, b in ((want, have), (have, want)))
    differing = [name for name in want if have.get(name, want[name]) != want[name]]
    faults = [f"{len(missing)} tensors missing, first {missing[0]!r}"] if missing else []
    faults += [f"{len(unexpected)} unexpected, first {unexpected[0]!r}"] if unexpected else []
    for name in differing[:1]:
        faults += [f"{name!r} has shape {have[name]}, {expected_by} expects {want[name]}"]
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

    Raises:
        CheckpointError: there is no tiny reader, or one that is no more.
    """
    if told["version"] != 1:
        return told, dict(tensors)
    config, notes = told["config"], told["notes"]
    is_joint, reader = "coupling" in config, config.get("reader", {})
    kind = config.get("llama_model") if is_joint else config.get("model")
    if kind != (TINY if is_joint else "reader") or not notes.get("task_fingerprints"):
        raise CheckpointError(f"{where}: format version 1 without a tiny reader; {OLDER} reads it")
    said = notes.get("parts", {}).get("reader", {})
    new = {
        "version": FORMAT_VERSION,
        **{key: said.get(key, told[key]) for key in ("step", "elapsed", "examples")},
        "config": {
            "seed": said.get("seed", config["seed"]),
            "voice": "reader",
            "trunk": {key: reader[key] for key in TrunkConfig.model_fields if key in reader},
            "reader": {"input_attention": "causal", **reader},
            "trm": {},
            "data": {**config["data"], "scaling": reader["scaling"]},
        },
        "voices": ("reader",),
        "task_fingerprints": notes["task_fingerprints"],
        "notes": {"upgraded": "from version 1: the TRM voice is untrained", "reader": said},
        "files": {name: record["size"] for name, record in told["files"].items()},
    }
    same = ("task_ids", "git_revision", "data_fingerprint", "world_size", "ema", "int8_group")
    new |= {key: told[key] for key in (*same, "arctrm_version", "torch_version") if key in told}
    kept = {"trunk": TrunkConfig, "reader": ReaderConfig, "data": DataConfig}
    for table, model in kept.items():
        known = {*model.model_fields, *(key.partition(".")[2] for key in RETIRED)}
        held = new["config"][table]
        new["config"][table] = {key: held[key] for key in held if key in known}
    first = "reader." if is_joint else ""
    old = {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}
    return new, _trunk_of_version_1(old) if tensors else {}


_NAMES = {
    "embed_tokens": ("llama.model.embed_tokens.weight",),
    "norm": ("llama.model.norm.weight",),
    "head.weight": ("llama.lm_head.weight",),
    "task_emb": ("puzzle_emb.weights",),
    "inverse_emb": ("inverse_emb.weights",),
    "dihedral_emb": ("dihedral_emb.weights",),
    "colours_emb": ("colour_flag_emb.weights",),
    "scale_emb": ("scale_emb.weights",),
}
_LAYER_NAMES = {
    "qkv_proj.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "o_proj.weight": ("self_attn.o_proj.weight",),
    "gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down_proj.weight": ("mlp.down_proj.weight",),
    "input_norm": ("input_layernorm.weight",),
    "post_norm": ("post_attention_layernorm.weight",),
}
"""Name in version 2 -> those of the matrices that it consists of in version 1."""


def _trunk_of_version_1(old: dict[str, Tensor]) -> dict[str, Tensor]:
    names = dict(_NAMES)
    for name in old:
        if found := re.fullmatch(r"injection\.(layers\.\d+\.weight)", name):
            names[f"injections.{found[1]}"] = (name,)
        if found := re.fullmatch(r"llama\.model\.(layers\.\d+)\.input_layernorm\.weight", name):
            for new, parts in _LAYER_NAMES.items():
                names[f"{found[1]}.{new}"] = tuple(f"llama.model.{found[1]}.{p}" for p in parts)
    # (A part that is absent leaves its name out: whoever loads the trunk says what is missing.)
    trunk = {
        new: torch.cat([old[part] for part in parts])
        for new, parts in names.items()
        if all(part in old for part in parts)
    }
    norm, head, tasks = (trunk[name] for name in ("norm", "head.weight", "task_emb"))
    trunk.setdefault("inverse_emb", torch.zeros_like(tasks))
    trunk.setdefault("scale_emb", tasks[:0])
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
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    keep_last: int = 2,
) -> Path:
    """Write `<run>/checkpoints/step_<meta.step>` so that a kill at any moment loses nothing.

    Every process calls this with its own `rank_state`; only process 0 writes the rest: `model`
    ("weights.*" and "ema.*"), `trainer` (what all share), the metadata. `barrier` waits for all.

    Raises:
        ResourceError: the disk is full; the temporary folder is gone, older checkpoints are whole.
        CheckpointError: the folder cannot be written.
    """
    parent = run / "checkpoints"
    final = parent / f"step_{meta.step:08d}"
    aside = parent / (_ASIDE + final.name)  # one name for all processes: the run is locked
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
                _write_meta(aside, meta.model_copy(update={"world_size": world_size}))
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
    """Write what solving needs of a checkpoint to the new folder `out`: one set of weights.

    The moving average, where there is one, becomes the weights: matrices in 8 bits, the rest in
    bfloat16. `notes` are added to the metadata. Errors as `read_model` and `write_checkpoint`.
    """
    folder = resolve_checkpoint(checkpoint)
    meta = read_meta(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_model(folder).items():
        if is_quantised(name, tensor):
            tensors[f"weights.{name}"], tensors[f"scales.{name}"] = quantise(tensor)
        else:
            tensors[f"weights.{name}"] = tensor.to(torch.bfloat16)
    added = {"exported": "ema" if meta.ema else "weights", **notes}
    changes = {"notes": meta.notes | added, "int8_group": GROUP, "version": FORMAT_VERSION}
    aside = temporary(out)
    try:
        with disk_errors(out.parent):
            aside.mkdir(parents=True)
            _write_tensors(aside / MODEL, tensors)
            _write_meta(aside, meta.model_copy(update=changes))
            os.rename(aside, out)
            flush_to_disk(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write copies (safetensors refuses tensors that share memory), readable as files usually are.

    safetensors leaves a file that only its owner may read; the umask decides elsewhere.
    """
    path.touch()
    mode = path.stat().st_mode
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in copies.items()}, path)
    path.chmod(mode)
    flush_to_disk(path)


def _write_meta(folder: Path, meta: CheckpointMeta) -> None:
    files = sorted(folder.glob("*.safetensors"))
    with safe_open(folder / MODEL, framework="pt") as file:
        ema = any(name.startswith("ema.") for name in file.keys())  # noqa: SIM118
    filled = {
        "files": {path.name: path.stat().st_size for path in files},
        "ema": ema,
        "arctrm_version": __version__,
        "torch_version": torch.__version__,
    }
    text = meta.model_copy(update=filled).model_dump_json(indent=1)
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
        version = told["version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format version {version} is newer than {FORMAT_VERSION}, the newest this "
                "arctrm reads; upgrade arctrm"
            )
        new = upgraded(told, {}, folder)[0]
        for key, value in RETIRED.items():
            table, _, name = key.partition(".")
            got = new["config"].get(table, {}).pop(name, value)
            if got != value:
                raise CheckpointError(
                    f"{folder}: {key} = {got!r}, where only {value!r} is left; {OLDER} reads it"
                )
        meta = CheckpointMeta.model_validate(new)
        if len(meta.task_ids) != len(meta.task_fingerprints):
            raise ValueError(f"{len(meta.task_fingerprints)} fingerprints of {len(meta.task_ids)}")
        Trained.model_validate(meta.config)
        return told, meta
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        key, got = ".".join(map(str, first["loc"])), first["input"]
        shown = "" if isinstance(got, dict | list) else f" = {got!r}"
        raise CheckpointError(
            f"{file}: {key}{shown}: {first['msg']}; use another checkpoint"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(
            f"{file}: not a checkpoint's metadata ({reason}); use another checkpoint"
        ) from error


@contextmanager
def _opened(folder: Path, name: str, meta: CheckpointMeta) -> Iterator[Any]:
    """One file of a checkpoint, if it is the one that was written.

    Raises:
        CheckpointError: it is not part of the checkpoint, missing, truncated or damaged.
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
            raise CheckpointError(
                f"{path}: {what} ({got} bytes, {size} expected); use another checkpoint"
            )
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; use another checkpoint") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from error


def _load(folder: Path, name: str, meta: CheckpointMeta, prefix: str = "") -> dict[str, Tensor]:
    with _opened(folder, name, meta) as file:
        wanted = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        return {key.removeprefix(prefix): file.get_tensor(key) for key in wanted}


if __name__ == "__main__":
    print(export_bundle(Path(sys.argv[1]), Path(sys.argv[2])))
