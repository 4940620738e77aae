"""Decoder layers that are run through several times, as TRM's blocks are (a universal transformer,
arXiv 1807.03819): as deep in computation, but with the weights of a few layers.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn


class LoopedLayers(nn.ModuleList):
    """Layers that transformers runs through `loops` times; weights and their names are those of one
    time.

    Its length, items and order are those of all passes, num_layers x loops. A layer tells a cache
    where its keys and values belong, so each pass after the first has a layer object of its own,
    which shares the submodules that hold weights. `trained` are the layers themselves.
    """

    def __init__(self, layers: list[nn.Module], loops: int):
        super().__init__()
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
        return self.trained * self.loops

    def __len__(self) -> int:
        return len(self._modules) * self.loops

    def __iter__(self) -> Iterator[nn.Module]:
        count = len(self._modules)
        for slot, layer in enumerate(self.passes):
            yield layer if slot < count else _in_slot(layer, slot)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def _in_slot(layer: nn.Module, slot: int) -> nn.Module:
    """The layer with its keys and values at `slot` of a cache; nothing else is its own."""
    own = copy.copy(layer)
    own._modules = dict(layer._modules)
    attention = copy.copy(layer.get_submodule("self_attn"))
    attention.layer_idx = slot  # type: ignore[assignment]
    own._modules["self_attn"] = attention
    return own
