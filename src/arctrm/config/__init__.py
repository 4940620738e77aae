"""Configuration: pydantic models, TOML files, overrides."""

from arctrm.config.baseline import BaselineConfig
from arctrm.config.commands import BuildConfig, EvalConfig, PretrainConfig, ShowConfig, SolveConfig
from arctrm.config.data import DataConfig
from arctrm.config.decoding import DecodingConfig, JudgingConfig
from arctrm.config.joint import CouplingConfig, JointConfig, JointModelConfig
from arctrm.config.reader import ReaderConfig
from arctrm.config.solving import (
    AdaptationConfig,
    EvaluationConfig,
    InferenceConfig,
    LearningConfig,
    TaskChoiceConfig,
)
from arctrm.config.training import OptimiserConfig, ScheduleConfig, TrackingConfig, TrainingConfig
from arctrm.config.trm import TRMConfig

__all__ = [
    "AdaptationConfig",
    "BaselineConfig",
    "BuildConfig",
    "CouplingConfig",
    "DataConfig",
    "DecodingConfig",
    "EvalConfig",
    "EvaluationConfig",
    "InferenceConfig",
    "JointConfig",
    "JointModelConfig",
    "JudgingConfig",
    "LearningConfig",
    "OptimiserConfig",
    "PretrainConfig",
    "ReaderConfig",
    "ScheduleConfig",
    "ShowConfig",
    "SolveConfig",
    "TRMConfig",
    "TaskChoiceConfig",
    "TrackingConfig",
    "TrainingConfig",
]
