"""What is trained: each stage is a model and the steps that add its gradients.

A stage is all that differs between training TRM and training the tiny reader; data set, loop,
optimisers, checkpoints and metrics are the same.
"""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from arctrm.config import PretrainConfig, TrainingConfig
from arctrm.config.trm import TRMConfig
from arctrm.data.dataset import BaseSet
from arctrm.errors import ConfigError
from arctrm.hybrid import Hybrid
from arctrm.reader.tiny import TinyReader
from arctrm.training.joint_reader import TinyJointReader
from arctrm.training.metrics import Metrics
from arctrm.training.reader_step import ReaderStep
from arctrm.training.reader_stream import ReaderStream
from arctrm.training.source import PairSource
from arctrm.training.step import MicroStep, Step
from arctrm.training.stream import PairStream
from arctrm.trm.layers import run_level
from arctrm.trm.model import TRM
from arctrm.trm.packing import has_packed_kernel

TOKENS_PER_ROW = 64
"""Rows of a small packed batch = tokens / this: a bound on the offsets."""
MANY_ROWS, TOKENS_PER_ROW_OF_MANY = 32, 192
"""The same for the rows beyond so many: attention launches blocks for every offset, used or not,
and a pair of the training mix has 250 tokens (TRM)."""
TOKENS_PER_PAIR_OF_MANY = 280
"""That of the reader, whose pairs have 330 to 400 tokens."""
SAMPLED, SPARE = 4096, 1.1
"""Rows that are drawn to see how long they are; room is for so many more than a batch holds."""
RANK_SEED_STEP = 1_000_003


class Stage(NamedTuple):
    """A model and its training steps (one per batch of an optimiser step)."""

    model: TRM | TinyReader | Hybrid
    steps: list[Step]
    metrics: Metrics
    capturable: bool = True
    """Whether a step is free of host syncs, so that a CUDA graph can hold it."""
    num_steps: int | None = None
    """Optimiser steps of the run, instead of the configured length."""
    parts: dict[str, dict[str, Any]] | None = None
    """How the parts that it starts from were trained, by name; for the notes of its checkpoints."""

    def carry(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name."""
        return {
            f"{i}.{name}": tensor
            for i, step in enumerate(self.steps)
            for name, tensor in step.carry().items()
        }


def new_stage(config: PretrainConfig, base: BaseSet, accelerator: Accelerator) -> Stage:
    """The untrained model of `config.model` and its steps, on this process's device."""
    training, device = config.training, accelerator.device
    torch.manual_seed(config.seed)
    model = new_model(config, base).to(device)
    model.dtype = compute_dtype(training.dtype, device)
    compiled = is_compiled(training, device)
    torch.manual_seed(config.seed + RANK_SEED_STEP * accelerator.process_index)
    if isinstance(model, TRM):
        if compiled:
            model.level = torch.compile(run_level, dynamic=False)
        steps = _trm_steps(model, config, base)
    else:
        model.checkpointed = config.reader.gradient_checkpointing
        if compiled:
            model.compile_layers()
        steps = _reader_steps(model, config, base)
    return Stage(model, steps, Metrics(accelerator, [step.counts for step in steps]))


def new_model(config: PretrainConfig, base: BaseSet) -> TRM | TinyReader:
    """The untrained model that `config.model` names, with the task embeddings of a base set."""
    if config.model == "reader":
        return TinyReader(config.reader, base.num_tasks)
    return new_trm(config.trm, base)


def new_trm(config: TRMConfig, base: BaseSet) -> TRM:
    """An untrained TRM with the task embeddings of a base set."""
    if config.task_embedding == "shared":
        return TRM(config, base.num_tasks)
    if base.meta.num_aug == 0:
        raise ConfigError(
            "trm.task_embedding = 'per_view' needs a bound on the views, but data.num_aug = 0 is "
            "unbounded; set data.num_aug to a positive number or trm.task_embedding = 'shared'"
        )
    return TRM(config, base.num_tasks * base.meta.num_aug)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic that a configuration's `dtype` names; auto: bfloat16 on a GPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def is_compiled(training: TrainingConfig, device: torch.device) -> bool:
    """Whether the layers are compiled: as `training.compile` says; auto: on a GPU."""
    return training.compile == "on" or (training.compile == "auto" and device.type == "cuda")


def goes_by_blocks(training: TrainingConfig, device: torch.device) -> bool:
    """Whether the reader's attention goes by blocks: compiled, in bfloat16, on a GPU."""
    narrow = has_packed_kernel(device, compute_dtype(training.dtype, device))
    return narrow and is_compiled(training, device)


def is_captured(training: TrainingConfig, device: torch.device) -> bool:
    """Whether steps run as a CUDA graph: on a GPU, with the packed attention kernel (bfloat16).

    Raises:
        ConfigError: training.cuda_graph asks for what is not possible.
    """
    possible = has_packed_kernel(device, compute_dtype(training.dtype, device))
    if training.cuda_graph == "on" and not possible:
        raise ConfigError(
            f"training.cuda_graph = 'on' with training.dtype = {training.dtype!r} on "
            f"{device.type}: a graph needs bfloat16 on a GPU; set training.cuda_graph = 'auto'"
        )
    return possible and training.cuda_graph != "off"


def _trm_steps(model: TRM, config: PretrainConfig, base: BaseSet) -> list[Step]:
    training = config.training
    device = model.H_init.device
    stream = PairStream(base, config.data, config.trm, config.seed, device, scaled=True)
    halt_max_steps = training.halt_max_steps or config.trm.halt_max_steps
    num_rows = _num_rows(training, _mean_length(stream))
    return [
        MicroStep(
            model,
            stream,
            stream.new_state(model, training.tokens_per_batch, num_rows),
            halt_max_steps,
            1 / training.grad_accum,
        )
        for _ in range(training.grad_accum)
    ]


def _reader_steps(model: TinyReader, config: PretrainConfig, base: BaseSet) -> list[Step]:
    training = config.training
    source = PairSource(base, config.data, config.seed, model.device)
    by_blocks = goes_by_blocks(training, model.device)
    stream = ReaderStream(source, config.reader, model.dtype, by_blocks=by_blocks, alone=True)
    reader, per_sequence = TinyJointReader(model), config.reader.pairs_per_sequence
    mean_length = _mean_length(stream) / per_sequence
    num_rows = _num_rows(training, mean_length, TOKENS_PER_PAIR_OF_MANY)
    num_sequences = max(1, num_rows // per_sequence)
    return [
        ReaderStep(
            reader, stream, training.tokens_per_batch, num_sequences, 1 / training.grad_accum
        )
        for _ in range(training.grad_accum)
    ]


def rows_of(num_tokens: int, of_many: int = TOKENS_PER_ROW_OF_MANY) -> int:
    """Rows that a packed training batch of `num_tokens` has room for; `of_many`: of large ones."""
    few = min(num_tokens // TOKENS_PER_ROW, MANY_ROWS)
    return max(few, num_tokens // of_many)


def _num_rows(
    training: TrainingConfig, mean_length: float, of_many: int = TOKENS_PER_ROW_OF_MANY
) -> int:
    """Room for rows of the usual length, or of `mean_length` if they are shorter."""
    needed = round(SPARE * training.tokens_per_batch / mean_length)
    return training.max_rows or max(rows_of(training.tokens_per_batch, of_many), needed)


def _mean_length(stream: PairStream | ReaderStream) -> float:
    """Tokens of what `stream` draws, on average; the same in every process and every time."""
    devices = [stream.device] if stream.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return stream.mean_length(SAMPLED)
