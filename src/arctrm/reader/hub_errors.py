"""What can go wrong between a model's name and its weights, each as one sentence.

The libraries below raise a handful of types with texts of many lines, the telling one often being
the cause of the cause; here the whole chain is looked through for what the user can do something
about.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from arctrm.errors import ArctrmError, CheckpointError, ConfigError, ResourceError

NEVER_RELEASED = {
    "meta-llama/Llama-3.2-8B": (
        "meta-llama/Llama-3.2-1B",
        "meta-llama/Llama-3.2-3B",
        "meta-llama/Llama-3.1-8B",
    ),
    "meta-llama/Llama-3.2-8B-Instruct": (
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.2-3B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
}
"""Ids that older pipelines name although no such model exists, and those that do exist."""
ASK_SECONDS = 10.0


def check_name(name: str) -> None:
    """Refuse what cannot be loaded, without asking the network.

    Raises:
        ConfigError: a file, a folder that does not exist or is no model, an id never released.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{name}: is not the folder of a model: it has no config.json; give a folder that "
                "`save_pretrained` wrote, or an id on the Hugging Face hub"
            )
    elif path.exists():
        raise ConfigError(f"{name}: is a file; give the folder of the model, here {path.parent}")
    elif name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ConfigError(
            f"{name}: there is no such folder; give the folder of a model, or an id on the Hugging "
            "Face hub such as meta-llama/Llama-3.2-1B"
        )
    elif name in NEVER_RELEASED:
        *others, last = NEVER_RELEASED[name]
        raise ConfigError(f"{name}: does not exist; use {', '.join(others)} or {last}")


def only_cached(name: str, revision: str) -> bool:
    """Whether the hub cannot be reached, so that only what is in the cache can be used.

    Asked once before anything is loaded: the libraries below would wait and try again for each
    file, half a minute every time.
    """
    if Path(name).expanduser().is_dir():
        return True
    try:
        with reading(name, "entry on the hub"):
            HfApi().model_info(name, revision=revision, timeout=ASK_SECONDS)
    except ArctrmError as error:
        causes = list(_causes(error))
        if any(map(_is_unreachable, causes)):
            return True
        if any(isinstance(c, (RepositoryNotFoundError, HFValidationError)) for c in causes):
            raise
    return False


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Turn whatever is raised while `what` of a model is read into one sentence."""
    try:
        yield
    except ArctrmError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{name}: does not fit into the memory of the GPU; set dtype = 'bfloat16', "
            "device_map = 'auto' or use a smaller model"
        ) from error
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise _explained(name, what, error) from error


def check_is_causal(name: str, config: Any, known: bool) -> None:
    """Refuse configurations of other models; `known`: transformers has a causal LM for this one.

    Raises:
        ConfigError: the model does not predict the next token.
    """
    classes = getattr(config, "architectures", None) or []
    masked = any(cls.endswith("ForMaskedLM") for cls in classes)
    if masked or not (known or "AutoModelForCausalLM" in getattr(config, "auto_map", {})):
        kind = classes[0] if masked else f"model of type {config.model_type}"
        raise ConfigError(
            f"{name}: is a {kind}, not a causal language model; use one that predicts the next "
            "token, such as meta-llama/Llama-3.2-1B"
        )


def check_complete(name: str, info: dict[str, Any]) -> None:
    """Refuse weights that leave some of the model at random values; `info`: what loading gave.

    Raises:
        CheckpointError: names the first tensor that is missing or of another shape.
    """
    missing = sorted(info["missing_keys"])
    faults = f"{len(missing)} tensors missing, first {missing[0]!r}" if missing else ""
    for tensor, got, wanted in sorted(info["mismatched_keys"])[: not missing]:
        faults = f"{tensor!r} has shape {tuple(got)}, expected is {tuple(wanted)}"
    if faults:
        raise CheckpointError(
            f"{name}: the weights do not fit config.json: {faults}; download or save the model "
            "again"
        )


def _explained(name: str, what: str, error: Exception) -> ArctrmError:
    chain = list(_causes(error))
    for kinds, sentence in _SENTENCES:
        if any(isinstance(cause, kinds) for cause in chain):
            return ConfigError(f"{name}: {sentence.format(name=name)}")
    refused = [c for c in chain if isinstance(c, HfHubHTTPError) and not _is_unreachable(c)]
    if refused:
        return ConfigError(
            f"{name}: the Hugging Face hub refused to send it ({_reason(refused[0])}); try again "
            "later, or log in with `hf auth login`"
        )
    if any(map(_is_unreachable, chain)):
        return ConfigError(
            f"{name}: is not in the cache {constants.HF_HUB_CACHE} and the Hugging Face hub cannot "
            "be reached; connect to the network (and unset HF_HUB_OFFLINE), or give a local folder"
        )
    text = " ".join(str(cause) for cause in chain)
    for marks, sentence in _TELLING.items():
        if any(mark in text for mark in marks):
            return ConfigError(f"{name}: {sentence}")
    kind = CheckpointError if isinstance(error, SafetensorError) else ConfigError
    return kind(f"{name}: its {what} cannot be read ({_reason(error)}); download or save it again")


_SENTENCES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (
        GatedRepoError,  # before RepositoryNotFoundError, which is its base
        "access to this model is restricted; accept its licence at https://huggingface.co/{name} "
        "and log in with `hf auth login`",
    ),
    (
        (RepositoryNotFoundError, HFValidationError),
        "is no local folder, and the Hugging Face hub has no model of that name that you may see; "
        "check the spelling, or log in with `hf auth login` if it is private",
    ),
    (
        RevisionNotFoundError,
        "has no such revision; leave revision out or give a branch, tag or commit",
    ),
)

"""Kinds of error of the hub, the more special first, and what is said of them."""
_TELLING = {
    ("trust_remote_code", "custom code"): (
        "needs Python code that comes with the model; read it, and set trust_remote_code = true if "
        "you trust it, or use another model"
    ),
    ("Unrecognized model",): (
        "has no config.json that names a kind of model; give a model in the format of "
        "transformers (not GGUF, and not an adapter alone)"
    ),
    ("does not recognize this architecture",): (
        "the installed transformers does not know this kind of model; upgrade transformers, or use "
        "another model"
    ),
    ("Couldn't instantiate the backend tokenizer",): (
        "has no tokenizer that can be read; it needs a tokenizer.json (or, for some models, the "
        "package sentencepiece or tiktoken)"
    ),
    ("no file named model.safetensors",): (
        "has no weights in safetensors files, and no others are read; use a model that has them, "
        "or convert it with `save_pretrained`"
    ),
}
"""What the texts of errors hold that transformers has no type for."""


def _is_unreachable(error: BaseException) -> bool:
    """No connection; the class of the HTTP library is known by name, as its package changes."""
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    by_name = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return isinstance(error, kinds) or by_name


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
