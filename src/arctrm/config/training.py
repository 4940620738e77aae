"""`[training]` and `[tracking]`: batch, optimisers, schedule, checkpoints, logging."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from arctrm.config.base import StrictModel

SMALLEST_BATCH = 1024
"""Tokens: room for one full canvas with its prefix slots."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(value: object) -> object:
    """Turn "90s", "10m", "1.5h" or a number of seconds into seconds (float)."""
    if isinstance(value, bool) or not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", value)
    if match is None:
        raise ValueError(f"{value!r} is not a duration; write for example '90s', '10m' or '1.5h'")
    return float(match[1]) * _UNITS[match[2] or "s"]


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
"""A duration: seconds, or text such as "90s", "10m", "1h"."""


class OptimiserConfig(StrictModel):
    """Muon for the matrices of the blocks, AdamW for everything else."""

    kind: Literal["muon", "adamw"] = "muon"
    """muon: Muon on block matrices + AdamW; adamw: AdamW on all."""

    muon_lr: float = Field(6e-3, gt=0)
    """Peak learning rate of Muon."""

    adamw_lr: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""

    momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of both."""

    clip_norm: float = Field(0.0, ge=0)
    """Clip the gradient to this norm; 0 = no clipping."""


class ScheduleConfig(StrictModel):
    """Warm-up, constant, linear decay to zero; in steps or in wall-clock time."""

    alternatives: ClassVar = (("budget", "max_steps"),)

    budget: Seconds | None = None
    """Wall-clock training time, such as "10m"; the decay ends on time."""

    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; give this or budget, not both."""

    warmup_steps: int = Field(200, ge=0)
    """Optimiser steps of linear warm-up."""

    constant_fraction: float = Field(0.4, ge=0, le=1)
    """Fraction of the run at which the decay begins."""

    @model_validator(mode="after")
    def _one_length(self) -> "ScheduleConfig":
        if (self.budget is None) == (self.max_steps is None):
            raise ValueError(
                f"training.schedule.budget = {self.budget} and training.schedule.max_steps = "
                f"{self.max_steps} contradict each other; give exactly one of the two"
            )
        return self


class TrainingConfig(StrictModel):
    """The training loop."""

    tokens_per_batch: int = Field(16384, ge=SMALLEST_BATCH)
    """Tokens (prefix slots + cells) in one packed batch of one process."""

    max_rows: int | None = Field(None, ge=1)
    """Bound on the pairs in one packed batch; by default room for pairs of the usual length of
    ARC-AGI-1, or for more where those of the data set are shorter."""

    grad_accum: int = Field(1, ge=1)
    """Packed batches per optimiser step and process; each has its own carry."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the blocks; auto: bfloat16 on a GPU, float32 on a CPU."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks; auto: on a GPU only."""

    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay forward and backward as one CUDA graph, the update as another; auto: on a GPU."""

    halt_max_steps: int | None = Field(None, ge=1)
    """Supervision steps before a row is replaced in training; by default trm.halt_max_steps."""

    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the exponential moving average of all trained weights; 0 = none."""

    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig(max_steps=1000)

    checkpoint_every: Seconds = 300.0
    """Seconds between checkpoints (one is always written at the end)."""

    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Optimiser steps between checkpoints, instead of seconds."""

    keep_last: int = Field(2, ge=1)
    """Checkpoints kept."""

    log_every: int = Field(50, ge=1)
    """Optimiser steps between log lines."""


class TrackingConfig(StrictModel):
    """Where metrics go beside `metrics.jsonl`."""

    wandb: bool = False
    """Log to Weights & Biases (offline without a login)."""

    project: str = "arc-trm-pretrain"
    """W&B project."""

    run_name: str | None = None
    """W&B run name."""
