"""From a gradient to new weights: Muon for the matrices of the layers, AdamW for the rest, and a
moving average.

All gradients live in one buffer; Muon sees fused matrices (q/k/v, gate/up) as the separate ones
they are, through views. Nothing waits for the device, and on a GPU what changes from step to step
(rates, the decay of the average) stands in tensors, so that a CUDA graph can replay it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from arctrm.config import OptimiserConfig
from arctrm.errors import CheckpointError
from arctrm.train.sharding import as_shared, is_shared, own_part, part_of, whole

FUSED_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}  # matrices in one, stacked along the rows
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
NUM_ITERATIONS = 5
EPS = 1e-7
WARM_UPS = 3  # eager runs of a step before it is captured

Named = Mapping[str, nn.Parameter]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, of those that are trained; empty tables left out."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}


class FlatGradients:
    """One buffer [number of all elements] that the `.grad` of every parameter is a view of; parts
    of shared parameters, whose mean FSDP takes, come last.
    """

    def __init__(self, parameters: Named):
        values = sorted(parameters.values(), key=is_shared)
        parts = [own_part(p.detach()) for p in values]
        sizes = [part.numel() for part in parts]
        self.flat = torch.zeros(sum(sizes), device=parts[0].device)
        for p, part, own in zip(values, parts, self.flat.split(sizes), strict=True):
            p.grad = as_shared(own.view_as(part), p)
        alone = sum(size for p, size in zip(values, sizes, strict=True) if not is_shared(p))
        self.alone, self.shared = self.flat[:alone], self.flat[alone:]
        self.has_shared = any(map(is_shared, values))

    def zero(self) -> None:
        """Forget the gradient."""
        self.flat.zero_()

    def average(self) -> None:
        """Replace the gradient by its mean over the processes, where there are several."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.alone)
            self.alone /= torch.distributed.get_world_size()

    def clip(self, max_norm: float) -> None:
        """Scale the gradient down to `max_norm` (L2 over everything)."""
        norm = self.flat.norm()
        if self.has_shared:
            square = self.shared.norm().square()
            torch.distributed.all_reduce(square)
            norm = (self.alone.norm().square() + square).sqrt()
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


class Muon(Optimizer):
    """The update of `torch.optim.Muon` (orthogonalised Nesterov momentum), in batched products."""

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
            # Newton-Schulz of one matrix takes longer to launch than to compute.
            for shapes in _by_shape(matrices):
                stacks = [torch.stack([directions[i] for i in alike]) for alike in shapes]
                moves = _orthogonal([stack.to(self.dtype) for stack in stacks])
                for alike, move_NRC in zip(shapes, moves, strict=True):
                    num_rows, num_columns = move_NRC.shape[1:]
                    rate = group["lr"] * math.sqrt(max(1.0, num_rows / num_columns))
                    move_NRC = move_NRC.to(torch.float32, memory_format=torch.contiguous_format)
                    torch._foreach_add_([matrices[i] for i in alike], (move_NRC * -rate).unbind())


def _by_shape(matrices: list[Tensor]) -> list[list[list[int]]]:
    shapes: dict[tuple[int, int], dict[torch.Size, list[int]]] = defaultdict(dict)
    for index, matrix in enumerate(matrices):
        smaller, larger = sorted(matrix.shape)
        shapes[smaller, larger].setdefault(matrix.shape, []).append(index)
    return [list(alike.values()) for alike in shapes.values()]


