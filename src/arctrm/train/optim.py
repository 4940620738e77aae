"""From a gradient to new weights: Muon for the matrices of the layers, AdamW for the rest, and a
moving average.

All gradients live in one buffer, so zeroing, clipping and the reduction over processes are one
operation each. Muon sees the fused matrices (q/k/v, gate/up) as the separate matrices they are: it
is given views that share their storage. Nothing waits for the device, and on a GPU what changes
from step to step (learning rates, the decay of the average) stands in tensors, so that steps and
update can be replayed as CUDA graphs.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from arctrm.config import OptimiserConfig
from arctrm.errors import CheckpointError

FUSED_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
"""Matrices in one, stacked along the rows."""
HUB = "hub."
"""Weights of these names were trained with AdamW by others, and so are they here."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Muon's quintic iteration: https://kellerjordan.github.io/posts/muon/."""
NUM_ITERATIONS = 5
EPS = 1e-7
WARM_UPS = 3
"""Eager runs of a step before it is captured."""

Named = Mapping[str, nn.Parameter]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, of those that are trained; empty tables left out."""
    named = model.named_parameters()
    return {name: p for name, p in named if p.requires_grad and p.numel()}


class FlatGradients:
    """One buffer [number of all elements] that the `.grad` of every parameter is a view of."""

    def __init__(self, parameters: Named):
        values = list(parameters.values())
        self.flat = torch.zeros(sum(p.numel() for p in values), device=values[0].device)
        for p, part in zip(values, self.flat.split([p.numel() for p in values]), strict=True):
            p.grad = part.view_as(p)

    def zero(self) -> None:
        """Forget the gradient."""
        self.flat.zero_()

    def average(self) -> None:
        """Replace the gradient by its mean over the processes, where there are several."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.flat)
            self.flat /= torch.distributed.get_world_size()

    def clip(self, max_norm: float) -> None:
        """Scale the gradient down to `max_norm` (L2 over everything)."""
        self.flat.mul_((max_norm / (self.flat.norm() + 1e-6)).clamp(max=1.0))


class Muon(Optimizer):
    """The update of `torch.optim.Muon` (orthogonalised Nesterov momentum, decoupled weight decay)
    in batched products: Newton-Schulz of one matrix takes longer to launch than to compute, so
    matrices of one shape, or its transpose, are a stack.

    The rate of an [R, C] matrix is `lr` (a number, or a tensor of no dimension) x
    sqrt(max(1, R / C)). Newton-Schulz runs in `dtype`.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float | Tensor,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(
            list(matrices), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        )
        self.dtype = dtype
        for matrix in self.param_groups[0]["params"]:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every matrix."""
        assert closure is None
        for group in self.param_groups:
            matrices = group["params"]
            gradients = [p.grad for p in matrices]
            momenta = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            for shapes in _by_shape(matrices):
                stacks = [torch.stack([directions[i] for i in alike]) for alike in shapes]
                moves = _orthogonal([stack.to(self.dtype) for stack in stacks])
                for alike, move_NRC in zip(shapes, moves, strict=True):
                    num_rows, num_columns = move_NRC.shape[1:]
                    rate = group["lr"] * math.sqrt(max(1.0, num_rows / num_columns))
                    move_NRC = move_NRC.to(torch.float32, memory_format=torch.contiguous_format)
                    torch._foreach_add_([matrices[i] for i in alike], (move_NRC * -rate).unbind())


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
    is_tall = [stack.shape[1] > stack.shape[2] for stack in stacks]
    x = torch.cat([s.mT if tall else s for s, tall in zip(stacks, is_tall, strict=True)])
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, change, x, beta=a)
    parts = x.split([len(stack) for stack in stacks])
    return [part.mT if tall else part for part, tall in zip(parts, is_tall, strict=True)]


