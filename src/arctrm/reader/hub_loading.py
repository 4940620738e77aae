"""From a name to a `HubReader`: what is cheap to refuse is refused before gigabytes are read.

Nothing is unpickled (safetensors only), no code of a model's makers is run unless asked for, and
weights that leave a part of the model at random values are an error. Whatever the libraries below
raise becomes one sentence: the whole chain of causes is looked through for what can be done.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging

from arctrm.config import HubConfig
from arctrm.errors import ArctrmError, CheckpointError, ConfigError, ResourceError
from arctrm.reader.hub import HubReader
from arctrm.reader.hub_prompts import check_chat_template, find_spelling

META = "meta-llama/Llama-3"
UNREACHABLE = hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError
UNKNOWN = hub.RepositoryNotFoundError, hub.HFValidationError
REFUSALS: tuple[tuple[type | tuple[type, ...] | str, str], ...] = (
    # A gated repository before any other, which is the base of its type.
    (hub.GatedRepoError, "access to this model is restricted; accept its licence at https://"
     "huggingface.co/{name} and log in with `hf auth login`"),
    (UNKNOWN, "is no local folder, and the Hugging Face hub has no model of that name that you may "
     "see; check the spelling, or log in with `hf auth login` if it is private"),
    (hub.RevisionNotFoundError, "has no such revision; leave revision out or give a branch, tag or "
     "commit"),
    (hub.HfHubHTTPError, "the Hugging Face hub refused to send it ({reason}); try again later, or "
     "log in with `hf auth login`"),
    (UNREACHABLE, "is not in the cache {cache} and the Hugging Face hub cannot be reached; connect "
     "to the network (and unset HF_HUB_OFFLINE), or give a local folder"),
    ("trust_remote_code|custom code", "needs Python code that comes with the model; read it, and "
     "set trust_remote_code = true if you trust it, or use another model"),
    ("Unrecognized model", "has no config.json that names a kind of model; give a model in the "
     "format of transformers (not GGUF, and not an adapter alone)"),
    ("does not recognize this architecture", "the installed transformers does not know this kind "
     "of model; upgrade transformers, or use another model"),
    ("Couldn't instantiate the backend tokenizer", "has no tokenizer that can be read; it needs a "
     "tokenizer.json (or, for some models, the package sentencepiece or tiktoken)"),
    ("no file named model.safetensors", "has no weights in safetensors files, and no others are "
     "read; use a model that has them, or convert it with `save_pretrained`"),
)  # fmt: skip
"""What is said of an error: its type, or what its text holds; the more special come first."""


def load_hub_reader(config: HubConfig, device: torch.device | None = None) -> HubReader:
    """Load a model and its tokenizer; `config.device` comes before `device`, else CUDA or CPU.

    Raises:
        ConfigError: there is no such model, it may not be read, or it cannot spell grids.
        CheckpointError: its weights are damaged or incomplete.
        ResourceError: it does not fit.
    """
    source, settings = _found(config)
    if config.mode == "lora" and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "hub.mode = 'lora' needs the package peft, which is not installed; run "
            "`pip install 'arctrm[peft]'` or set hub.mode = 'frozen'"
        )
    place = config.device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"hub.device = {str(place)!r} is no device here ({_reason(error)}); use 'cpu', 'cuda' "
            "or 'cuda:0', or leave it out"
        ) from error
    with _reading(config.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    find_spelling(tokenizer, config.cells, config.name)  # before gigabytes are read
    if config.prompt == "chat":
        check_chat_template(tokenizer, config.name)
    narrow = place.type == "cuda" and config.mode != "full"
    usual = torch.bfloat16 if narrow else torch.float32
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # no tables of missing tensors: they become one sentence
    try:
        with _reading(config.name, "weights"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source,
                config=settings,
                dtype=usual if config.dtype == "auto" else getattr(torch, config.dtype),
                device_map=config.device_map,
                use_safetensors=True,  # nothing is unpickled
                ignore_mismatched_sizes=True,  # and then refused, by name
                output_loading_info=True,
            )
            model, info = loaded
            missing = [(name, "missing") for name in sorted(info["missing_keys"])]
            others = sorted(info["mismatched_keys"])
            missing += [(n, f"of shape {tuple(a)}, expected is {tuple(b)}") for n, a, b in others]
            if missing:
                raise CheckpointError(
                    f"{config.name}: the weights do not fit config.json: {len(missing)} tensors do "
                    f"not, {missing[0][0]!r} is {missing[0][1]}; download or save the model again"
                )
            model = model if config.device_map else model.to(place)
    finally:
        logging.set_verbosity(before)
    model.eval().requires_grad_(config.mode == "full")
    model = _with_lora(model, config) if config.mode == "lora" else model
    return HubReader(model, tokenizer, config)


def empty_hub_model(config: HubConfig) -> tuple[nn.Module, int]:
    """The model without weights, and its width; only its configuration is read. Raises as above."""
    _, settings = _found(config)
    trusted = config.trust_remote_code
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(settings, trust_remote_code=trusted)
    return model, settings.get_text_config(decoder=True).hidden_size


def check_name(name: str) -> None:
    """Refuse (ConfigError) a file, a folder that is no model, and an id that was never released."""
    path, problem = Path(name).expanduser(), ""
    if path.is_dir() and not (path / "config.json").is_file():
        problem = (
            "is not the folder of a model: it has no config.json; give a folder that "
            "`save_pretrained` wrote, or an id on the Hugging Face hub"
        )
    elif path.is_file():
        problem = f"is a file; give the folder of the model, here {path.parent}"
    elif not path.exists() and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        problem = f"there is no such folder; give one, or an id such as {META}.2-1B"
    elif name in (f"{META}.2-8B", f"{META}.2-8B-Instruct"):  # older pipelines name them
        kind = name.removeprefix(f"{META}.2-8B")
        problem = f"does not exist; use {META}.2-1B{kind}, {META}.2-3B{kind} or {META}.1-8B{kind}"
    if problem:
        raise ConfigError(f"{name}: {problem}")


def _found(config: HubConfig) -> tuple[dict[str, Any], Any]:
    """Where a model is read from, and its configuration, which is one of a causal model."""
    name, revision = config.name, config.revision or "main"
    check_name(name)
    folder = Path(name).expanduser()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder) if folder.is_dir() else name,
        "revision": revision,
        "local_files_only": folder.is_dir() or _only_cached(name, revision),
        "trust_remote_code": config.trust_remote_code,
    }
    with _reading(name, "config.json"):
        settings = AutoConfig.from_pretrained(**source)
    classes = getattr(settings, "architectures", None) or []
    masked = any(one.endswith("ForMaskedLM") for one in classes)
    known = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING
    if masked or not (known or "AutoModelForCausalLM" in getattr(settings, "auto_map", {})):
        kind = classes[0] if masked else f"model of type {settings.model_type}"
        raise ConfigError(
            f"{name}: is a {kind}, not a causal language model; use one that predicts the next "
            f"token, such as {META}.2-1B"
        )
    return source, settings


def _only_cached(name: str, revision: str) -> bool:
    """Whether the hub cannot be reached, so that only what is in the cache can be used.

    Asked once: the libraries below would wait half a minute and try again for each file.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=10.0)
    except Exception as error:
        causes = list(_causes(error))
        if any(map(_is_unreachable, causes)):
            return True
        if any(isinstance(cause, UNKNOWN) for cause in causes):
            raise _explained(name, "entry on the hub", error) from error
    return False


