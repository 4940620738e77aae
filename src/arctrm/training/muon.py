"""Muon for many matrices at once: the update of `torch.optim.Muon`, in batched products.

Newton-Schulz is a chain of small matrix products. One matrix at a time, they take longer to launch
than to compute, so matrices of one shape (or its transpose) go through it as one stack. A step
never waits for the device, and with a rate in a tensor it can be captured in a CUDA graph.

Shapes: N matrices of one shape, R rows and C columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: https://kellerjordan.github.io/posts/muon/."""
NUM_ITERATIONS = 5
EPS = 1e-7


class Muon(Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay.

    The rate of an [R, C] matrix is `lr` x sqrt(max(1, R / C)). `lr` is a number, or a tensor of no
    dimension on the device of the matrices. Newton-Schulz runs in `dtype`.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float | Tensor,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(list(matrices), defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if moved:
                self._move(moved, group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in matrices if p.grad is not None]
        momenta = [self._momentum(p) for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for shapes in _by_shape(matrices):
            stacks = [
                torch.stack([directions[i] for i in alike]).to(self.dtype) for alike in shapes
            ]
            for alike, update_NRC in zip(shapes, _orthogonal(stacks), strict=True):
                num_rows, num_columns = update_NRC.shape[1:]
                rate = group["lr"] * math.sqrt(max(1.0, num_rows / num_columns))
                moves = update_NRC.to(torch.float32, memory_format=torch.contiguous_format)
                torch._foreach_add_([matrices[i] for i in alike], moves.mul_(-rate).unbind())

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def _by_shape(matrices: list[Tensor]) -> list[list[list[int]]]:
    """Indices of the matrices: those of one shape and of its transpose, each of the two a list."""
    shapes: dict[tuple[int, int], dict[torch.Size, list[int]]] = defaultdict(dict)
    for index, matrix in enumerate(matrices):
        smaller, larger = sorted(matrix.shape)
        shapes[smaller, larger].setdefault(matrix.shape, []).append(index)
    return [list(alike.values()) for alike in shapes.values()]


def _orthogonal(stacks: list[Tensor]) -> list[Tensor]:
    """Bring the singular values of each matrix near 1; stacks [N, R, C] of a shape and [M, C, R].

    The products are of the size of the smaller side, whichever way the matrices came.
    """
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in stacks]
    result = _newton_schulz(wide[0] if len(wide) == 1 else torch.cat(wide))
    parts = result.split([len(x) for x in stacks])
    return [
        part.mT if x.shape[1] > x.shape[2] else part for x, part in zip(stacks, parts, strict=True)
    ]


def _newton_schulz(x_NRC: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    norm_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True)
    x_NRC = x_NRC / norm_N11.clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        change_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, change_NRR, x_NRC, beta=a)
    return x_NRC