def _orthogonal(stacks: list[Tensor]) -> list[Tensor]:
    """Bring the singular values of each matrix near 1; stacks [N, R, C] and [M, C, R]."""
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
        self.shared = dict[Tensor, Tensor]()  # a part -> the shared parameter
        for number, p in enumerate(others):
            if is_shared(p):
                part = others[number] = nn.Parameter(own_part(p.detach()))
                assert p.grad is not None
                part.grad, self.shared[part] = own_part(p.grad), p
        decay, self.all = config.weight_decay, dict[str, Optimizer]()
        device = (matrices + others)[0].device
        is_gpu = device.type == "cuda"  # where rates change in place
        self.peaks = {"muon": config.muon_lr, "adamw": config.adamw_lr}
        rates = {n: torch.tensor(x, device=device) if is_gpu else x for n, x in self.peaks.items()}
        if matrices:
            self.all["muon"] = Muon(matrices, rates["muon"], decay, config.momentum)
        if others:
            self.all["adamw"] = AdamW(
                others, rates["adamw"], config.betas, weight_decay=decay, fused=is_gpu
            )

    def set_rates(self, factor: float) -> None:
        """`factor` x the peak learning rates, for the next steps."""
        for name, optimiser in self.all.items():
            (group,) = optimiser.param_groups
            rate = self.peaks[name] * factor
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate

    def apply(self) -> None:
        """One step of each at the rates that were set."""
        for optimiser in self.all.values():
            optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """Tensors `<optimiser>.<parameter index>.<key>`: those of the optimisers, not copies, but
        for shared ones, which every process gathers.
        """
        return {
            f"{place}.{key}": whole(value, self.shared.get(p, p))
            for place, (optimiser, p) in self._places().items()
            for key, value in optimiser.state[p].items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned (torch's own casts buffers to the parameter's dtype)."""
        places, held = self._places(), [(*name.rpartition("."), t) for name, t in state.items()]
        like = {place: self.shared.get(p, p) for place, (_, p) in places.items()}
        if {place for place, *_ in held} != places.keys() or any(
            tensor.ndim and tensor.shape != like[place].shape for place, *_, tensor in held
        ):
            raise CheckpointError("the optimiser state is of other parameters than those trained")
        for place, _, key, tensor in held:
            optimiser, p = places[place]
            # A step count stays on the CPU unless the optimiser is fused.
            on_cpu = key == "step" and not optimiser.param_groups[0].get("fused")
            own = part_of(tensor, like[place])
            optimiser.state[p][key] = own.to("cpu" if on_cpu else p.device, copy=True)

    def _places(self) -> dict[str, tuple[Optimizer, Tensor]]:
        return {
            f"{name}.{index}": (optimiser, p)
            for name, optimiser in self.all.items()
            for index, p in enumerate(optimiser.param_groups[0]["params"])
        }


def _split(parameters: Named, *, use_muon: bool) -> tuple[list[Tensor], list[Tensor]]:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in parameters.items():
        is_matrix = ".layers." in f".{name}" and p.ndim == 2 and not name.startswith("hub.")
        if not (use_muon and is_matrix):
            others.append(p)
            continue
        parts = next((n for key, n in FUSED_PARTS.items() if key in name), 1)
        assert p.grad is not None
        for data, grad in zip(p.data.chunk(parts), p.grad.chunk(parts), strict=True):
            matrices.append(nn.Parameter(data))
            matrices[-1].grad = grad
    return matrices, others


class EMA:
    """Exponential moving average of the trained weights (warm-up: decay (1 + n) / (10 + n))."""

    def __init__(self, parameters: Named, decay: float):
        self.decay = decay
        self.parameters = parameters
        self.weights = [own_part(p.detach()) for p in parameters.values()]
        self.averages = [w.clone() for w in self.weights]
        for p, average in zip(parameters.values(), self.averages, strict=True):
            vars(p)["average"] = average  # for who sets a weight anew
        self.distance = torch.zeros((), device=self.weights[0].device)  # 1 - decay of the next move

    def set_decay(self, step: int) -> None:
        """The decay after optimiser step number `step` (from 1)."""
        self.distance.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    def move(self) -> None:
        """Move towards the weights with the decay that was set."""
        # One weight for all must be a number; a captured update needs a tensor, hence one for each.
        torch._foreach_lerp_(self.averages, self.weights, [self.distance] * len(self.weights))

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name; shared ones are gathered."""
        both = zip(self.parameters.items(), self.averages, strict=True)
        return {name: whole(average, p) for (name, p), average in both}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for (name, p), average in zip(self.parameters.items(), self.averages, strict=True):
            average.copy_(part_of(state[name], p))


@dataclass(eq=False)
class Update:
    """What follows the gradient: clip to `clip_norm` (0 = not), step, move `ema`, if any.

    Where it `captures`, the first call makes the buffers, eagerly; the second captures a CUDA graph
    (which runs nothing), and it and all later ones replay. Restore a checkpoint before the first.
    """

    gradients: FlatGradients
    optimisers: Optimisers
    ema: EMA | None
    clip_norm: float
    captures: bool = False
    is_warm: bool = False
    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, factor: float, step: int) -> None:
        """The update of step number `step` (from 1) at `factor` x the peak learning rates."""
        self.optimisers.set_rates(factor)
        if self.ema is not None:
            self.ema.set_decay(step)
        if self.captures and self.is_warm and self.graph is None:
            for optimiser in self.optimisers.all.values():
                optimiser.param_groups[0]["capturable"] = True
            self.graph = captured(self._apply)
        self.graph.replay() if self.graph else self._apply()
        self.is_warm = True

    def _apply(self) -> None:
        if self.clip_norm > 0:
            self.gradients.clip(self.clip_norm)
        self.optimisers.apply()
        if self.ema is not None:
            self.ema.move()


def graph_of(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a step, after eager runs: real ones, so zero the gradient after them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return captured(step)


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which is not run; graphs share memory, as they leave nothing."""
    graph = torch.cuda.CUDAGraph()
    pool = next(iter(_graphs)).pool() if _graphs else None  # it ends with the last of its graphs
    # Other threads (NCCL's watchdog) may touch CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    _graphs.add(graph)
    return graph


_graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
