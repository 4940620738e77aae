"""`[data]`: which tasks are trained on, which are evaluated, and how views are drawn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from arctrm.config.base import FREE, LISTED, Count, Names, Number, Part, Share, StrictModel, Weight

KNOWN_LEAKS = ("40853293", "8719f442")
"""Tasks that hold the test pair of evaluation task 070dd51e, the test input of 6ea4a07e."""
Factor = Annotated[int, Field(ge=1, le=6)]
Block = Annotated[tuple[Factor, Factor], LISTED]
"""Rows and columns that a cell of a small grid becomes."""
ShapeName = Literal["pad", "lines", "tile", "stretch"]


class ScalingConfig(StrictModel):
    """Scale augmentation (VARC): pairs shown larger; a learned vector tells the model how."""

    share: Part = 0.0
    """Share of the drawn pairs that are shown larger, if they are small enough; 0 = none."""
    factors: Annotated[tuple[Block, ...], LISTED, Field(min_length=1)] = ((1, 2), (2, 1), (2, 2))
    """Blocks [rows, columns] that a cell may become, each equally likely."""
    shapes: Annotated[tuple[ShapeName, ...], LISTED] = ()
    """Other ways, each as likely as a block. pad: a border of one colour; lines: one colour between
    all rows and columns; tile: twice, as it is or mirrored; stretch: some rows and columns twice.
    """
    sides: int = Field(24, ge=1, le=30)
    """Bound on the sides of a grid that is shown larger; what would exceed it stays as it is."""

    @property
    def num_ways(self) -> int:
        """Ways of showing a grid larger: blocks, then shapes."""
        return len(self.factors) + len(self.shapes)


class DataConfig(StrictModel):
    """Sources, split, overlap guard and view drawing."""

    subsets: Names = ("training", "evaluation")
    """Bundled names (training, evaluation: ARC-AGI-1; training2, evaluation2: ARC-AGI-2), public
    sets that were made (concept_arc, re_arc, re_arc_40, arc_gen), or paths to a task file, a folder
    of task files, a Kaggle challenges file or a `.json.gz` map."""
    test_set: str | None = "evaluation"
    """The subset that is evaluated: only the demonstrations of its tasks are trained on."""
    unseen_test_set: bool = False
    """Train on nothing of the test set, not even its demonstrations; the guard looks for these."""
    path: Path | None = Field(None, json_schema_extra=FREE)
    """Folder of the built data set; built there first when it does not exist."""
    num_aug: Number = 1000
    """Bound on the distinct views of each task that training draws; 0 = unbounded."""
    exclude: Names = KNOWN_LEAKS
    """Task ids left out of training, for their content; the test set itself stays whole."""
    allow_overlap: Names = ()
    """Task ids that may be trained on although they share test content with the test set."""
    drop_overlap: bool = False
    """Leave out every task the overlap guard finds, instead of refusing to build."""
    max_tasks: Count | None = None
    """Use only the first tasks (by id) of each subset: for smoke runs."""
    held_out: Number = 0
    """Tasks of each subset, by a hash of their ids, whose test pairs are kept for validation."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """Relative weight of one pair of a subset (bundled name or file's stem); 1 unless named."""
    test_pair_weight: Weight = 1.0
    """Relative weight of a test pair that may be trained on; 0 = demonstrations only."""
    area_power: Share = 0.0
    """Pairs are drawn with weight cells ^ -area_power: above 0, small pairs come more often."""
    identity_colours: Share = 0.2
    """Probability that a view keeps its colours (the model is told so by a flag)."""
    scaling: ScalingConfig = ScalingConfig()

    def _problems(self) -> Iterator[str]:
        if self.test_set is not None and self.test_set not in self.subsets:
            said = f"data.test_set = {self.test_set!r} is not among data.subsets ="
            yield f"{said} {list(self.subsets)}; add it there, or set data.test_set to '' for none"
        if self.unseen_test_set and self.test_set is None:
            yield "data.unseen_test_set = true, but no data.test_set is named; name one"
