"""Reads a command's configuration from its layers and remembers where each key came from.

Precedence, lowest first: the model's defaults, the record of the resumed run (`config.json`), TOML
files from left to right (tables are merged, everything else is replaced), environment variables
(`ARCTRM_TRUNK__HIDDEN_SIZE=64`), `--set a.b=c`, the command's own flags.  Validation is strict: "5"
is not 5.  `null` in an override or variable, and "" in a file, unset a key that may be absent (TOML
has no null).  A key displaces its `ALTERNATIVES` in the layers below.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import tomli
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

import arctrm
from arctrm.config.base import PREFIX, Fields, Key, StrictModel, all_fields, leaves
from arctrm.config.commands import ALTERNATIVES, commands_with
from arctrm.config.sentences import Setting, Settings, config_error
from arctrm.errors import ConfigError
from arctrm.system import read_json, read_limited

Model = TypeVar("Model", bound=StrictModel)
MAX_PARTS = 16  # of a dotted key

SHIPPED = Path(arctrm.__file__).parent / "configs"


def load_config(
    model_class: type[Model],
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    record: Path | None = None,
) -> Model:
    """Merge the layers and validate them as `model_class`.

    `files` are paths, or names of shipped configurations such as `arc1_1h`; `overrides` the texts
    after `--set`; `flags` maps a flag's name to its dotted key and value (None: not given);
    `record` is the `config.json` of an earlier run.

    Raises:
        ConfigError: one sentence with origin, dotted key, what was got and what is allowed.
    """
    fields = all_fields(model_class)
    given = {tuple(key.split(".")): Setting(v, name) for name, (key, v) in (flags or {}).items()}
    settings: Settings = {}
    for layer in (
        _default_layer(fields),
        _record_layer(model_class, record) if record else {},
        *(_file_layer(path) for path in files),
        _environment_layer(model_class, fields),
        _override_layer(fields, overrides),
        {path: setting for path, setting in given.items() if setting.value is not None},
    ):
        for path, setting in layer.items():
            for other in {other for group in ALTERNATIVES if path in group for other in group}:
                if other not in layer:
                    settings.pop(other, None)
            _put(settings, path, setting)
    tree: dict[str, Any] = {}
    for path, setting in settings.items():
        if len(path) > MAX_PARTS:
            raise ConfigError(f"{setting.origin}: {'.'.join(path)[:60]}... has too many parts")
        table = tree
        for part in path[:-1]:
            table = table.setdefault(part, {})
        absent = setting.value == "" and type(None) in _types(fields.get(path))
        table[path[-1]] = None if absent else setting.value
    try:
        text = json.dumps(tree, default=str)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"a value of the configuration cannot be used: {error}") from None
    try:
        # The strict JSON mode takes a list for a tuple and a text for a path, and nothing else.
        return model_class.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise config_error(error, settings, model_class) from None


def as_flags(settings: Mapping[str, Any] | None) -> dict[str, tuple[str, Any]]:
    """Keys as after `--set` and their values, given in Python, as `flags` of `load_config`."""
    return {f"settings[{key!r}]": (key, value) for key, value in (settings or {}).items()}


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package: name -> file."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.toml"))}


def _default_layer(fields: Fields) -> Settings:
    """What a command's table sets beside its own defaults: a file may set another key of it."""
    found: Settings = {}
    for path, field in fields.items():
        if isinstance(field.default, BaseModel):
            given = field.default.model_dump(exclude_unset=True)
            found |= {leaf: Setting(value, "default") for leaf, value in leaves(given, path)}
    return found


def _record_layer(model_class: type[BaseModel], path: Path) -> Settings:
    """What an earlier run set beyond the defaults."""
    try:
        config = model_class.model_validate(read_json(path)["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not such a run's record ({reason}); give --config") from None
    return _parts((), config.model_dump(mode="json", exclude_defaults=True), str(path))


def _file_layer(name: Path) -> Settings:
    shipped = shipped_configs()
    is_bare = name.parent == Path(".") and name.suffix in ("", ".toml") and not name.is_file()
    path = shipped.get(name.stem, name) if is_bare else name
    try:
        return _parts((), tomli.loads(read_limited(path).decode()), str(name))
    except FileNotFoundError:
        known = [*map(str, sorted(path.parent.glob("*.toml"))), *shipped]
        nearest = get_close_matches(str(name), known, n=1) or [n for n in shipped if n == name.stem]
        advice = f"did you mean {nearest[0]}?" if nearest else f"shipped are {', '.join(shipped)}"
        raise ConfigError(f"{path}: there is no such file; {advice}") from None
    except (OSError, ValueError, RecursionError) as error:  # what is no UTF-8, and what is no TOML
        reason = (getattr(error, "strerror", None) or str(error)).replace("\n", " ")
        raise ConfigError(
            f"{path}: {reason[:1].lower()}{reason[1:]}; --config wants a readable TOML file"
        ) from None


def _environment_layer(model_class: type[BaseModel], fields: Fields) -> Settings:
    # The source wants a BaseSettings by its annotation only: any model's fields and config do.
    source = EnvSettingsSource(cast(Any, model_class))
    texts = dict(leaves(source()))
    # It passes over a name that no field takes: refused, unless it is another command's.
    for name, text in source.env_vars.items():
        path = tuple(name.removeprefix(PREFIX.lower()).split("__"))
        is_known = path[0] in model_class.model_fields or not commands_with(path[0])
        if name.startswith(PREFIX.lower()) and path != ("debug",) and is_known:
            texts.setdefault(path, text)
    layer: Settings = {}
    for path, text in texts.items():
        origin = f"environment {PREFIX}{'__'.join(path).upper()}"
        layer |= _parts(path, _parse_text(text, fields.get(path)), origin)
    return layer


def _override_layer(fields: Fields, overrides: Sequence[str]) -> Settings:
    layer: Settings = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise ConfigError(
                f"--set: got {override!r}, allowed is KEY=VALUE such as trm.share=0.3"
            )
        value = _parse_text(text.strip(), fields.get(path))
        for leaf, setting in _parts(path, value, "--set").items():
            _put(layer, leaf, setting)
    return layer


def _parts(path: Key, value: object, origin: str) -> Settings:
    """A table as its leaves, anything else as it is."""
    found = leaves(value, path) if isinstance(value, dict) and value else [(path, value)]
    return {leaf: Setting(part, origin) for leaf, part in found if leaf}


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
        value = tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also a number of too many digits
        return text
    return text if {str, Path} & _types(field) and not isinstance(value, str) else value


def _types(field: FieldInfo | None) -> set[Any]:
    """The members of a union, else the one type."""
    kind = field.annotation if field else None
    return set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
