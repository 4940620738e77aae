"""Reads a command's configuration from its layers and remembers where each key came from.

Precedence, lowest first: the model's defaults, the record of the run that is resumed
(`config.json`), TOML files from left to right (tables are merged, everything else is replaced),
environment variables (`ARCTRM_TRM__HIDDEN_SIZE=64`), `--set a.b=c`, the command's own flags.
Every value is kept as a flat `Setting` (dotted path, value, origin), so that an error names the
file, flag or variable to mend.  Validation is strict: "5" is not 5.

`null` in an override or variable, and "" in a file, unset a key that may be absent (TOML has no
null).  Keys that exclude each other (`alternatives` of a model) displace each other between
layers: `--set training.schedule.max_steps=100` drops the budget of the file below it.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import tomli
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource
from pydantic_settings.sources.utils import parse_env_vars

from arctrm.config.commands import commands_with
from arctrm.config.sentences import Setting, Settings, config_error
from arctrm.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

ENV_PREFIX = "ARCTRM_"
NOT_CONFIG = {"ARCTRM_DEBUG"}
FLAGS = {"hub.name": "--model", "evaluation.test_set": "--subset"}
"""Flags that are not named like their key."""


def load_config(
    model_class: type[Model],
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    record: Path | None = None,
) -> Model:
    """Merge the layers and validate them as `model_class`.

    `overrides` are the texts after `--set`; `extra` maps a dotted key to the value of a flag
    (None = flag not given); `environ` is the process environment unless given; `record` is the
    `config.json` of an earlier run.

    Raises:
        ConfigError: one sentence with origin, dotted key, what was got and what is allowed.
    """
    variables = os.environ if environ is None else environ
    layers = [_default_layer(model_class)]
    layers += [_record_layer(model_class, record)] if record else []
    layers += [_file_layer(path) for path in files]
    layers.append(_environment_layer(model_class, variables))
    layers.append(_override_layer(model_class, overrides))
    layers.append(_flag_layer(extra or {}))
    settings: Settings = {}
    for layer in layers:
        _lay(settings, layer, model_class)
    try:
        # The strict JSON mode takes a list for a tuple and a text for a path, and nothing else.
        return model_class.model_validate_json(_as_json(settings, model_class), strict=True)
    except ValidationError as error:
        raise config_error(error, settings, model_class) from None


def _default_layer(model_class: type[BaseModel], prefix: tuple[str, ...] = ()) -> Settings:
    """What the defaults of nested models set beyond those models' own defaults.

    Without this layer a file with `[inference] dtype = ...` would lose the `views` that the
    command sets in `inference: InferenceConfig = InferenceConfig(views=32)`.
    """
    found: Settings = {}
    for name, field in model_class.model_fields.items():
        if isinstance(field.default, BaseModel):
            path = (*prefix, name)
            found |= _default_layer(type(field.default), path)
            given = field.default.model_dump(mode="json", exclude_unset=True)
            found |= {leaf: Setting(value, "default") for leaf, value in _leaves(given, path)}
    return found


def _file_layer(path: Path) -> Settings:
    try:
        table = tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; {_nearest_file(path)}") from None
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise ConfigError(f"{path}: {reason}; --config wants a readable TOML file") from None
    except tomli.TOMLDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        raise ConfigError(
            f"{path}, line {error.lineno}: not valid TOML, {reason}; mend that line"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; --config wants a TOML file") from None
    return {leaf: Setting(value, str(path)) for leaf, value in _leaves(table)}


def _record_layer(model_class: type[BaseModel], path: Path) -> Settings:
    """What an earlier run set beyond the defaults."""
    try:
        config = model_class.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not the record of such a run ({str(error).splitlines()[0]}); "
            "give the run's configuration with --config"
        ) from None
    given = config.model_dump(mode="json", exclude_defaults=True)
    return {leaf: Setting(value, str(path)) for leaf, value in _leaves(given)}


class _Variable(EnvSettingsSource):
    """One variable as a tree of texts with the keys as the model writes them."""

    def __init__(self, model_class: type[BaseModel], name: str, text: str) -> None:
        # Any model's fields will do; only the annotation asks for a BaseSettings.
        super().__init__(cast(Any, model_class), env_prefix=ENV_PREFIX, env_nested_delimiter="__")
        self.env_vars = parse_env_vars({name: text})

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Leave `value` to `_parse_text`: lists and tables are TOML here, not JSON."""
        return value


