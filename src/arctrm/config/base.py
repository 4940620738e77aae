"""The common base of all configuration models."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Frozen, refuses unknown keys, takes field docstrings as descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of keys that exclude each other: one given in a later layer (file, variable, flag)
    displaces the others of earlier layers."""
