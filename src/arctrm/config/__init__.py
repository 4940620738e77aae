"""Configuration: pydantic models, TOML files, overrides."""

from arctrm.config.base import Seconds, StrictModel, differences, parse_duration
from arctrm.config.commands import (
    COMMANDS,
    BaselineConfig,
    DataBuildConfig,
    DataShowConfig,
    EvalConfig,
    JointConfig,
    JointModelConfig,
    PretrainConfig,
    SolveConfig,
)
from arctrm.config.data import DataConfig, ScalingConfig
from arctrm.config.model import (
    PAIR_TOKENS,
    TINY,
    CouplingConfig,
    HubConfig,
    ReaderConfig,
    TRMConfig,
    TrunkConfig,
)
from arctrm.config.solving import (
    AdaptationConfig,
    EvaluationConfig,
    InferenceConfig,
    JudgeConfig,
    TaskChoiceConfig,
)
from arctrm.config.training import OptimiserConfig, ScheduleConfig, TrackingConfig, TrainingConfig
