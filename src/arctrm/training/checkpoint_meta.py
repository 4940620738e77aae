"""What a checkpoint says about itself, and the strict reading of its files against that.

Loading never adapts silently: whatever differs is an error that names both sides.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arctrm.config.base import StrictModel
from arctrm.errors import CheckpointError
from arctrm.trm.strict import check_names

FORMAT_VERSION = 1
META = "checkpoint.json"
Shape = tuple[int, ...]


class FileRecord(StrictModel):
    """What one safetensors file must hold."""

    size: int
    """Bytes."""
    tensors: dict[str, Shape]
    """Name to shape."""

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file as it lies on the disk; reads its header only."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return cls(size=path.stat().st_size, tensors=tensors)


class CheckpointMeta(StrictModel):
    """Contents of `checkpoint.json`; `write_checkpoint` fills in the second half."""

    version: int = FORMAT_VERSION
    """Format of the folder."""
    step: int
    """Optimiser steps taken."""
    elapsed: float
    """Seconds of training, those before a resume included."""
    examples: int
    """Examples (row x supervision step) seen, over all processes."""
    config: dict[str, Any]
    """The resolved configuration."""
    task_ids: tuple[str, ...]
    """The id map: row of the task embedding to task id."""
    git_revision: str = "unknown"
    """Revision of arctrm that trained."""
    data_fingerprint: str = ""
    """Fingerprint of the data trained on."""
    notes: dict[str, Any] = Field(default_factory=dict)
    """Free: scores, a model card."""

    world_size: int = 1
    """Processes that wrote it."""
    ema: bool = False
    """Whether model.safetensors holds a moving average beside the weights."""
    int8_group: int | None = Field(None, ge=1)
    """Columns of a row that share a scale ("scales.*") in the matrices stored as integers; None:
    all weights are stored as floats."""
    integer_bits: Literal[8, 6, 5, 4] = 8
    """Bits of those integers; fewer than 8 are packed."""
    files: dict[str, FileRecord] = Field(default_factory=dict)
    """File name to what it must hold."""
    arctrm_version: str = ""
    torch_version: str = ""
    python_version: str = ""


def read_meta(path: Path) -> CheckpointMeta:
    """Read `checkpoint.json` of a checkpoint or bundle folder.

    Raises:
        CheckpointError: missing, not JSON, from a newer format, or not a checkpoint's metadata.
    """
    file = path / META
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}); use another checkpoint") from error
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {version} is newer than {FORMAT_VERSION}, the newest this "
            "arctrm reads; upgrade arctrm"
        )
    try:
        return CheckpointMeta.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole file"
        raise CheckpointError(f"{file}: {key}: {first['msg']}; use another checkpoint") from error


def load_tensors(
    folder: Path, name: str, meta: CheckpointMeta, prefix: str = ""
) -> dict[str, Tensor]:
    """Tensors of one file whose names begin with `prefix`, which is removed; on the CPU.

    Raises:
        CheckpointError: the file is not part of the checkpoint, missing, truncated, damaged, or
            holds other tensors than the metadata says.
    """
    path, record = folder / name, meta.files.get(name)
    if record is None:
        raise CheckpointError(
            f"{folder}: has no {name}, so training cannot resume from it; give a checkpoint folder "
            "that training wrote"
        )
    _check_size(path, record.size)
    try:
        check_names(record.tensors, FileRecord.of(path).tensors, path, expected_by=META)
        with safe_open(path, framework="pt") as file:
            wanted = [key for key in record.tensors if key.startswith(prefix)]
            return {key.removeprefix(prefix): file.get_tensor(key) for key in wanted}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from error


def check_id_map(
    ids: Iterable[str], other_ids: Iterable[str], where: str = "checkpoint", other: str = "data"
) -> None:
    """Compare two id maps (row to task id).

    Raises:
        CheckpointError: names the first row that differs, on both sides.
    """
    for row, (a, b) in enumerate(zip_longest(ids, other_ids)):
        if a != b:
            left, right = (repr(i) if i is not None else "absent" for i in (a, b))
            raise CheckpointError(
                f"id map: row {row} is {left} in {where} and {right} in {other}; "
                "use the data that the checkpoint was trained on"
            )


def check_same_config(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    ignore: Iterable[str] = (),
    where: str = "checkpoint",
) -> None:
    """Compare two resolved configurations key by key.

    Args:
        saved: the checkpoint's (`meta.config`).
        current: this run's; anything JSON can hold, paths included.
        ignore: dotted keys that may differ, such as "out", "tracking" or "training.schedule".
        where: what to call the checkpoint.

    Raises:
        CheckpointError: names the first key that differs, with both values.
    """
    left, right = _flatten(saved), _flatten(current)
    allowed = tuple(ignore)
    for key in sorted(left.keys() | right.keys()):
        if any(key == name or key.startswith(f"{name}.") for name in allowed):
            continue
        if left.get(key, "absent") != right.get(key, "absent"):
            raise CheckpointError(
                f"{where}: {key} = {left.get(key, 'absent')} there, "
                f"{right.get(key, 'absent')} now; resume with the same value, or start anew in "
                "another folder"
            )


def _flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key to JSON text of the value; what JSON cannot tell apart (a tuple) is equal."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{name}": text for name, text in _flatten(value).items()}
        else:
            flat[key] = json.dumps(value, default=str)
    return flat


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; use another checkpoint")
    got = path.stat().st_size
    if got != size:
        what = "truncated" if got < size else "not the file that was written"
        raise CheckpointError(
            f"{path}: {what} ({got} bytes, {size} expected); use another checkpoint"
        )
