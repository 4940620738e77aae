"""From a name to a `HubReader`: what is cheap to refuse is refused before gigabytes are read.

Nothing is unpickled (safetensors only), no code of a model's makers is run unless asked for, and
weights that leave a part of the model at random values are an error. What the libraries below raise
becomes one sentence with the model's name in front.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from arctrm import hub
from arctrm.config import HubConfig
from arctrm.errors import ArctrmError, CheckpointError, ConfigError
from arctrm.reader.hub import HubReader
from arctrm.reader.hub_prompts import check_chat_template, find_spelling
from arctrm.system import compute_dtype, memory_errors

META, GGUF = "meta-llama/Llama-3", ".gguf"
Spread = Callable[[nn.Module], None]


def load_hub_reader(
    config: HubConfig, device: torch.device | None = None, spread: Spread | None = None
) -> HubReader:
    """Load a model and its tokenizer; `config.device` comes before `device`, else CUDA or CPU.
    `spread` gives processes their parts of the layers.

    Raises ConfigError (it is not there, may not be read, or cannot spell grids), CheckpointError
    (its weights are incomplete) or ResourceError (it does not fit).
    """
    source, settings = _found(config)
    if config.mode == "lora" and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "hub.mode = 'lora' needs the package peft, which is not installed; run "
            "`pip install 'arctrm[peft]'` or set hub.mode = 'frozen'"
        )
    place = config.device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _reading(config.name, f"hub.device = '{place}' cannot be used"):
        place = torch.empty(0, device=place).device
    with _reading(config.name, "its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    find_spelling(tokenizer, config.name)  # before gigabytes are read
    if config.prompt == "chat":
        check_chat_template(tokenizer, config.name)
    narrow = place.type == "cuda" and config.mode != "full"
    usual = compute_dtype("auto", place) if narrow else torch.float32
    dtype = usual if config.dtype == "auto" else getattr(torch, config.dtype)
    _require_memory(config, settings, dtype, torch.device("cpu") if spread else place)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # no tables of missing tensors: they become one sentence
    try:
        with _reading(config.name, "its weights cannot be read"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **source,
                config=settings,
                dtype=dtype,
                device_map=config.device_map,
                use_safetensors=True,  # nothing is unpickled
                ignore_mismatched_sizes=True,  # and then refused, by name
                output_loading_info=True,
            )
            model, info = loaded
            missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
            if missing:
                raise CheckpointError(
                    f"{config.name}: {len(missing)} tensors, such as {missing[0]!r}, are missing "
                    "or of another shape than config.json says; download or save the model again"
                )
            model = model if config.device_map or spread else model.to(place)
    finally:
        logging.set_verbosity(before)
    model.eval().requires_grad_(config.mode == "full")
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.requires_grad_(False)  # a grid is spelt by a dozen of its rows
    if config.mode == "lora":  # float32 matrices in linear layers, the only trained ones
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_targets) or "all-linear",
            task_type="CAUSAL_LM",
        )
        with _reading(config.name, f"hub.lora_targets = {list(config.lora_targets)} cannot be had"):
            model = get_peft_model(model, lora).get_base_model().eval()
    if spread:
        spread(model)
        model.to(place)
    return HubReader(model, tokenizer, config)


def empty_hub_model(config: HubConfig, settings: Any = None) -> tuple[nn.Module, int]:
    """The model without weights, and its width, from its `settings` or what is read of them."""
    settings, trusted = settings or _found(config)[1], config.trust_remote_code
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(settings, trust_remote_code=trusted)
    return model, settings.get_text_config(decoder=True).hidden_size


def _require_memory(config: HubConfig, settings: Any, dtype: torch.dtype, place: Any) -> None:
    """Raise ConfigError where the weights alone are more than the free memory of `place`."""
    if config.device_map:
        return  # it may have several devices
    with _reading(config.name, "its configuration cannot be used"):
        model, _ = empty_hub_model(config, settings)
    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    on_gpu = place.type == "cuda"
    free = torch.cuda.mem_get_info(place)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"{config.name}: its weights take {needed / 2**30:.1f} GiB as {dtype}, and "
            f"{free / 2**30:.1f} GiB are free on {place}; use a smaller model"
            f"{', or hub.device_map = ' + repr('auto') if on_gpu else ''}"
        )


def _found(config: HubConfig) -> tuple[dict[str, Any], Any]:
    """Where a model is read from, and its configuration, which is one of a causal model."""
    name, revision = config.name, config.revision or "main"
    path, problem, file = Path(name).expanduser(), "", None
    if name.endswith(GGUF) and (path.is_file() or name.count("/") == 2):
        file, path = path.name, path.parent
        name = str(path)
        if importlib.util.find_spec("gguf") is None:
            problem = "needs the package gguf, which is not installed; run "
            problem += "`pip install 'arctrm[gguf]'`"
    elif path.exists() and not (path / "config.json").is_file():
        problem = "is not the folder of a model: it has no config.json"
    elif not path.exists() and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        problem = f"there is no such folder; give one, or an id such as {META}.2-1B"
    elif name in (f"{META}.2-8B", f"{META}.2-8B-Instruct"):  # older pipelines name them
        kind = name.removeprefix(f"{META}.2-8B")
        problem = f"does not exist; use {META}.2-1B{kind}, {META}.2-3B{kind} or {META}.1-8B{kind}"
    if problem:
        raise ConfigError(f"{config.name}: {problem}")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path) if path.is_dir() else name,
        "revision": revision,
        "local_files_only": path.is_dir() or _only_cached(name, revision),
        "trust_remote_code": config.trust_remote_code,
        **({"gguf_file": file} if file else {}),
    }
    with _reading(config.name, f"its {'header' if file else 'config.json'} cannot be read"):
        settings = AutoConfig.from_pretrained(**source)
    classes = getattr(settings, "architectures", None) or []
    masked = any(one.endswith("ForMaskedLM") for one in classes)
    known = type(settings) in CAUSAL
    if masked or not (known or "AutoModelForCausalLM" in getattr(settings, "auto_map", {})):
        kind = f"a model of type {settings.model_type}, not a causal language model"
        raise ConfigError(f"{config.name}: is {kind}; use one that is, such as {META}.2-1B")
    return source, settings


def _only_cached(name: str, revision: str) -> bool:
    """Whether the hub cannot be reached. Asked once: the libraries would try long for each file."""
    try:
        HfApi().model_info(name, revision=revision, timeout=10.0)
    except Exception as error:
        return hub.is_unreachable(error)
    return False


@contextmanager
def _reading(name: str, problem: str) -> Iterator[None]:
    """Turn whatever is raised into one sentence."""
    cure = "set hub.dtype = 'bfloat16', hub.device_map = 'auto' or use a smaller model"
    try:
        with memory_errors(lambda: f"{name}: does not fit into memory; {cure}"):
            yield
    except ArctrmError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more precise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        problem = hub.refusal(error, name) or f"{problem} ({lines[0].rstrip('.:')})"
        raise ConfigError(f"{name}: {problem}") from error
