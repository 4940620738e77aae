"""Turns a pydantic error into one sentence: origin, dotted key, what was got, what is allowed; the
sentences of the models' own validators only get their origin.
"""

import json
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from arctrm.config.base import Key, all_fields, table_of
from arctrm.config.commands import KNOWN_KEYS, commands_with
from arctrm.errors import ConfigError


class Setting(NamedTuple):
    """One value and the file, variable or flag that gave it."""

    value: Any
    origin: str


Settings = dict[Key, Setting]
"""Path of a key -> its setting."""
_ALLOWED = {"model_type": "should be a table", "missing": "should have one more item"}
"""What is allowed, where pydantic does not say it in the words of TOML."""


def config_error(
    error: ValidationError, settings: Settings, model_class: type[BaseModel]
) -> ConfigError:
    """The first problem as a sentence, and how many more there are."""
    # Unknown keys first: a misspelt key is the usual cause of another that is missing. Keys that
    # were given before those that an older key fills in.
    problems = error.errors()
    problems.sort(key=lambda p: (p["type"] != "extra_forbidden", p["loc"] not in settings))
    more = f" ({len(problems) - 1} more error{'s'[: len(problems) - 2]})" if problems[1:] else ""
    return ConfigError(_sentence(problems[0], settings, model_class) + more)


def _sentence(problem: ErrorDetails, settings: Settings, model_class: type[BaseModel]) -> str:
    # A missing item is located where it should be; what was got is the list before it.
    kind, message = problem["type"], problem["msg"]
    location = problem["loc"][:-1] if kind == "missing" else problem["loc"]
    path = tuple(str(part) for part in location)
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    key, got = "".join(parts).removeprefix("."), _shown(problem["input"])
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        if not isinstance(problem["input"], dict):
            message = f"{key} = {message if message.startswith(got) else f'{got}: {message}'}"
    elif kind == "extra_forbidden":
        message = f"unknown key {key}; {_advice(path, model_class)}"
    else:
        field, advice = all_fields(model_class).get(path), "change it or leave it out"
        if field and table_of(field):
            advice = f"write it as [{key}]"
        elif field and (default := field.get_default(call_default_factory=True)) is not None:
            advice = f"the default is {_shown(default)}"
        # Pydantic's sentence, such as "Input should be a valid integer", without its subject.
        message = f"{key} = {got} {_ALLOWED.get(kind, message.partition(' ')[2])}; {advice}"
    return f"{_origin(path, settings, message)}: {message}"


def _origin(path: Key, settings: Settings, message: str) -> str:
    """Where the value at `path` came from; for a table, where the keys in `message` came from."""
    for known, setting in settings.items():
        if path[: len(known)] == known:
            return setting.origin
    below = {k: s.origin for k, s in settings.items() if k[: len(path)] == path}
    # A key of the older pipeline stands for one of a table.
    below |= {
        new: f"{settings[old,].origin} {old}"
        for old, new in KNOWN_KEYS.items()
        if (old,) in settings and new not in settings and new[: len(path)] == path
    }
    named = [origin for known, origin in below.items() if ".".join(known) in message]
    origins = dict.fromkeys(o for o in named or below.values() if o != "default")
    return " and ".join(origins) or "defaults"


def _advice(path: Key, model_class: type[BaseModel]) -> str:
    """The nearest valid key, else the keys that are valid in that table."""
    keys = list(all_fields(model_class))
    siblings = [key[-1] for key in keys if key[:-1] == path[:-1]]
    if nearest := get_close_matches(path[-1], siblings, n=1):
        return f"did you mean {'.'.join((*path[:-1], *nearest))}?"
    if nearest := get_close_matches(path[-1], [key[-1] for key in keys], n=1, cutoff=0.8):
        return f"did you mean {' or '.join('.'.join(k) for k in keys if k[-1] == nearest[0])}?"
    table = ".".join(path[:-1])
    owners = " and ".join(f"arctrm {name}" for name in commands_with(path[0]))
    belongs = f"{path[0]} belongs to {owners}, " if owners and not table else ""
    return f"{belongs}allowed {'in ' + table if table else 'here'}: {', '.join(siblings)}"


def _shown(value: object) -> str:
    """`value` as it would stand in TOML, cut when long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