def _environment_layer(model_class: type[BaseModel], environ: Mapping[str, str]) -> Settings:
    layer: Settings = {}
    for name in sorted(environ):
        # An empty value means "not set" by convention.
        if not name.startswith(ENV_PREFIX) or name in NOT_CONFIG or not environ[name]:
            continue
        found = dict(_leaves(_Variable(model_class, name, environ[name])()))
        # The source passes over a name that no field takes: it is refused, unless it is another
        # command's (an exported ARCTRM_TRM__... is meant for pretrain and must not stop solve).
        path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        if not found and (path[0] in model_class.model_fields or not commands_with(path[0])):
            found = {path: environ[name]}
        for key, text in found.items():
            value = _parse_text(text, _field_at(model_class, key))
            layer[key] = Setting(value, f"environment {name}")
    return layer


def _override_layer(model_class: type[BaseModel], overrides: Sequence[str]) -> Settings:
    layer: Settings = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise ConfigError(
                f"--set: got {override!r}, allowed is KEY=VALUE; "
                "write for example --set trm.hidden_size=256"
            )
        value = _parse_text(text.strip(), _field_at(model_class, path))
        leaves = _leaves(value, path) if isinstance(value, dict) and value else [(path, value)]
        for leaf, part in leaves:
            _put(layer, leaf, Setting(part, "--set"))
    return layer


def _flag_layer(extra: Mapping[str, Any]) -> Settings:
    layer: Settings = {}
    for key, value in extra.items():
        if value is not None:
            path = tuple(key.split("."))
            flag = FLAGS.get(key, "--" + path[-1].replace("_", "-"))
            layer[path] = Setting(value, flag)
    return layer


def _lay(settings: Settings, layer: Settings, model_class: type[BaseModel]) -> None:
    """Put `layer` over `settings`, in place."""
    for path, setting in layer.items():
        parent = _model_at(model_class, path[:-1])
        for group in getattr(parent, "alternatives", ()):
            if path[-1] in group:
                for other in group:
                    if (*path[:-1], other) not in layer:
                        settings.pop((*path[:-1], other), None)
        _put(settings, path, setting)


def _put(settings: Settings, path: tuple[str, ...], setting: Setting) -> None:
    """Set one path; what lay above or below it in the tree goes."""
    for known in list(settings):
        shorter = min(len(known), len(path))
        if known[:shorter] == path[:shorter]:
            del settings[known]
    settings[path] = setting


def _as_json(settings: Settings, model_class: type[BaseModel]) -> str:
    tree: dict[str, Any] = {}
    for path, setting in settings.items():
        table = tree
        for part in path[:-1]:
            table = table.setdefault(part, {})
        absent = setting.value == "" and _may_be_absent(_field_at(model_class, path))
        table[path[-1]] = None if absent else setting.value
    return json.dumps(tree, default=str)


def _leaves(
    table: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _parse_text(text: str, field: FieldInfo | None) -> object:
    """`text` as a TOML value, else as a bare string; a field of texts takes it as it stands."""
    if text == "null":
        return None
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text
    is_text = field is not None and {str, Path} & set(_types(field))
    return text if is_text and not isinstance(value, str) else value


def _types(field: FieldInfo) -> tuple[Any, ...]:
    """The members of a union, else the one type."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    return get_args(field.annotation) if is_union else (field.annotation,)


def _may_be_absent(field: FieldInfo | None) -> bool:
    return field is not None and type(None) in _types(field)


def _model_at(model_class: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The model of the table at `path`; None where there is none."""
    model: type[BaseModel] | None = model_class
    for part in path:
        field = model.model_fields.get(part) if model else None
        kind = field.annotation if field else None
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return model


def _field_at(model_class: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    model = _model_at(model_class, path[:-1])
    return model.model_fields.get(path[-1]) if model else None


def _nearest_file(path: Path) -> str:
    known = sorted(str(file) for file in path.parent.glob("*.toml"))
    nearest = get_close_matches(str(path), known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else "--config wants a TOML file that exists"
