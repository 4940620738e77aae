"""`[reader.scaling]` and `[trm.scaling]`: training rows whose grids are shown larger."""

from typing import Annotated

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel

Factor = Annotated[int, Field(ge=1, le=6)]
"""Rows or columns that one of a small grid becomes."""


class ScalingConfig(StrictModel):
    """Scale augmentation (VARC): every cell of both grids becomes a block of cells.

    In pretraining only; a learned vector tells the model by which block.
    """

    share: float = Field(0.0, ge=0, lt=1)
    """Share of the drawn rows that are shown larger, if they are small enough; 0 = none."""

    factors: tuple[tuple[Factor, Factor], ...] = ((1, 2), (2, 1), (2, 2))
    """Blocks [rows, columns] that a cell may become, each equally likely."""

    sides: int = Field(24, ge=1, le=30)
    """Bound on the sides of a grid that is shown larger; what would exceed it stays as it is."""

    @model_validator(mode="after")
    def _every_factor_changes_something(self) -> "ScalingConfig":
        if (1, 1) in self.factors or not self.factors:
            raise ValueError(
                f"scaling.factors = {[list(pair) for pair in self.factors]}: none, or one that "
                "changes nothing; give pairs [rows, columns] such as [[2, 2], [1, 2]]"
            )
        return self
