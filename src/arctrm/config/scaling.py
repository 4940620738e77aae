"""`[reader.scaling]` and `[trm.scaling]`: training rows whose grids are shown larger."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel

Factor = Annotated[int, Field(ge=1, le=6)]
"""Rows or columns that one of a small grid becomes."""

ShapeName = Literal["pad", "lines", "tile", "stretch"]


class ScalingConfig(StrictModel):
    """Scale augmentation (VARC): every cell of both grids becomes a block of cells.

    In pretraining only; a learned vector tells the model by which block, or in which shape.
    """

    share: float = Field(0.0, ge=0, lt=1)
    """Share of the drawn rows that are shown larger, if they are small enough; 0 = none."""

    factors: tuple[tuple[Factor, Factor], ...] = ((1, 2), (2, 1), (2, 2))
    """Blocks [rows, columns] that a cell may become, each equally likely."""

    shapes: tuple[ShapeName, ...] = ()
    """Other ways of showing both grids larger, each as likely as one of the blocks. pad: up to two
    rows and columns of one colour on each side; lines: a line of one colour between all rows and
    columns; tile: twice beside or below itself, as it is or mirrored; stretch: a quarter of the
    rows and columns twice. pad and stretch where input and output have one size."""

    sides: int = Field(24, ge=1, le=30)
    """Bound on the sides of a grid that is shown larger; what would exceed it stays as it is."""

    @property
    def num_ways(self) -> int:
        """Ways of showing a grid larger: blocks, then shapes."""
        return len(self.factors) + len(self.shapes)

    @model_validator(mode="after")
    def _every_factor_changes_something(self) -> "ScalingConfig":
        if (1, 1) in self.factors or not self.factors:
            raise ValueError(
                f"scaling.factors = {[list(pair) for pair in self.factors]}: none, or one that "
                "changes nothing; give pairs [rows, columns] such as [[2, 2], [1, 2]]"
            )
        return self

    @model_validator(mode="after")
    def _every_shape_is_named_once(self) -> "ScalingConfig":
        if len(set(self.shapes)) < len(self.shapes):
            raise ValueError(
                f"scaling.shapes = {list(self.shapes)} names a shape twice; name each once"
            )
        return self
