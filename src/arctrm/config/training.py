"""`[training]` and `[tracking]`: batch, optimisers, schedule, checkpoints, logging."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from arctrm.config.base import FREE, LISTED, Count, Number, Part, Rate, Seconds, Share, StrictModel
from arctrm.config.model import PAIR_TOKENS


class OptimiserConfig(StrictModel):
    """Muon for the matrices of the layers, AdamW for everything else."""

    kind: Literal["muon", "adamw"] = "muon"
    """muon: Muon on the matrices of the layers + AdamW; adamw: AdamW on all."""
    muon_lr: Rate = 6e-3
    """Peak learning rate of Muon."""
    adamw_lr: Rate = 2e-3
    """Peak learning rate of AdamW."""
    momentum: Part = 0.95
    """Momentum of Muon."""
    betas: Annotated[tuple[Part, Part], LISTED] = (0.9, 0.95)
    """Betas of AdamW."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled weight decay of both."""
    clip_norm: float = Field(0.0, ge=0, le=1e9)
    """Clip the gradient to this norm; 0 = no clipping."""


class ScheduleConfig(StrictModel):
    """Warm-up, constant, linear decay to zero; in steps or in wall-clock time."""

    budget: Seconds | None = None
    """Wall-clock training time, such as "10m"; the decay ends on time."""
    max_steps: Count | None = None
    """Optimiser steps; give this or budget, not both."""
    warmup_steps: Number = 200
    """Optimiser steps of linear warm-up."""
    constant_fraction: Share = 0.4
    """Fraction of the run at which the decay begins."""

    def _problems(self) -> Iterator[str]:
        if (self.budget is None) == (self.max_steps is None):
            said = f"training.schedule.budget = {self.budget} and training.schedule.max_steps ="
            yield f"{said} {self.max_steps} contradict each other; give exactly one of the two"


class TrainingConfig(StrictModel):
    """The training loop."""

    tokens_per_batch: int = Field(16384, ge=PAIR_TOKENS, le=2**24)
    """Tokens in one packed batch of one process; the largest pair needs 1863."""
    grad_accum: int = Field(1, ge=1, le=4096)
    """Packed batches per optimiser step and process."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the layers; auto: bfloat16 on a GPU, float32 on a CPU."""
    compile: Literal["auto", "on", "off"] = Field("auto", json_schema_extra=FREE)
    """torch.compile of the layers; auto: on a GPU of compute capability 7 or more."""
    attention: Literal["auto", "flex"] = Field("auto", json_schema_extra=FREE)
    """Kernel of compiled layers; auto: arctrm's for heads of 64 on a GPU of compute capability 9 or
    more, else torch's flex attention."""
    cuda_graph: Literal["auto", "on", "off"] = Field("auto", json_schema_extra=FREE)
    """Replay forward and backward as one CUDA graph, the update as another; auto: on a GPU."""
    ema_decay: Part = 0.999
    """Decay of the exponential moving average of all trained weights; 0 = none."""
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = Field(ScheduleConfig(max_steps=1000), json_schema_extra=FREE)

    checkpoint_every: Seconds = Field(300.0, json_schema_extra=FREE)
    """Seconds between checkpoints (one is always written at the end)."""
    checkpoint_every_steps: Count | None = Field(None, json_schema_extra=FREE)
    """Optimiser steps between checkpoints, instead of seconds."""
    keep_last: Count = Field(2, json_schema_extra=FREE)
    """Checkpoints kept."""
    log_every: Count = Field(50, json_schema_extra=FREE)
    """Optimiser steps between log lines."""


class TrackingConfig(StrictModel):
    """Where metrics go beside `metrics.jsonl`."""

    wandb: bool = False
    """Log to Weights & Biases (offline without a login)."""
    project: str = "arc-trm-pretrain"
    """W&B project."""
    run_name: str | None = None
    """W&B run name."""
