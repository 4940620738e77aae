"""Decoder layers that are run through several times, as TRM's blocks are (a universal transformer,
arXiv 1807.03819): as deep in computation, but with the weights of a few layers.

With input injection (arXiv 1909.01377; TRM does so in every cycle) a token's vector does not have
to carry through all passes what it came with: it is added again before each, by a matrix of that
pass.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class Injection(nn.Module):
    """A matrix [D, D] for every pass, zero at first: the model then is the one without."""

    def __init__(self, width: int, num_passes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_passes))
        for weights in self.layers.parameters():
            nn.init.zeros_(weights)

    @staticmethod
    def source(embedded: Tensor) -> Tensor:
        """What the matrices are given, [..., D]: the embedded tokens, all of one size."""
        return F.rms_norm(embedded, embedded.shape[-1:], eps=EPS).to(embedded.dtype)


@dataclass(frozen=True)
class InjectedPass:
    """A layer, before which `matrix` times `source` (of `Injection`) is added."""

    layer: nn.Module
    matrix: nn.Module

    def __call__(self, x: Tensor, *args: Any, source: Tensor, **given: Any) -> Any:
        """What the layer makes of the sum."""
        return self.layer(x + self.matrix(source), *args, **given)


class LoopedLayers(nn.ModuleList):
    """Layers that transformers runs through `loops` times; weights and their names are those of one
    time.

    Its length, items and order are those of all passes, num_layers x loops. A layer tells a cache
    where its keys and values belong, so each pass after the first has a layer object of its own,
    which shares the submodules that hold weights. `trained` are the layers themselves.

    With `injection` (its weights stay the caller's) every pass is told the `source`, too.
    """

    def __init__(self, layers: list[nn.Module], loops: int, injection: Injection | None = None):
        super().__init__()
        self._matrices = None if injection is None else tuple(injection.layers)
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.loops = loops

    @property
    def trained(self) -> list[Any]:
        """The layers that hold the weights."""
        return list(self.children())

    @property
    def passes(self) -> list[Any]:
        """The layers that hold the weights, in the order in which they are run, with repeats."""
        return self._with_injection(self.trained * self.loops)

    def __len__(self) -> int:
        return len(self._modules) * self.loops

    def __iter__(self) -> Iterator[Any]:
        count = len(self._modules)
        layers = enumerate(self.trained * self.loops)
        own = [layer if slot < count else _in_slot(layer, slot) for slot, layer in layers]
        return iter(self._with_injection(own))

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def _with_injection(self, layers: list[Any]) -> list[Any]:
        if self._matrices is None:
            return layers
        return [InjectedPass(*pair) for pair in zip(layers, self._matrices, strict=True)]


def _in_slot(layer: nn.Module, slot: int) -> nn.Module:
    """The layer with its keys and values at `slot` of a cache; nothing else is its own."""
    own = copy.copy(layer)
    own._modules = dict(layer._modules)
    attention = copy.copy(layer.get_submodule("self_attn"))
    attention.layer_idx = slot  # type: ignore[assignment]
    own._modules["self_attn"] = attention
    return own
