"""From a name to a `HubReader`: what is cheap to refuse is refused before gigabytes are read.

Nothing is unpickled (safetensors only), no code of a model's makers is run unless asked for, and
weights that leave a part of the model at random values are an error.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging

from arctrm.config.reader_hub import HubReaderConfig
from arctrm.errors import ConfigError
from arctrm.reader.hub import HubReader
from arctrm.reader.hub_errors import (
    check_complete,
    check_is_causal,
    check_name,
    only_cached,
    reading,
)
from arctrm.reader.probing import probe
from arctrm.reader.prompts import check_chat_template


def load_hub_reader(config: HubReaderConfig, device: torch.device | None = None) -> HubReader:
    """Load a model and its tokenizer; `config.device` comes before `device`, else CUDA or CPU.

    Raises:
        ConfigError: there is no such model, it may not be read, or it cannot spell grids.
        CheckpointError: its weights are damaged or incomplete.
        ResourceError: it does not fit.
    """
    check_name(config.name)
    if config.mode == "lora":
        _require_peft()
    place = _place(config, device)
    source, settings = _settings(config)
    with reading(config.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    probe(tokenizer, config.cells, config.name)  # before gigabytes are read
    if config.prompt == "chat":
        check_chat_template(tokenizer, config.name)
    model = _load_model(config, source, settings, place)
    return HubReader(model, tokenizer, config)


def empty_hub_model(config: HubReaderConfig) -> tuple[nn.Module, int]:
    """The model without its weights, and its width; only its configuration is read.

    Raises:
        ConfigError: there is no such model, or it may not be read.
    """
    check_name(config.name)
    _, settings = _settings(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=config.trust_remote_code
        )
    return model, settings.get_text_config(decoder=True).hidden_size


def hub_width(config: HubReaderConfig) -> int:
    """The model's width; only its configuration is read.

    Raises:
        ConfigError: there is no such model, or it may not be read.
    """
    check_name(config.name)
    return _settings(config)[1].get_text_config(decoder=True).hidden_size


def _settings(config: HubReaderConfig) -> tuple[dict[str, Any], Any]:
    """Where a model is read from, and its configuration."""
    folder, revision = Path(config.name).expanduser(), config.revision or "main"
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(folder) if folder.is_dir() else config.name,
        "revision": revision,
        "local_files_only": only_cached(config.name, revision),
        "trust_remote_code": config.trust_remote_code,
    }
    with reading(config.name, "config.json"):
        settings = AutoConfig.from_pretrained(**source)
    check_is_causal(config.name, settings, type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING)
    return source, settings


def _load_model(
    config: HubReaderConfig, source: dict[str, Any], settings: Any, place: torch.device
) -> Any:
    with reading(config.name, "weights"), _without_reports():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source,
            config=settings,
            dtype=_dtype(config, place),
            device_map=config.device_map,
            use_safetensors=True,  # nothing is unpickled
            ignore_mismatched_sizes=True,  # and then refused, by name
            output_loading_info=True,
        )
        model, info = loaded
        check_complete(config.name, info)
        if config.device_map is None:
            model = model.to(place)
    model.eval().requires_grad_(config.mode == "full")
    return _with_lora(model, config) if config.mode == "lora" else model


@contextmanager
def _without_reports() -> Iterator[None]:
    """No tables of missing tensors on the terminal: they become one sentence."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _place(config: HubReaderConfig, device: torch.device | None) -> torch.device:
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(config.device) if config.device else device or default
    except RuntimeError as error:
        raise ConfigError(
            f"hub.device = {config.device!r} is not a device; use 'cpu', 'cuda' or 'cuda:0'"
        ) from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"hub.device = {str(place)!r}: there are {torch.cuda.device_count()} CUDA devices; "
            "leave hub.device out or set it to 'cpu'"
        )
    return place


def _dtype(config: HubReaderConfig, place: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    narrow = place.type == "cuda" and config.mode != "full"
    return torch.bfloat16 if narrow else torch.float32


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "hub.mode = 'lora' needs the package peft, which is not installed; run "
            "`pip install 'arctrm[peft]'` or set hub.mode = 'frozen'"
        )


def _with_lora(model: Any, config: HubReaderConfig) -> Any:
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