class Optimisers:
    """The optimisers of the trained parameters; made after `FlatGradients`."""

    def __init__(self, parameters: Named, config: OptimiserConfig):
        matrices, others = _split(parameters, use_muon=config.kind == "muon")
        decay = config.weight_decay
        self.all: dict[str, Optimizer] = {}
        if matrices:
            rate = _rate(config.muon_lr, matrices[0].device)
            self.all["muon"] = Muon(matrices, rate, decay, config.momentum)
        if others:
            device = others[0].device
            self.all["adamw"] = AdamW(
                others,
                lr=_rate(config.adamw_lr, device),
                betas=config.betas,
                weight_decay=decay,
                fused=device.type == "cuda",
            )
        self.peaks = {"muon": config.muon_lr, "adamw": config.adamw_lr}

    def set_rates(self, factor: float) -> None:
        """`factor` x the peak learning rates, for the next steps."""
        for name, optimiser in self.all.items():
            for group in optimiser.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self.peaks[name] * factor)
                else:
                    group["lr"] = self.peaks[name] * factor

    def apply(self) -> None:
        """One step of each at the rates that were set."""
        for optimiser in self.all.values():
            optimiser.step()

    def make_capturable(self) -> None:
        """Allow a CUDA graph to capture `apply`; AdamW warns of steps outside one from then on."""
        for optimiser in self.all.values():
            for group in optimiser.param_groups:
                group["capturable"] = True

    def state(self) -> dict[str, Tensor]:
        """Tensors `<optimiser>.<parameter index>.<key>`: those of the optimisers, not copies."""
        return {
            f"{name}.{index}.{key}": value
            for name, optimiser in self.all.items()
            for index, p in enumerate(_parameters(optimiser))
            for key, value in optimiser.state[p].items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned; the next step is bit-identical.

        (torch's own `load_state_dict` casts buffers to the dtype of their parameter.)

        Raises:
            CheckpointError: state of other parameters; the optimisers are left as they were.
        """
        places = {
            f"{name}.{index}": (optimiser, p)
            for name, optimiser in self.all.items()
            for index, p in enumerate(_parameters(optimiser))
        }
        held = {name.rpartition(".")[0] for name in state}
        fits = held == places.keys() and all(
            not tensor.ndim or tensor.shape == places[name.rpartition(".")[0]][1].shape
            for name, tensor in state.items()
        )
        if not fits:
            raise CheckpointError(
                f"the optimiser state is of {len(held)} parameters, or of other shapes than the "
                f"{len(places)} that are trained; resume with the configuration of the checkpoint"
            )
        for name, tensor in state.items():
            place, _, key = name.rpartition(".")
            optimiser, p = places[place]
            # A step count stays on the CPU unless the optimiser is fused.
            on_cpu = key == "step" and not optimiser.param_groups[0].get("fused")
            optimiser.state[p][key] = tensor.to("cpu" if on_cpu else p.device, copy=True)


def _parameters(optimiser: Optimizer) -> list[Tensor]:
    return [p for group in optimiser.param_groups for p in group["params"]]


def _rate(value: float, device: torch.device) -> float | Tensor:
    """A learning rate that changes in place on a GPU."""
    return torch.tensor(value, device=device) if device.type == "cuda" else value


def _split(parameters: Named, *, use_muon: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices of the layers, one for each projection; every other parameter)."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in parameters.items():
        is_matrix = ".layers." in f".{name}" and p.ndim == 2 and not name.startswith(HUB)
        if not (use_muon and is_matrix):
            others.append(p)
            continue
        parts = next((n for key, n in FUSED_PARTS.items() if key in name), 1)
        assert p.grad is not None
        for data, grad in zip(p.data.chunk(parts), p.grad.chunk(parts), strict=True):
            matrix = nn.Parameter(data)
            matrix.grad = grad
            matrices.append(matrix)
    return matrices, others


class EMA:
    """Exponential moving average of the trained weights (warm-up: decay (1 + n) / (10 + n))."""

    def __init__(self, parameters: Named, decay: float):
        self.decay = decay
        self.names = list(parameters)
        self.weights = [p.detach() for p in parameters.values()]
        self.averages = [w.clone() for w in self.weights]
        self.distance = torch.zeros((), device=self.weights[0].device)
        """1 - decay of the next move."""

    def set_decay(self, step: int) -> None:
        """The decay after optimiser step number `step` (from 1)."""
        self.distance.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    def move(self) -> None:
        """Move towards the weights with the decay that was set."""
        # One weight for all must be a number; a captured update needs a tensor, hence one for each.
        torch._foreach_lerp_(self.averages, self.weights, [self.distance] * len(self.weights))

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, average in self.state().items():
            average.copy_(state[name])


class Update:
    """What follows the gradient: clip to `clip_norm` (0 = not), step, move `ema`, if any."""

    def __init__(
        self, gradients: FlatGradients, optimisers: Optimisers, ema: EMA | None, clip_norm: float
    ):
        self.gradients, self.optimisers, self.ema = gradients, optimisers, ema
        self.clip_norm = clip_norm
        self.apply: Callable[[], None] = self._apply

    def __call__(self, factor: float, step: int) -> None:
        """The update of step number `step` (from 1) at `factor` x the peak learning rates."""
        self.optimisers.set_rates(factor)
        if self.ema is not None:
            self.ema.set_decay(step)
        self.apply()

    def capture(self) -> None:
        """Replay a CUDA graph from the second call on; restore a checkpoint before the first."""
        self.apply = LateGraph(self._apply, self.optimisers.make_capturable)

    def _apply(self) -> None:
        if self.clip_norm > 0:
            self.gradients.clip(self.clip_norm)
        self.optimisers.apply()
        if self.ema is not None:
            self.ema.move()


class LateGraph:
    """Work whose first call runs eagerly, which makes its buffers; the second captures it (which
    runs nothing), and it and all later ones replay.
    """

    def __init__(self, work: Callable[[], None], prepare: Callable[[], None]):
        self.work, self.prepare = work, prepare
        self.is_warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        if self.is_warm and self.graph is None:
            self.prepare()
            self.graph = captured(self.work)
        self.graph.replay() if self.graph else self.work()
        self.is_warm = True


def graph_of(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a training step, after eager runs on a stream of their own.

    The eager runs are real steps: zero the gradient after them; their batches count as drawn.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return captured(step)


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which is not run; keep alive what it reads and writes.

    Graphs are replayed one after another and leave nothing for each other, so they share memory.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may touch CUDA meanwhile.
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        work()
    return graph


@functools.cache
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()
