"""Reads a command's configuration from its layers and remembers where each key came from.

Precedence, lowest first: the model's defaults, the record of the resumed run (`config.json`), TOML
files from left to right (tables are merged, everything else is replaced), environment variables
(`ARCTRM_TRUNK__HIDDEN_SIZE=64`), `--set a.b=c`, the command's own flags.  Every value is kept as a
`Setting` with its origin, so that an error names the file, flag or variable to mend.  Validation is
strict: "5" is not 5.  `null` in an override or variable, and "" in a file, unset a key that may be
absent (TOML has no null).  A key displaces its `alternatives` in the layers below: `--set
training.schedule.max_steps=100` drops the budget of a file.
"""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

import arctrm
from arctrm.config.base import Fields, Key, StrictModel, all_fields, leaves, table_of
from arctrm.config.commands import commands_with
from arctrm.config.sentences import Setting, Settings, config_error
from arctrm.errors import ConfigError

Model = TypeVar("Model", bound=StrictModel)

ENV_PREFIX = "ARCTRM_"
NOT_CONFIG = {"ARCTRM_DEBUG"}
_PACKAGE = Path(arctrm.__file__).parent
# In an installed package, and in a clone.
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs")


def load_config(
    model_class: type[Model],
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
    record: Path | None = None,
) -> Model:
    """Merge the layers and validate them as `model_class`.

    `files` are paths, or names of shipped configurations such as `arc1_1h`; `overrides` the texts
    after `--set`; `flags` maps a flag's name to its dotted key and value (None: not given);
    `environ` is the process environment unless given; `record` the `config.json` of an earlier run.

    Raises:
        ConfigError: one sentence with origin, dotted key, what was got and what is allowed.
    """
    fields = all_fields(model_class)
    groups = _groups(model_class)
    given = {tuple(key.split(".")): Setting(v, name) for name, (key, v) in (flags or {}).items()}
    settings: Settings = {}
    for layer in (
        _default_layer(model_class),
        _record_layer(model_class, record) if record else {},
        *(_file_layer(path) for path in files),
        _environment_layer(model_class, fields, os.environ if environ is None else environ),
        _override_layer(fields, overrides),
        {path: setting for path, setting in given.items() if setting.value is not None},
    ):
        for path, setting in layer.items():
            for other in {other for group in groups if path in group for other in group}:
                if other not in layer:
                    settings.pop(other, None)
            _put(settings, path, setting)
    tree: dict[str, Any] = {}
    for path, setting in settings.items():
        table = tree
        for part in path[:-1]:
            table = table.setdefault(part, {})
        absent = setting.value == "" and type(None) in _types(fields.get(path))
        table[path[-1]] = None if absent else setting.value
    try:
        # The strict JSON mode takes a list for a tuple and a text for a path, and nothing else.
        return model_class.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise config_error(error, settings, model_class) from None


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package: name -> file."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), _SHIPPED[0])
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def _groups(model: type[StrictModel], prefix: Key = ()) -> list[set[Key]]:
    """`alternatives` of the model and its tables, as paths from the top."""
    groups = [{(*prefix, *key.split(".")) for key in group} for group in model.alternatives]
    for name, field in model.model_fields.items():
        if table := table_of(field):
            groups += _groups(table, (*prefix, name))
    return groups


def _default_layer(model: type[BaseModel], prefix: Key = ()) -> Settings:
    """What the defaults of nested models set beyond those models' own defaults.

    Without this layer a file with `[inference] dtype = ...` would lose the `views` that a command
    sets in `inference: InferenceConfig = InferenceConfig(views=32)`.
    """
    found: Settings = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            found |= _default_layer(type(field.default), (*prefix, name))
            given = field.default.model_dump(mode="json", exclude_unset=True)
            found |= {path: Setting(v, "default") for path, v in leaves(given, (*prefix, name))}
    return found


def _file_layer(name: Path) -> Settings:
    shipped = shipped_configs()
    is_bare = name.parent == Path(".") and name.suffix in ("", ".toml") and not name.exists()
    path = shipped.get(name.stem, name) if is_bare else name
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [*map(str, sorted(path.parent.glob("*.toml"))), *shipped]
        nearest = get_close_matches(str(name), known, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"shipped are {', '.join(shipped)}"
        raise ConfigError(f"{path}: there is no such file; {advice}") from None
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise ConfigError(f"{path}: {reason}; --config wants a readable TOML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; --config wants a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        reason = f"{error}"[:1].lower() + f"{error}"[1:]
        raise ConfigError(f"{path}: not valid TOML, {reason}; mend that line") from None
    return {leaf: Setting(value, str(path)) for leaf, value in leaves(table)}


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
    return {leaf: Setting(value, str(path)) for leaf, value in leaves(given)}


def _environment_layer(
    model_class: type[BaseModel], fields: Fields, environ: Mapping[str, str]
) -> Settings:
    layer: Settings = {}
    for name in sorted(environ):
        # An empty value means "not set" by convention.
        if not name.startswith(ENV_PREFIX) or name in NOT_CONFIG or not environ[name]:
            continue
        path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        # A variable of another command's table is meant for that command and must not stop this.
        if path[0] in model_class.model_fields or not commands_with(path[0]):
            value = _parse_text(environ[name], fields.get(path))
            layer |= _parts(path, value, f"environment {name}")
    return layer


def _override_layer(fields: Fields, overrides: Sequence[str]) -> Settings:
    layer: Settings = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise ConfigError(
                f"--set: got {override!r}, allowed is KEY=VALUE; "
                "write for example --set trunk.hidden_size=256"
            )
        for leaf, part in _parts(
            path, _parse_text(text.strip(), fields.get(path)), "--set"
        ).items():
            _put(layer, leaf, part)
    return layer


def _parts(path: Key, value: object, origin: str) -> Settings:
    """A table as its leaves, anything else as it is."""
    found = dict(leaves(value, path)) if isinstance(value, dict) and value else {path: value}
    return {leaf: Setting(part, origin) for leaf, part in found.items()}


def _put(settings: Settings, path: Key, setting: Setting) -> None:
    """Set one path; settings above or below it in the tree go."""
    for known in list(settings):
        shorter = min(len(known), len(path))
        if known[:shorter] == path[:shorter]:
            del settings[known]
    settings[path] = setting


def _parse_text(text: str, field: FieldInfo | None) -> object:
    """`text` as a TOML value, else as a bare string; a field of texts takes it as it stands."""
    if text == "null":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if {str, Path} & _types(field) and not isinstance(value, str) else value


def _types(field: FieldInfo | None) -> set[Any]:
    """The members of a union, else the one type."""
    kind = field.annotation if field else None
    return set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
