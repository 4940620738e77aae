"""Matrices as 8-bit integers with scales: half of bfloat16, for bundles.

Every `GROUP` columns of a row share a scale (symmetric: the largest magnitude becomes 127), which
leaves a fifth less error than one scale for the whole row. What is read back is float32.

Legend: N rows, M columns, G groups of columns.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.errors import CheckpointError
from arctrm.model.trunk import TASK_TABLES

GROUP = 64
LARGEST = 127


def is_quantised(name: str, tensor: Tensor) -> bool:
    """Whether a bundle stores it in 8 bits: matrices of layers (not of a hub), task tables."""
    large = ".layers." in f".{name}" or name.endswith(TASK_TABLES)
    own = not name.startswith("hub.")
    return own and large and tensor.ndim == 2 and tensor.is_floating_point()


def quantise(matrix: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Integers int8 [N, M] and scales bfloat16 [N, G] of a matrix [N, M]."""
    padded = F.pad(matrix.float(), (0, -matrix.shape[1] % group))
    values = padded.unflatten(1, (-1, group))  # (N, G, group)
    scales = (values.abs().amax(2) / LARGEST).to(torch.bfloat16)
    divisor = scales.float().where(scales > 0, 1.0)[..., None]  # a group of zeros stays zeros
    integers = (values / divisor).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return integers.flatten(1)[:, : matrix.shape[1]].contiguous(), scales


def dequantise(integers: Tensor, scales: Tensor, group: int = GROUP) -> Tensor:
    """The matrix float32 [N, M] that `quantise` stored."""
    group_of = torch.arange(integers.shape[1]) // group  # no more memory than the matrix
    return integers.float() * scales.float()[:, group_of]


def dequantise_all(
    tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor], group: int | None, path: Path
) -> dict[str, Tensor]:
    """All tensors of the file `path`, integers as float32; `group` None: there should be none."""
    found = dict(tensors)
    integers = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    for name in sorted(integers | scales.keys()):
        shape, got = (list(x[name].shape) if name in x else [] for x in (tensors, scales))
        wanted = [shape[0], -(-shape[1] // group)] if group and len(shape) == 2 else None
        if group is None or name not in integers or got != wanted:
            raise CheckpointError(
                f"{path}: {name!r} {shape} with scales {got} is not stored as checkpoint.json says "
                f"(int8_group = {group}); use another checkpoint"
            )
        found[name] = dequantise(tensors[name], scales[name], group)
    return found
