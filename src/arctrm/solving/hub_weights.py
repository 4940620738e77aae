"""The hub reader of a hybrid's checkpoint: found again, loaded, and what was trained put over it.

A checkpoint holds what was trained of the reader and never a frozen model; the rest is read from
where the model is now.
"""

from pathlib import Path

import torch
from torch import Tensor

from arctrm.config import InferenceConfig
from arctrm.config.reader_hub import HubReaderConfig
from arctrm.errors import CheckpointError, ConfigError
from arctrm.hybrid import Hybrid
from arctrm.reader.hub_loading import hub_width
from arctrm.training.checkpoints import check_names
from arctrm.training.joint_hub import check_fits
from arctrm.training.starting import check_width


def here_and_now(
    hub: HubReaderConfig, inference: InferenceConfig, device: torch.device
) -> HubReaderConfig:
    """The reader as it was trained, but where it is now, and for this device.

    Whether code of the model's makers may be run is not the checkpoint's to say.
    """
    dtype = hub.dtype if inference.dtype == "auto" else inference.dtype
    if dtype == "auto" and device.type == "cuda":
        dtype = "bfloat16"
    return hub.model_copy(
        update={
            "name": inference.llama_model or hub.name,
            "revision": None if inference.llama_model else hub.revision,
            "device": None,
            "dtype": dtype,
            "trust_remote_code": inference.trust_remote_code,
        }
    )


def reader_width(folder: Path, hub: HubReaderConfig) -> int:
    """Width of the reader of checkpoint `folder`; only its configuration is read.

    Raises:
        CheckpointError: there is no such model, or it may not be read.
    """
    try:
        return hub_width(hub)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}: its reader cannot be loaded ({error}); set inference.llama_model to where "
            "the model is now"
        ) from error


def check_adapters(folder: Path, weights: dict[str, Tensor], width: int) -> None:
    """Refuse adapters that were made for a reader of another width.

    Raises:
        CheckpointError: names both widths.
    """
    for name in ("context", "draft", "back"):
        first = f"adapters.{name}."
        own = {n.removeprefix(first): t for n, t in weights.items() if n.startswith(first)}
        if own:
            check_width(folder, own, width)


def filled(hybrid: Hybrid, weights: dict[str, Tensor], folder: Path) -> Hybrid:
    """The hybrid with the weights of checkpoint `folder`, written into the tensors of the reader.

    Raises:
        CheckpointError: names or shapes differ.
        ConfigError: the reader holds fewer tokens than it would be shown.
    """
    check_fits(hybrid)
    check_names({n: tuple(t.shape) for n, t in hybrid.state_dict().items()}, weights, folder)
    hybrid.load_state_dict(weights)
    return hybrid
