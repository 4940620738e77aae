"""The tables of `arctrm eval`, which the end of a recipe has, too."""

from pydantic import model_validator

from arctrm.config.base import StrictModel
from arctrm.config.decoding import JudgingConfig
from arctrm.config.solving import EvaluationConfig, InferenceConfig, LearningConfig


class AnsweringConfig(StrictModel):
    """Which tasks are answered and scored, and how."""

    evaluation: EvaluationConfig = EvaluationConfig()
    inference: InferenceConfig = InferenceConfig()
    reader: JudgingConfig = JudgingConfig()
    adaptation: LearningConfig = LearningConfig()

    @model_validator(mode="after")
    def _adapts_to_what_is_told(self) -> "AnsweringConfig":
        if self.inference.blank_task_embedding and self.evaluation.adapts:
            raise ValueError(
                "inference.blank_task_embedding = true hides the tasks that "
                f"evaluation.{self.evaluation.adapted_for} adapts to; leave one of the two out"
            )
        return self
