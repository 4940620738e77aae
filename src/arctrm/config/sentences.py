"""Turns a pydantic error into one sentence: origin, dotted key, what was got, what is allowed.

The models' own validators write their sentence themselves (with dotted keys); this module only
puts the origin before it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from arctrm.config.commands import commands_with
from arctrm.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One value and the file, variable or flag that gave it."""

    value: Any
    origin: str


Settings = dict[tuple[str, ...], Setting]
"""Path of a key -> its setting."""

ALLOWED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "path_type": "a path in quotes",
    "tuple_type": 'a list such as ["a", "b"]',
    "dict_type": "a table",
    "model_type": "a table",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}",
    "missing": "one more item",
    "too_long": "at most {max_length} items",
}
"""What is allowed, by pydantic's name of the error."""


def config_error(
    error: ValidationError, settings: Settings, model_class: type[BaseModel]
) -> ConfigError:
    """The first problem as a sentence, and how many more there are."""
    # Unknown keys first: a misspelt key is the usual cause of what is then found missing.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    sentence = _sentence(problems[0], settings, model_class)
    more = len(problems) - 1
    return ConfigError(f"{sentence} ({more} more error{'s'[: more > 1]})" if more else sentence)


def _sentence(problem: ErrorDetails, settings: Settings, model_class: type[BaseModel]) -> str:
    # A missing item is located where it should be; what was got is the list before it.
    location = problem["loc"][:-1] if problem["type"] == "missing" else problem["loc"]
    path = tuple(str(part) for part in location)
    key, got = _dotted(location), _shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        return f"{_origin(path, settings)}: unknown key {key}; {_advice(path, model_class)}"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        origin = _origin(path, settings, message)
        if isinstance(problem["input"], dict):
            return f"{origin}: {message}"
        return f"{origin}: {key} = {message if message.startswith(got) else f'{got}: {message}'}"
    allowed = ALLOWED.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
    advice = _default_advice(path, model_class)
    return f"{_origin(path, settings)}: {key} = {got}, allowed is {allowed}; {advice}"


def _origin(path: tuple[str, ...], settings: Settings, message: str = "") -> str:
    """Where the value at `path` came from; for a table, where the keys in `message` came from."""
    for known, setting in settings.items():
        if path[: len(known)] == known:
            return setting.origin
    below = {k: s.origin for k, s in settings.items() if k[: len(path)] == path}
    named = [origin for known, origin in below.items() if ".".join(known) in message]
    origins = dict.fromkeys(o for o in named or below.values() if o != "default")
    return " and ".join(origins) or "defaults"


def _advice(path: tuple[str, ...], model_class: type[BaseModel]) -> str:
    """The nearest valid key, else the keys that are valid in that table."""
    keys = list(_all_keys(model_class))
    key = ".".join(path)
    table = key.rpartition(".")[0]
    siblings = {known.split(".")[-1]: known for known in keys if known.rpartition(".")[0] == table}
    everywhere: dict[str, str] = {}
    for known in keys:  # a name may be in several tables
        name = known.split(".")[-1]
        everywhere[name] = f"{everywhere[name]} or {known}" if name in everywhere else known
    for names, cutoff in ((siblings, 0.6), (everywhere, 0.8)):
        if nearest := get_close_matches(path[-1], names, n=1, cutoff=cutoff):
            return f"did you mean {names[nearest[0]]}?"
    owners = " and ".join(f"arctrm {name}" for name in commands_with(path[0]))
    belongs = f"{path[0]} belongs to {owners}, " if owners and not table else ""
    return f"{belongs}allowed {'in ' + table if table else 'here'}: {', '.join(siblings)}"


def _all_keys(model_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model_class.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _default_advice(path: tuple[str, ...], model_class: type[BaseModel]) -> str:
    value: Any = model_class()
    for part in path:
        value = getattr(value, part, PydanticUndefined)
    if isinstance(value, BaseModel):
        return f"write it as [{'.'.join(path)}]"
    if value is None or value is PydanticUndefined:
        return "change it or leave it out"
    shown = _shown(list(value) if isinstance(value, tuple) else value)
    return f"the default is {shown}"


def _dotted(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _shown(value: object) -> str:
    """`value` as it would stand in TOML, cut when long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
