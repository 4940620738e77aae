"""Matrices as integers of 8 bits or fewer, with scales: half of bfloat16 or less, for bundles.

Every `GROUP` columns of a row share a scale (symmetric: the largest magnitude becomes 127), which
leaves a fifth less error than one scale for the whole row and costs 3% more room. Integers of fewer
than 8 bits lie packed in the bytes of their row, and their scale is the one, of a few below the
largest magnitude's, that leaves the least error. Only storage is so narrow; what is read back is
float32.

Legend: N rows, M columns, G groups of columns, W bytes of a packed row.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.errors import CheckpointError
from arctrm.trm.model import TASK_TABLES

GROUP = 64
BITS = (8, 6, 5, 4)
"""Sizes of a stored integer."""
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Scales of fewer than 8 bits that are tried, as shares of the largest magnitude's."""
PACKED_TOGETHER = 8
"""The columns of a packed matrix are a multiple of this: they fill whole bytes."""


def is_layer_matrix(name: str, tensor: Tensor, bits: int = 8) -> bool:
    """Whether this is one of the matrices that make up nearly all of a model.

    With fewer than 8 `bits`: and whether its rows can be packed.
    """
    large = ".layers." in name or name.endswith(TASK_TABLES)
    matrix = large and tensor.ndim == 2 and tensor.is_floating_point()
    return matrix and (bits == 8 or tensor.shape[1] % PACKED_TOGETHER == 0)


def stored(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A matrix as a file holds it, int8 [N, M] or packed uint8 [N, W], and its scales [N, G]."""
    integers, scales = quantise(matrix, bits=bits)
    return integers if bits == 8 else pack(integers, bits), scales


def quantise(matrix: Tensor, group: int = GROUP, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Integers int8 [N, M] of so many bits, and scales bfloat16 [N, G], of a matrix [N, M]."""
    values, largest = _grouped(matrix.float(), group), 2 ** (bits - 1) - 1
    best = values.abs().amax(2) / largest
    scales, integers = _rounded(values, best, largest)
    if bits < 8:
        least = _error(values, scales, integers)
        for share in SHRUNK[1:]:
            tried, found = _rounded(values, best * share, largest)
            error = _error(values, tried, found)
            better = error < least
            scales, least = torch.where(better, tried, scales), torch.where(better, error, least)
            integers = torch.where(better[..., None], found, integers)
    return integers.flatten(1)[:, : matrix.shape[1]].contiguous(), scales


def _rounded(values_NGK: Tensor, scale_NG: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scales bfloat16 [N, G] and integers int8 [N, G, group]."""
    scales = scale_NG.to(torch.bfloat16)
    divisor = scales.float().where(scales > 0, 1.0)[..., None]  # a group of zeros stays zeros
    return scales, (values_NGK / divisor).round().clamp(-largest, largest).to(torch.int8)


def _error(values_NGK: Tensor, scales_NG: Tensor, integers_NGK: Tensor) -> Tensor:
    return (integers_NGK * scales_NG.float()[..., None] - values_NGK).square().sum(2)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers int8 [N, M] of so many bits as uint8 [N, W], W = M x bits / 8."""
    codes = (integers.int() + 2 ** (bits - 1)).numpy().astype(np.uint8)
    planes = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return torch.from_numpy(np.packbits(planes.reshape(len(codes), -1), axis=1))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The integers int8 [N, M] that `pack` stored, eight columns from `bits` bytes at a time."""
    groups = packed.numpy().reshape(len(packed), -1, bits)
    words = np.zeros(groups.shape[:2], np.uint64)
    for byte in range(bits):
        words = words << np.uint64(8) | groups[..., byte]
    shifts = np.arange(8 * bits - bits, -1, -bits, dtype=np.uint64)
    fields = words[..., None] >> shifts & np.uint64(2**bits - 1)
    integers = _values(bits)[fields.astype(np.uint8)]
    return torch.from_numpy(integers.reshape(len(packed), -1))


def _values(bits: int) -> np.ndarray:
    """int8 [2 ** bits]: the integer of each field of a packed row, whose lowest bit comes first."""
    field = np.arange(2**bits)
    lowest_first = sum((field >> (bits - 1 - bit) & 1) << bit for bit in range(bits))
    return (lowest_first - 2 ** (bits - 1)).astype(np.int8)


def dequantise(integers: Tensor, scales: Tensor, group: int) -> Tensor:
    """The matrix float32 [N, M] that `quantise` stored."""
    values = _grouped(integers.float(), group) * scales.float()[..., None]
    return values.flatten(1)[:, : integers.shape[1]].contiguous()


def dequantise_all(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    group: int | None,
    path: Path,
    bits: int = 8,
) -> dict[str, Tensor]:
    """All tensors of a file, those that have scales as float32 matrices, the others as they are.

    `group` None: there should be no integers; those of fewer than 8 `bits` are packed.

    Raises:
        CheckpointError: integers without scales or `group`, or scales that fit no integers.
    """
    dtype = torch.int8 if bits == 8 else torch.uint8
    integers = {name for name, tensor in tensors.items() if tensor.dtype == dtype}
    unexpected = sorted(integers | scales.keys() if group is None else integers ^ scales.keys())
    if unexpected:
        raise CheckpointError(
            f"{path}: {unexpected[0]!r} is not stored as checkpoint.json says (int8_group = "
            f"{group}); use another checkpoint"
        )
    if group is None:
        return dict(tensors)
    for name in integers:
        shape, got = _shape(tensors[name], bits), tuple(scales[name].shape)
        if len(shape) != 2 or got != (shape[0], -(-shape[1] // group)):
            raise CheckpointError(
                f"{path}: scales of shape {got} do not fit {name!r} of shape {shape} with one "
                f"scale for {group} columns of a row; use another checkpoint"
            )
    return {
        name: dequantise(tensor if bits == 8 else unpack(tensor, bits), scales[name], group)
        if name in integers
        else tensor
        for name, tensor in tensors.items()
    }


def _shape(held: Tensor, bits: int) -> tuple[int, ...]:
    """Shape of the matrix that a file holds."""
    shape = tuple(held.shape)
    return (*shape[:-1], shape[-1] * 8 // bits) if shape else shape


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """[N, M] -> [N, G, group], padded with zeros."""
    columns = matrix.shape[1]
    return F.pad(matrix, (0, -columns % group)).unflatten(1, (-1, group))
