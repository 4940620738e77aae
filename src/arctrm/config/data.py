"""`[data]`: which tasks are trained on, which are evaluated, and how views are drawn."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel

KNOWN_LEAKS = ("40853293", "8719f442")
"""Training task 40853293 holds the test pair of ARC-AGI-1 evaluation task 070dd51e; 8719f442 (an
evaluation task that is also in ARC-AGI-2 training) the test input of evaluation task 6ea4a07e."""


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DataConfig(StrictModel):
    """Sources, split, overlap guard and view drawing."""

    subsets: tuple[str, ...] = ("training", "evaluation")
    """Bundled names (training, evaluation: ARC-AGI-1; training2, evaluation2: ARC-AGI-2) or paths
    to a task file, a folder of task files, a Kaggle challenges file or a `.json.gz` map."""

    test_set: str | None = "evaluation"
    """The subset that is evaluated: only the demonstrations of its tasks are trained on."""

    path: Path | None = None
    """Folder of the built data set; built there first when it does not exist."""

    num_aug: int = Field(1000, ge=0)
    """Bound on the distinct views of each task that training draws; 0 = unbounded."""

    exclude: tuple[str, ...] = KNOWN_LEAKS
    """Task ids left out of training (their content, not their name, is the reason); the test set
    itself stays whole."""

    allow_overlap: tuple[str, ...] = ()
    """Task ids that may be trained on although they share test content with the test set."""

    drop_overlap: bool = False
    """Leave out every task the overlap guard finds, instead of refusing to build."""

    max_tasks: int | None = Field(None, ge=1)
    """Use only the first tasks (by id) of each subset: for smoke runs."""

    held_out: int = Field(0, ge=0)
    """Tasks of each subset but the test set, chosen by a hash of their ids, whose test pairs are
    not trained on: a validation set for choosing settings (`evaluation.held_out`)."""

    weights: dict[str, Weight] = Field(default_factory=dict)
    """Relative weight of one pair of a subset when pairs are drawn (label -> weight, default 1);
    a label is the bundled name or the file's stem."""

    test_pair_weight: Weight = 1.0
    """Relative weight of a test pair, of the tasks whose test pairs are trained on; 0 = only
    demonstrations are drawn."""

    area_power: float = Field(0.0, ge=0, le=1)
    """Pairs are drawn with weight (cells of the canvas) ^ -area_power: above 0, small pairs, which
    cost less and are learned first, come more often."""

    identity_colours: float = Field(0.2, ge=0, le=1)
    """Probability that a view keeps its colours (TRM is told so by a flag)."""

    enlarge_canvas: float = Field(0.25, ge=0, le=1)
    """Probability that the canvas is larger than the pair needs (compact layout)."""

    translate: float = Field(0.0, ge=0, le=1)
    """Probability that the pair is shifted on the 30x30 canvas (reference layout)."""

    @model_validator(mode="after")
    def _test_set_is_loaded(self) -> "DataConfig":
        if self.test_set is not None and self.test_set not in self.subsets:
            raise ValueError(
                f"data.test_set = {self.test_set!r} is not among data.subsets = "
                f"{list(self.subsets)}; add it there, or set data.test_set to one of them "
                "or to '' for none"
            )
        return self
