"""Optimiser and random-number state as named tensors, and back, without loss.

Optimiser state is put back as it was, not through `load_state_dict`, which casts buffers to the
dtype of their parameter. Hyperparameters stay those of the live optimiser: they come from the
config and the schedule, which a resumed run shares with the interrupted one.
"""

import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from arctrm.errors import CheckpointError

_SCALARS = {"@bool": bool, "@int": int, "@float": float}
"""Marks of state values that are Python scalars, such as a step count."""


def pack_optimiser(prefix: str, optimiser: Optimizer) -> dict[str, Tensor]:
    """Flatten an optimiser's state into tensors `prefix.<parameter index>.<key>`.

    The tensors are those of the optimiser, not copies. `prefix.num_parameters` says that the
    optimiser was packed even before its first step.
    """
    params = _parameters(optimiser)
    packed = {f"{prefix}.num_parameters": torch.tensor(len(params))}
    for index, param in enumerate(params):
        for key, value in optimiser.state.get(param, {}).items():
            packed.update([_pack_value(f"{prefix}.{index}.{key}", value)])
    return packed


def unpack_optimiser(prefix: str, optimiser: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `pack_optimiser` packed; the next step is bit-identical.

    Raises:
        CheckpointError: no state of that prefix, or state of other parameters; the optimiser is
            then left as it was.
    """
    params = _parameters(optimiser)
    stored = tensors.get(f"{prefix}.num_parameters")
    if stored is None or int(stored) != len(params):
        got = "no parameters" if stored is None else f"{int(stored)} parameters"
        raise CheckpointError(
            f"optimiser state {prefix!r}: the checkpoint holds {got}, the optimiser has "
            f"{len(params)}; resume with the configuration of the checkpoint"
        )
    state: list[dict[str, object]] = [{} for _ in params]
    for name, tensor in tensors.items():
        head, _, rest = name.partition(f"{prefix}.")
        index, dot, key = rest.partition(".")
        if head == "" and dot and index.isdigit():
            _check_shape(name, tensor, params, int(index))
            state[int(index)].update([_unpack_value(key, tensor)])
    for group in optimiser.param_groups:
        for param in group["params"]:
            optimiser.state[param] = _place(state.pop(0), param, group)


def rng_state() -> dict[str, Tensor]:
    """State of `random`, NumPy's global generator, torch on the CPU and on the current GPU."""
    _, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # ("MT19937", words, position, has_gauss, gauss)
    _, keys, position, has_gauss, cached = numpy_state
    state = {
        "rng.python": torch.tensor(words, dtype=torch.int64),
        "rng.python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng.numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "rng.numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "rng.torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Restore what `rng_state` returned; the GPU's only where both sides have one.

    Raises:
        CheckpointError: a generator's state is absent.
    """
    needed = ("rng.python", "rng.python_gauss", "rng.numpy", "rng.numpy_gauss", "rng.torch")
    for name in needed:
        if name not in tensors:
            raise CheckpointError(f"random state {name!r} is absent from the checkpoint")
    gauss = tensors["rng.python_gauss"].tolist()
    random.setstate((3, tuple(tensors["rng.python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = tensors["rng.numpy"].tolist()
    cached = tensors["rng.numpy_gauss"].item()
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, cached))
    torch.set_rng_state(tensors["rng.torch"].cpu())
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"].cpu())


def pack_generator(generator: np.random.Generator) -> Tensor:
    """State of a NumPy generator as uint8 JSON text (its words are wider than 64 bits)."""
    text = json.dumps(generator.bit_generator.state)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def unpack_generator(generator: np.random.Generator, packed: Tensor) -> None:
    """Restore what `pack_generator` returned into a generator of the same kind.

    Raises:
        CheckpointError: the state is of another kind of generator.
    """
    state = json.loads(bytes(packed.tolist()))
    kind = generator.bit_generator.state["bit_generator"]
    if state["bit_generator"] != kind:
        raise CheckpointError(
            f"random state of the data: the checkpoint holds {state['bit_generator']}, "
            f"this run draws with {kind}; resume with the arctrm version of the checkpoint"
        )
    generator.bit_generator.state = state


def _parameters(optimiser: Optimizer) -> list[Tensor]:
    return [param for group in optimiser.param_groups for param in group["params"]]


def _pack_value(name: str, value: object) -> tuple[str, Tensor]:
    if isinstance(value, Tensor):
        return name, value.detach()
    for mark, kind in _SCALARS.items():
        if type(value) is kind:
            dtype = torch.float64 if kind is float else torch.int64
            return name + mark, torch.tensor(value, dtype=dtype)
    raise TypeError(f"{name} is a {type(value).__name__}; only tensors and numbers can be packed")


def _unpack_value(key: str, tensor: Tensor) -> tuple[str, object]:
    name, at, _ = key.partition("@")
    return name, (_SCALARS[key[len(name) :]](tensor.item()) if at else tensor)


def _check_shape(name: str, tensor: Tensor, params: list[Tensor], index: int) -> None:
    expected = tuple(params[index].shape) if index < len(params) else None
    if tensor.ndim and tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"optimiser state {name!r}: the checkpoint holds shape {tuple(tensor.shape)}, the "
            f"parameter has {expected}; resume with the configuration of the checkpoint"
        )


def _place(state: dict[str, object], param: Tensor, group: dict) -> dict[str, object]:
    """Copy the buffers to the parameter's device; a step count stays on the CPU unless fused."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    placed = dict(state)
    for key, value in state.items():
        if isinstance(value, Tensor):
            device = param.device if key != "step" or on_device else torch.device("cpu")
            placed[key] = value.to(device, copy=True)
    return placed
