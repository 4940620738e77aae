"""What a run will need, before it runs: arithmetic, memory, time and money.

Estimates, not promises: the rates are round figures of what this code reaches (benchmarks/).
"""

import torch

from arctrm.config.training import TrainingConfig
from arctrm.config.trm import TRMConfig

DOLLARS_PER_GPU_HOUR = 3.0
TOKENS_PER_PAIR = 195
"""Mean length of a row on the ARC-AGI-1 training mix (189 cells and border + prefix slots)."""
GPU_RATE, CPU_RATE = 250e12, 80e9
"""Operations per second reached on one H200 in bfloat16, and on two CPU cores in float32."""


def block_parameters(trm: TRMConfig) -> int:
    """Parameters of all blocks: what Muon trains."""
    matrices = 4 * trm.hidden_size**2 + 3 * trm.hidden_size * trm.inner_size
    return trm.num_layers * matrices


def operations_per_token(trm: TRMConfig) -> float:
    """Arithmetic of one training supervision step on one token (backward = 2 x forward)."""
    one_pass = 2 * block_parameters(trm)
    passes = trm.L_cycles + 1
    return one_pass * passes * (trm.H_cycles - 1 + 3)


def memory_bytes(trm: TRMConfig, training: TrainingConfig, num_parameters: int) -> float:
    """Weights, gradient, EMA and optimiser state, and what one backward pass keeps."""
    averages = 1 if training.ema_decay > 0 else 0
    numbers = num_parameters * (4 + averages)  # weights, gradient, two moments
    if training.optimiser.kind == "muon":
        numbers -= block_parameters(trm)  # Muon keeps one moment
    states = 4 * numbers
    width = 2 if torch.cuda.is_available() else 4
    kept = 12 * trm.hidden_size + 4 * trm.inner_size
    per_token = kept * width * trm.num_layers * (trm.L_cycles + 1)
    return states + per_token * training.tokens_per_batch


def estimate(trm: TRMConfig, training: TrainingConfig, num_parameters: int) -> dict[str, str]:
    """Lines for the dry run."""
    on_gpu = torch.cuda.is_available()
    tokens = training.tokens_per_batch * training.grad_accum
    seconds_per_step = operations_per_token(trm) * tokens / (GPU_RATE if on_gpu else CPU_RATE)
    schedule = training.schedule
    seconds = schedule.budget or (schedule.max_steps or 0) * seconds_per_step
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    memory = memory_bytes(trm, training, num_parameters) / 2**30
    rate = tokens / TOKENS_PER_PAIR / seconds_per_step
    lines = {
        "device": device,
        "memory": f"about {memory:.1f} GiB per process",
        "speed": f"about {rate:,.0f} examples/s, {seconds_per_step * 1000:,.0f} ms a step",
        "length": f"{seconds / 60:.1f} min, {seconds / seconds_per_step:,.0f} steps",
    }
    if on_gpu:
        dollars = seconds / 3600 * DOLLARS_PER_GPU_HOUR
        lines["cost"] = f"${dollars:.2f} a GPU at ${DOLLARS_PER_GPU_HOUR:.0f} an hour"
    return lines
