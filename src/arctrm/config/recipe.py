"""`[recipe]` of joint: the reader alone, TRM alone, then both joined, within one budget."""

from typing import ClassVar

from pydantic import Field, model_validator

from arctrm.config.answering import AnsweringConfig
from arctrm.config.base import StrictModel
from arctrm.config.data import Weight
from arctrm.config.training import Seconds, TrainingConfig

ROUNDING = 1e-6
"""How far the sum of the shares may be from 1."""


class StageDataConfig(StrictModel):
    """How one stage draws its pairs, where `[data]` does not say it; the tasks are the same."""

    num_aug: int | None = Field(None, ge=0)
    """Instead of data.num_aug."""

    weights: dict[str, Weight] | None = None
    """Instead of data.weights."""

    test_pair_weight: Weight | None = None
    """Instead of data.test_pair_weight."""

    area_power: float | None = Field(None, ge=0, le=1)
    """Instead of data.area_power."""

    identity_colours: float | None = Field(None, ge=0, le=1)
    """Instead of data.identity_colours."""

    enlarge_canvas: float | None = Field(None, ge=0, le=1)
    """Instead of data.enlarge_canvas."""


class RecipeConfig(StrictModel):
    """Stages of `joint` before the joint one, and the evaluation after it; off without a length."""

    alternatives: ClassVar = (("budget", "max_steps"),)

    budget: Seconds | None = None
    """Wall-clock time of the training of all stages together, such as "50m"; it and the shares take
    the place of training.schedule.budget and .max_steps of every stage."""

    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps of all stages together; give this or budget, not both."""

    reader: float = Field(0.6, ge=0, le=1)
    """Share of the length for the reader alone; 0 = it starts from reader_checkpoint, or untrained.
    """

    readers: int = Field(1, ge=1)
    """Readers of an ensemble, trained from different seeds one after the other, each for an equal
    part of that share (with a share of 0, none). All propose and judge; TRM is joined to the first.
    """

    trm: float = Field(0.15, ge=0, le=1)
    """Share of the length for TRM alone; 0 = it starts from trm_checkpoint, or untrained."""

    joint: float = Field(0.25, gt=0, le=1)
    """Share of the length for both joined, by the table training."""

    reader_training: TrainingConfig = TrainingConfig()
    """Training of the reader alone."""

    trm_training: TrainingConfig = TrainingConfig()
    """Training of TRM alone."""

    reader_data: StageDataConfig = StageDataConfig()
    trm_data: StageDataConfig = StageDataConfig()

    evaluate: bool = True
    """Score the joint checkpoint at the end."""

    evaluation: AnsweringConfig = AnsweringConfig()
    """The tables of `arctrm eval`: evaluation, inference, reader, adaptation."""

    @property
    def is_given(self) -> bool:
        """Whether there are stages at all."""
        return self.budget is not None or self.max_steps is not None

    @model_validator(mode="after")
    def _one_length(self) -> "RecipeConfig":
        if self.budget is not None and self.max_steps is not None:
            raise ValueError(
                f"recipe.budget = {self.budget} and recipe.max_steps = {self.max_steps} contradict "
                "each other; give one of the two"
            )
        fields = type(self).model_fields.items()
        changed = [name for name, field in fields if getattr(self, name) != field.default]
        if changed and not self.is_given:
            raise ValueError(
                f"recipe.{changed[0]} is given, but no length of the recipe; set recipe.budget, "
                "for example '50m', or leave the table recipe out"
            )
        return self

    @model_validator(mode="after")
    def _shares_are_whole(self) -> "RecipeConfig":
        total = self.reader + self.trm + self.joint
        if abs(total - 1) > ROUNDING:
            raise ValueError(
                f"recipe.reader = {self.reader}, recipe.trm = {self.trm} and recipe.joint = "
                f"{self.joint} sum to {total:.6g}, allowed is a sum of 1; change one of the shares"
            )
        return self
