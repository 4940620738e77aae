"""The common base of all configuration models, the types of their fields, and their comparison."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class StrictModel(BaseModel):
    """Frozen, refuses unknown keys and infinite numbers; field docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of dotted keys that exclude each other: a key given in a later layer (file, variable,
    flag) displaces the other keys of its group in earlier layers."""


FREE: dict[str, Any] = {"resume": "free"}
"""`json_schema_extra` of a key that may differ when a run is resumed."""

MANY = 10**9
Count = Annotated[int, Field(ge=1, le=MANY)]
Number = Annotated[int, Field(ge=0, le=MANY)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
"""A share that leaves something: below 1."""
Rate = Annotated[float, Field(gt=0, le=100)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
LISTED = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Of a tuple: a file gives it as a list, which the strict mode refuses behind a validator."""
Names = Annotated[tuple[str, ...], LISTED]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(value: object) -> object:
    """Turn "90s", "10m", "1.5h" or a number of seconds into seconds (float)."""
    if isinstance(value, bool) or not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value, re.ASCII)
    if match is None:
        raise ValueError(f"{value!r} is not a duration; write for example '90s', '10m' or '1.5h'")
    return float(match[1]) * _UNITS[match[2] or "s"]


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, le=MANY)]
"""A duration: seconds, or text such as "90s", "10m", "1h"."""


def leaves(
    table: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every key that is no table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def differences(old: Mapping[str, Any], new: StrictModel) -> list[str]:
    """What keeps a run with the configuration `old` from being resumed with `new`.

    `old` is the stored `model_dump(mode="json")`; a key that it lacks had the default. Each item is
    `KEY = OLD then, NEW now`. Keys marked `FREE` are not compared.
    """
    return list(_differences(old, new.model_dump(mode="json"), type(new), ""))


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], model: type[BaseModel], prefix: str
) -> Iterator[str]:
    default = model().model_dump(mode="json")
    for key in dict.fromkeys((*new, *old)):
        field = model.model_fields.get(key)
        if field is not None and field.json_schema_extra == FREE:
            continue
        then, now = old.get(key, default.get(key)), new.get(key)
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(then, Mapping):
            yield from _differences(then, now or {}, kind, f"{prefix}{key}.")
        elif then != now:
            yield f"{prefix}{key} = {then} then, {now} now"
