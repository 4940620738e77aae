"""Optimisers over one flat gradient: Muon for block matrices, AdamW for the rest.

All gradients live in one buffer, so zeroing, clipping and the reduction over processes are one
operation each. Muon sees the fused matrices (q/k/v, gate/up) as the separate matrices they are:
it is given views that share their storage.

On a GPU, what changes from step to step (learning rates, the decay of the average) stands in
tensors, which a captured update reads.
"""

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from arctrm.config.training import OptimiserConfig
from arctrm.training.muon import Muon

PRETRAINED = "pretrained"
"""In the names of a hub reader's weights: others trained them with AdamW, and so do we."""

FUSED_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
"""Matrices in one, stacked along the rows."""


class FlatGradients:
    """One buffer [number of parameters' elements] that every parameter's `.grad` is a view of."""

    def __init__(self, parameters: list[nn.Parameter]):
        total = sum(p.numel() for p in parameters)
        self.flat = torch.zeros(total, device=parameters[0].device)
        begin = 0
        for p in parameters:
            p.grad = self.flat[begin : begin + p.numel()].view_as(p)
            begin += p.numel()

    def zero(self) -> None:
        """Forget the gradient."""
        self.flat.zero_()

    def average(self) -> None:
        """Replace the gradient by its mean over the processes, where there are several."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.flat, torch.distributed.ReduceOp.AVG)

    def clip(self, max_norm: float) -> None:
        """Scale the gradient down to `max_norm` (L2 over everything)."""
        scale = (max_norm / (self.flat.norm() + 1e-6)).clamp(max=1.0)
        self.flat.mul_(scale)


class Optimisers:
    """The optimisers of one model; call after its gradients are `FlatGradients`."""

    def __init__(self, model: nn.Module, config: OptimiserConfig):
        matrices, others = _split(model, use_muon=config.kind == "muon")
        device = others[0].device
        self.all: dict[str, Optimizer] = {}
        if matrices:
            self.all["muon"] = Muon(
                matrices,
                lr=_rate(config.muon_lr, device),
                weight_decay=config.weight_decay,
                momentum=config.momentum,
            )
        self.all["adamw"] = AdamW(
            others,
            lr=_rate(config.adamw_lr, device),
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda",
        )
        self.peaks = {"muon": config.muon_lr, "adamw": config.adamw_lr}

    def step(self, factor: float) -> None:
        """One step of each at `factor` x its peak learning rate."""
        self.set_rates(factor)
        self.apply()

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


def _rate(value: float, device: torch.device) -> float | Tensor:
    """A learning rate that changes in place on a GPU."""
    return torch.tensor(value, device=device) if device.type == "cuda" else value


def _split(model: nn.Module, use_muon: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices of the blocks, one per projection; every other parameter)."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if not use_muon or ".layers." not in name or PRETRAINED in name.split(".") or p.ndim < 2:
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
    """Exponential moving average of all trained weights (warm-up: decay (1 + n) / (10 + n))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.weights = [p.detach() for _, p in trained]
        self.averages = [w.clone() for w in self.weights]
        self.distance = torch.zeros((), device=self.weights[0].device)
        """1 - decay of the next move."""

    def update(self, step: int) -> None:
        """Move towards the weights after optimiser step number `step` (from 1)."""
        self.set_decay(step)
        self.move()

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

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])