def _with_lora(model: Any, config: HubConfig) -> Any:
    """The same model with LoRA matrices (float32) in its linear layers, the only trained ones."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora).get_base_model().eval()
    except ValueError as error:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear}
        raise ConfigError(
            f"hub.lora_targets = {list(config.lora_targets)} names no linear layer of "
            f"{config.name}; allowed are {', '.join(sorted(linear))}, or leave it out"
        ) from error


@contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Turn whatever is raised while `what` of a model is read into one sentence."""
    try:
        yield
    except ArctrmError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise _explained(name, what, error) from error


def _explained(name: str, what: str, error: Exception) -> ArctrmError:
    if isinstance(error, torch.OutOfMemoryError):
        return ResourceError(
            f"{name}: does not fit into the memory of the GPU; set dtype = 'bfloat16', "
            "device_map = 'auto' or use a smaller model"
        )
    chain = list(_causes(error))
    text = " ".join(str(cause) for cause in chain)
    told = {"name": name, "cache": constants.HF_HUB_CACHE}
    for sign, sentence in REFUSALS:
        found: list[BaseException]
        if isinstance(sign, str):
            found = [error] if any(mark in text for mark in sign.split("|")) else []
        elif sign is UNREACHABLE:
            found = [cause for cause in chain if _is_unreachable(cause)]
        else:
            found = [c for c in chain if isinstance(c, sign) and not _is_unreachable(c)]
        if found:
            return ConfigError(f"{name}: {sentence.format(**told, reason=_reason(found[0]))}")
    kind = CheckpointError if isinstance(error, SafetensorError) else ConfigError
    return kind(f"{name}: its {what} cannot be read ({_reason(error)}); download or save it again")


def _is_unreachable(error: BaseException) -> bool:
    """No connection; the class of the HTTP library is known by name, as its package changes."""
    by_name = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return isinstance(error, UNREACHABLE) or by_name


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
