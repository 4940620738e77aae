"""The whole configuration of each command."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from arctrm.config.answering import AnsweringConfig
from arctrm.config.base import StrictModel
from arctrm.config.baseline import BaselineConfig
from arctrm.config.data import DataConfig
from arctrm.config.decoding import JudgingConfig
from arctrm.config.joint import JointConfig
from arctrm.config.reader import ReaderConfig
from arctrm.config.solving import AdaptationConfig, InferenceConfig
from arctrm.config.training import Seconds, TrackingConfig, TrainingConfig
from arctrm.config.trm import TRMConfig
from arctrm.data.task import MAX_SIDE


class BuildConfig(StrictModel):
    """`arctrm data build`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    out: Path | None = None
    """Folder to write."""
    data: DataConfig = DataConfig()


class ShowConfig(StrictModel):
    """`arctrm data show`."""

    seed: int | None = Field(None, ge=0)
    """Draw the shown tasks at random with this seed; by default the first by id are shown."""
    out: Path | None = None
    """Text file to write instead of the terminal."""
    limit: int = Field(5, ge=1)
    """Tasks to show at most."""
    statistics: bool = False
    """Print sizes, canvas histogram and overlaps instead of tasks."""


class PretrainConfig(StrictModel):
    """`arctrm pretrain`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    out: Path | None = None
    """Run folder."""
    model: Literal["trm", "reader"] = "trm"
    """What is trained: TRM, or the tiny reader."""
    data: DataConfig = DataConfig()
    trm: TRMConfig = TRMConfig()
    reader: ReaderConfig = ReaderConfig()
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _a_row_fits(self) -> "PretrainConfig":
        if self.model == "reader":
            return self._a_sequence_fits()
        longest = self.trm.num_prefix_slots + MAX_SIDE * MAX_SIDE
        if self.training.tokens_per_batch < longest:
            raise ValueError(
                f"training.tokens_per_batch = {self.training.tokens_per_batch} holds no full "
                f"canvas with trm.num_prefix_slots = {self.trm.num_prefix_slots}; use {longest} "
                "or more"
            )
        return self

    def _a_sequence_fits(self) -> "PretrainConfig":
        longest, form = self.reader.longest_sequence, self.reader.sequence
        if self.training.tokens_per_batch < longest:
            what, cure = "the largest pair", ""
            if form == "task":
                what, cure = "a sequence of reader.max_tokens", ", or lower reader.max_tokens"
            raise ValueError(
                f"training.tokens_per_batch = {self.training.tokens_per_batch} is less than {what} "
                f"(reader.sequence = {form!r}: {longest} tokens); use {longest} or more{cure}"
            )
        return self


class EvalConfig(AnsweringConfig):
    """`arctrm eval`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    out: Path | None = None
    """Folder for scores.json and submission.json."""
    checkpoint: Path | None = None
    """Checkpoint folder or file; the bundled weights when absent."""
    submission: Path | None = None
    """Score this submission.json (or the one in this folder) instead of answering; no weights are
    loaded."""

    @model_validator(mode="after")
    def _answers_are_there_already(self) -> "EvalConfig":
        asked = {
            "checkpoint": self.checkpoint is not None,
            "evaluation.ablate": bool(self.evaluation.ablate),
            "evaluation.adapt_steps": self.evaluation.adapt_steps > 0,
            "evaluation.adapt_budget": self.evaluation.adapt_budget is not None,
            "evaluation.keep_candidates": self.evaluation.keep_candidates,
        }
        given = [key for key, is_given in asked.items() if is_given]
        if self.submission is not None and given:
            raise ValueError(
                f"submission = {str(self.submission)!r} is scored as it is, but {given[0]} is set; "
                "leave one of the two out"
            )
        return self


class SolveConfig(StrictModel):
    """`arctrm solve`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    out: Path | None = None
    """Folder for submission.json."""
    checkpoint: Path | None = None
    """Checkpoint folder or file; the bundled weights when absent."""
    budget: Seconds = 60.0
    """Wall-clock time per task."""
    keep_going: bool = False
    """In a folder, report a bad task and go on."""
    attempts: int = Field(2, ge=1, le=16)
    """Rounds of reader and TRM that the planner makes, where adapters join the two."""
    inference: InferenceConfig = InferenceConfig(views=32, compile="off")
    reader: JudgingConfig = JudgingConfig()
    adaptation: AdaptationConfig = AdaptationConfig()


COMMANDS: dict[str, type[StrictModel]] = {
    "data build": BuildConfig,
    "data show": ShowConfig,
    "pretrain": PretrainConfig,
    "joint": JointConfig,
    "eval": EvalConfig,
    "baseline": BaselineConfig,
    "solve": SolveConfig,
}
"""Command -> model of its configuration."""


def commands_with(key: str) -> list[str]:
    """The commands that know this top-level key."""
    return [name for name, model in COMMANDS.items() if key in model.model_fields]
