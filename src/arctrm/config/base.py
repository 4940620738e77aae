"""The common base of all configuration models, the types of their fields, and their comparison."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import SettingsConfigDict

PREFIX = "ARCTRM_"
"""Of the environment variables."""


class StrictModel(BaseModel):
    """Frozen, refuses unknown keys and infinite numbers; field docstrings are descriptions."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        enable_decoding=False,  # lists and tables in a variable are TOML, not JSON
    )

    def _problems(self) -> Iterator[str]:
        """Sentences about keys that contradict each other."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_problem(self) -> Self:
        for sentence in self._problems():
            raise ValueError(sentence)
        return self


FREE: dict[str, Any] = {"resume": "free"}
"""`json_schema_extra` of a key that may differ when a run is resumed."""

MANY = 10**9
Count = Annotated[int, Field(ge=1, le=MANY)]
Number = Annotated[int, Field(ge=0, le=MANY)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
"""A share that leaves something: below 1."""
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
LISTED = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Of a tuple: a file gives it as a list, which the strict mode refuses behind a validator."""
Names = Annotated[tuple[str, ...], LISTED]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(value: object) -> object:
    """Turn "90s", "10m", "1.5h" into seconds (float); what is no text stays as it is."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value, re.ASCII)
    if match is None:
        raise ValueError(f"{value!r} is not a duration; write for example '90s', '10m' or '1.5h'")
    return float(match[1]) * _UNITS[match[2] or "s"]


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, le=MANY)]
"""A duration: seconds, or text such as "90s", "10m", "1h"."""


Key = tuple[str, ...]
"""Path of a key: ("training", "schedule", "budget")."""
Fields = dict[Key, FieldInfo]


def leaves(table: Mapping[str, Any], prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    """(path, value) of every key that is no table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def table_of(field: FieldInfo) -> type[StrictModel] | None:
    """The model of a field that is a table."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, StrictModel) else None


def all_fields(model: type[BaseModel], prefix: Key = ()) -> Fields:
    """Path -> field, of every key and table of a model."""
    found: Fields = {}
    for name, field in model.model_fields.items():
        found[*prefix, name] = field
        if table := table_of(field):
            found |= all_fields(table, (*prefix, name))
    return found


def differences(old: Mapping[str, Any], new: StrictModel) -> list[str]:
    """What keeps a run from being resumed with `new`: `KEY = OLD then, NEW now`; `FREE` keys may.

    `old` is the stored `model_dump(mode="json")`; a key that it lacks had the default.
    """
    free = {path for path, field in all_fields(type(new)).items() if field.json_schema_extra}
    now = dict(leaves(new.model_dump(mode="json")))
    then = dict(leaves(type(new)().model_dump(mode="json"))) | dict(leaves(old))
    return [
        f"{'.'.join(path)} = {then.get(path)} then, {now.get(path)} now"
        for path in dict.fromkeys((*now, *then))
        if then.get(path) != now.get(path)
        and not any(path[:n] in free for n in range(len(path) + 1))
    ]
