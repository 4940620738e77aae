"""Tensors that the processes of a run share: each holds a part of every matrix of a hub model.

FSDP2 gathers a layer's weights when it is computed and spreads their gradient. Update and average
see the part of a process as any tensor; a checkpoint holds the tensors whole. torch's DTensor takes
a while to import and is only there when weights are shared.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def spread(model: nn.Module) -> None:
    """Give each process its part of the layers, one after another: no device holds all of them.
    Embeddings, last norm and head are small and stay whole.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, reshard_after_forward=True)


@contextmanager
def gathered(layers: Iterable[Any]) -> Iterator[None]:
    """All weights on every process, for work that each does at a pace of its own."""
    shared = [layer for layer in layers if hasattr(layer, "unshard")]
    for layer in shared:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    yield
    for layer in shared:
        layer.set_reshard_after_forward(True)
        layer.reshard()


def is_shared(tensor: Tensor) -> bool:
    """Whether each process holds a part of it (a DTensor)."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """The memory of this process's part; a tensor that is not shared as it is."""
    shared: Any = tensor
    return shared.to_local() if is_shared(tensor) else tensor


def as_shared(part: Tensor, like: Tensor) -> Any:
    """The shared tensor whose parts are the memory of `part`, laid out as `like`."""
    if not is_shared(like):
        return part
    from torch.distributed.tensor import DTensor

    made: Any = like
    mesh, placements = made.device_mesh, made.placements
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole(part: Tensor, like: Tensor) -> Tensor:
    """All parts together, on the CPU where they are shared; every process calls it."""
    return as_shared(part, like).full_tensor().cpu() if is_shared(like) and part.ndim else part


def fill(held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Put whole `tensors` into those of a module, `held` by name; shared ones take their part."""
    for name, tensor in tensors.items():
        own_part(held[name]).copy_(part_of(tensor, held[name]))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor."""
    if not is_shared(like) or not tensor.ndim:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    made: Any = like
    there, placements = tensor.to(like.device), made.placements
    return distribute_tensor(there, made.device_mesh, placements, src_data_rank=None).to_local()
