"""Turns a pydantic error into one sentence: origin, dotted key, what was got, what is allowed.

The models' own validators write their sentence themselves (with dotted keys); this module only
puts the origin before it.
"""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from arctrm.config.base import Key, all_fields, table_of
from arctrm.config.commands import KNOWN_KEYS, commands_with
from arctrm.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """One value and the file, variable or flag that gave it."""

    value: Any
    origin: str


Settings = dict[Key, Setting]
"""Path of a key -> its setting."""

_NUMBER = {"greater_than": "above {gt}", "greater_than_equal": "of at least {ge}"}
_NUMBER |= {"less_than": "below {lt}", "less_than_equal": "of at most {le}"}
ALLOWED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "path_type": "a path in quotes",
    "tuple_type": 'a list such as ["a", "b"]',
    "dict_type": "a table",
    "model_type": "a table",
    "literal_error": "{expected}",
    "missing": "one more item",
    "too_long": "at most {max_length} items",
    **{kind: f"a number {words}" for kind, words in _NUMBER.items()},
}
"""What is allowed, by pydantic's name of the error."""


def config_error(
    error: ValidationError, settings: Settings, model_class: type[BaseModel]
) -> ConfigError:
    """The first problem as a sentence, and how many more there are."""

    def place(problem: ErrorDetails) -> tuple[bool, bool]:
        # Unknown keys first: a misspelt key is the usual cause of another that is missing. Keys
        # that were given before those that an older key fills in.
        return problem["type"] != "extra_forbidden", problem["loc"] not in settings

    problems = sorted(error.errors(), key=place)
    sentence = _sentence(problems[0], settings, model_class)
    more = len(problems) - 1
    return ConfigError(f"{sentence} ({more} more error{'s'[: more > 1]})" if more else sentence)


def _sentence(problem: ErrorDetails, settings: Settings, model_class: type[BaseModel]) -> str:
    # A missing item is located where it should be; what was got is the list before it.
    location = problem["loc"][:-1] if problem["type"] == "missing" else problem["loc"]
    path = tuple(str(part) for part in location)
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    key, got = "".join(parts).removeprefix("."), _shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        return f"{_origin(path, settings)}: unknown key {key}; {_advice(path, model_class)}"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        origin = _origin(path, settings, message)
        if isinstance(problem["input"], dict):
            return f"{origin}: {message}"
        return f"{origin}: {key} = {message if message.startswith(got) else f'{got}: {message}'}"
    allowed = ALLOWED.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
    field = all_fields(model_class).get(path)
    advice = "change it or leave it out"
    if field and table_of(field):
        advice = f"write it as [{key}]"
    elif field and (default := field.get_default(call_default_factory=True)) is not None:
        advice = f"the default is {_shown(default)}"
    return f"{_origin(path, settings)}: {key} = {got}, allowed is {allowed}; {advice}"


def _origin(path: Key, settings: Settings, message: str = "") -> str:
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
    siblings = {key[-1]: ".".join(key) for key in keys if key[:-1] == path[:-1]}
    everywhere: dict[str, str] = {}
    for key in keys:  # a name may be in several tables
        before = everywhere.get(key[-1])
        everywhere[key[-1]] = f"{before} or {'.'.join(key)}" if before else ".".join(key)
    for names, cutoff in ((siblings, 0.6), (everywhere, 0.8)):
        if nearest := get_close_matches(path[-1], names, n=1, cutoff=cutoff):
            return f"did you mean {names[nearest[0]]}?"
    table = ".".join(path[:-1])
    owners = " and ".join(f"arctrm {name}" for name in commands_with(path[0]))
    belongs = f"{path[0]} belongs to {owners}, " if owners and not table else ""
    return f"{belongs}allowed {'in ' + table if table else 'here'}: {', '.join(siblings)}"


def _shown(value: object) -> str:
    """`value` as it would stand in TOML, cut when long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
