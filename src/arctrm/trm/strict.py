"""Strict comparison of tensor names and shapes: what is loaded must be what is expected."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from arctrm.errors import CheckpointError


def check_names(
    expected: Mapping[str, Iterable[int]],
    got: Mapping[str, Tensor | Iterable[int]],
    path: Path,
    *,
    expected_by: str = "the model",
) -> None:
    """Compare tensor names and shapes; `got` may hold tensors or shapes.

    Raises:
        CheckpointError: names the first missing, first unexpected and first differing tensor.
    """
    want = {name: tuple(shape) for name, shape in expected.items()}
    have = {name: tuple(getattr(value, "shape", value)) for name, value in got.items()}
    missing = [name for name in want if name not in have]
    unexpected = [name for name in have if name not in want]
    differing = [name for name in want if name in have and want[name] != have[name]]
    faults = [
        f"{len(missing)} tensors missing, first {missing[0]!r}" if missing else "",
        f"{len(unexpected)} unexpected, first {unexpected[0]!r}" if unexpected else "",
        f"{differing[0]!r} has shape {have[differing[0]]}, {expected_by} expects "
        f"{want[differing[0]]}"
        if differing
        else "",
    ]
    if any(faults):
        raise CheckpointError(
            f"{path}: does not fit {expected_by}: {'; '.join(filter(None, faults))}; "
            "use the configuration that the checkpoint was trained with"
        )
