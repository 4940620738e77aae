"""What a run will need, before it runs: arithmetic, memory, time and money.

Estimates, not promises: the rates are round figures of what this code reaches (benchmarks/).
"""

import torch

from arctrm.config.reader import ReaderConfig
from arctrm.config.training import TrainingConfig
from arctrm.config.trm import TRMConfig

DOLLARS_PER_GPU_HOUR = 3.0
TOKENS_PER_PAIR, READER_TOKENS_PER_PAIR = 195, 330
"""Mean length of a row on the ARC-AGI-1 training mix: TRM's canvas with its border and prefix
slots; the reader's two grids with their row ends."""
GPU_RATE, CPU_RATE = 250e12, 80e9
"""Operations per second reached on one H200 in bfloat16, and on two CPU cores in float32."""


def block_parameters(model: TRMConfig | ReaderConfig) -> int:
    """Parameters of all blocks: what Muon trains."""
    return model.num_layers * (_of_layer(model) + passes(model)[1] * _injected(model))


def _of_layer(model: TRMConfig | ReaderConfig) -> int:
    return 4 * model.hidden_size**2 + 3 * model.hidden_size * model.inner_size


def _injected(model: TRMConfig | ReaderConfig) -> int:
    """Parameters of the matrix that every pass through a layer has for itself."""
    injects = isinstance(model, ReaderConfig) and model.injection
    return model.hidden_size**2 if injects else 0


def passes(model: TRMConfig | ReaderConfig) -> tuple[int, int]:
    """Times that the blocks run in one training step, without and with gradient."""
    if isinstance(model, ReaderConfig):
        return 0, model.loops
    return (model.H_cycles - 1) * (model.L_cycles + 1), model.L_cycles + 1


def operations_per_token(model: TRMConfig | ReaderConfig) -> float:
    """Arithmetic of one training step on one token (backward = 2 x forward), attention left out."""
    without, with_gradient = passes(model)
    times = without + (4 if is_checkpointed(model) else 3) * with_gradient
    return 2 * model.num_layers * (_of_layer(model) + _injected(model)) * times


def is_checkpointed(model: TRMConfig | ReaderConfig) -> bool:
    """Whether activations are computed anew for the gradient."""
    return isinstance(model, ReaderConfig) and model.gradient_checkpointing


def memory_bytes(
    model: TRMConfig | ReaderConfig, training: TrainingConfig, num_parameters: int
) -> float:
    """Weights, gradient, EMA and optimiser state, and what one backward pass keeps."""
    averages = 1 if training.ema_decay > 0 else 0
    numbers = num_parameters * (4 + averages)  # weights, gradient, two moments
    if training.optimiser.kind == "muon":
        numbers -= block_parameters(model)  # Muon keeps one moment
    states = 4 * numbers
    width = 2 if torch.cuda.is_available() else 4
    kept = 12 * model.hidden_size + 4 * model.inner_size
    numbers_per_token = kept * model.num_layers * passes(model)[1]
    if is_checkpointed(model):
        numbers_per_token = model.hidden_size * model.num_layers * passes(model)[1] + kept
    return states + width * numbers_per_token * training.tokens_per_batch


def estimate(
    model: TRMConfig | ReaderConfig, training: TrainingConfig, num_parameters: int
) -> dict[str, str]:
    """Lines for the dry run."""
    on_gpu = torch.cuda.is_available()
    tokens = training.tokens_per_batch * training.grad_accum
    seconds_per_step = operations_per_token(model) * tokens / (GPU_RATE if on_gpu else CPU_RATE)
    schedule = training.schedule
    seconds = schedule.budget or (schedule.max_steps or 0) * seconds_per_step
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    memory = memory_bytes(model, training, num_parameters) / 2**30
    pair = READER_TOKENS_PER_PAIR if isinstance(model, ReaderConfig) else TOKENS_PER_PAIR
    rate = tokens / pair / seconds_per_step
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
