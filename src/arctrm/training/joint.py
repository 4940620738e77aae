"""`arctrm joint`: the stage that trains reader, adapters and TRM together.

The loop, the checkpoints and the data are those of `pretrain`; here is what differs: two models
that may start from checkpoints of their own, the stream that feeds both, and more metrics.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import nn

from arctrm.adapters import count_parameters
from arctrm.config.data import DataConfig
from arctrm.config.joint import TINY, JointConfig
from arctrm.config.reader import ReaderConfig
from arctrm.console import note
from arctrm.data.build import prepare
from arctrm.data.dataset import BaseSet
from arctrm.errors import ConfigError
from arctrm.hybrid import Hybrid, empty_hybrid, hub_hybrid
from arctrm.reader.hub_loading import empty_hub_model, load_hub_reader
from arctrm.reader.tiny import TinyReader
from arctrm.training import pretrain
from arctrm.training.drafts import DraftPool
from arctrm.training.joint_data import require_heard_pairs, steps_of, with_data_path
from arctrm.training.joint_hub import check_fits, joint_reader
from arctrm.training.joint_step import JOINT_COUNTS, JointStep
from arctrm.training.joint_stream import JointStream
from arctrm.training.metrics import Metrics, Sums
from arctrm.training.reader_stream import ReaderStream
from arctrm.training.source import PairSource
from arctrm.training.stages import (
    RANK_SEED_STEP,
    Stage,
    compute_dtype,
    goes_by_blocks,
    is_captured,
    is_compiled,
    rows_of,
)
from arctrm.training.starting import load_part, origin, starting_points
from arctrm.training.stream import PairStream
from arctrm.trm.layers import run_level


def run(config: JointConfig, out: Path, resume: bool, shared: Accelerator | None = None) -> None:
    """Train the hybrid into the run folder `out`; as `pretrain.run`."""
    pretrain.run(with_data_path(config), out, resume, joint_stage, shared)


def joint_stage(config: JointConfig, base: BaseSet, accelerator: Accelerator) -> Stage:
    """The hybrid and its training steps, on this process's device.

    Raises:
        UserError: models, checkpoints or data do not fit the configuration.
    """
    require_heard_pairs(config, base)
    starts = starting_points(config)
    torch.manual_seed(config.seed)
    hybrid = new_hybrid(config, base, accelerator.device)
    for start in starts:
        said = load_part(hybrid, start, base, config)
        if accelerator.process_index == 0:
            note(said)
    parts = {start.part: origin(start.meta, start.kind) for start in starts}
    hybrid.reader.requires_grad_(not config.llama_frozen)
    hybrid.ensemble.requires_grad_(False)
    _to_device(hybrid.to(accelerator.device), config)
    torch.manual_seed(config.seed + RANK_SEED_STEP * accelerator.process_index)
    steps = [_step(config, hybrid, base) for _ in range(config.training.grad_accum)]
    counts = [step.counts for step in steps]
    metrics = Metrics(accelerator, counts, JOINT_COUNTS, lambda sums: _metrics(steps[0], sums))
    num_steps = None
    if config.epochs is not None:
        batches = config.training.grad_accum * accelerator.num_processes
        num_steps = steps_of(config.epochs, base, steps[0].stream, batches, config.seed)
    capturable = hybrid.tiny is not None
    captured = capturable and is_captured(config.training, accelerator.device)
    for step in steps:
        step.fixed_shapes = captured
    return Stage(hybrid, list(steps), metrics, capturable, num_steps=num_steps, parts=parts)


def new_hybrid(config: JointConfig, base: BaseSet, device: torch.device | None = None) -> Hybrid:
    """An untrained hybrid with the task embeddings of a base set; a hub reader is on `device`."""
    if config.llama_model == TINY:
        num_readers = 1 + len(config.ensemble_checkpoints)
        return empty_hybrid(config.reader, config.trm, config.coupling, base.num_tasks, num_readers)
    hub = load_hub_reader(config.hub, device)
    if device is not None and hub.device.type != device.type:
        raise ConfigError(
            f"hub.device = {config.hub.device!r}: TRM is trained on {device}; leave hub.device out"
        )
    return hub_hybrid(hub, config.reader, config.trm, config.coupling, base.num_tasks)


def _to_device(hybrid: Hybrid, config: JointConfig) -> None:
    """Arithmetic and compilation of the parts, which stand on their device."""
    training, device, tiny = config.training, hybrid.trm.H_init.device, hybrid.tiny
    hybrid.train()
    hybrid.trm.dtype = compute_dtype(training.dtype, device)
    compiled = is_compiled(training, device)
    if compiled:
        hybrid.trm.level = torch.compile(run_level, dynamic=False)
    if tiny is not None:
        tiny.dtype = hybrid.trm.dtype
        tiny.checkpointed = config.reader.gradient_checkpointing
        if compiled:
            tiny.compile_layers()


def _step(config: JointConfig, hybrid: Hybrid, base: BaseSet) -> JointStep:
    training, coupling = config.training, config.coupling
    source = PairSource(base, config.data, config.seed, hybrid.trm.H_init.device)
    check_fits(hybrid)
    reader = joint_reader(hybrid.reader)
    # The layers of a hub model are not compiled.
    by_blocks = hybrid.tiny is not None and goes_by_blocks(training, source.device)
    sequences = ReaderStream(source, reader.config, reader.dtype, reader.marks, by_blocks)
    trm = PairStream(base, config.data, hybrid.trm.config, config.seed, source.device, source)
    num_sequences = rows_of(training.tokens_per_batch) // sequences.num_pairs
    if config.batch_size is not None:
        num_sequences = min(num_sequences, config.batch_size)
    stream = JointStream(
        sequences,
        trm,
        DraftPool(sequences, only_tests=coupling.heard_pairs == "test"),
        reader_tokens=coupling.reader_tokens_per_batch,
        trm_tokens=training.tokens_per_batch,
        num_sequences=max(2, num_sequences // 2 * 2),
        num_soft=coupling.num_back_vectors if coupling.back else 0,
        no_draft_share=coupling.no_draft_share if coupling.draft else 1.0,
        right_draft_share=coupling.right_draft_share,
        trm_dtype=hybrid.trm.dtype,
        in_twos=coupling.context,
    )
    return JointStep(
        hybrid,
        reader,
        stream,
        max_attempts=config.max_attempts,
        loss_scale=1 / training.grad_accum,
    )


def _metrics(step: JointStep, sums: Sums) -> dict[str, float]:
    """What only the hybrid has: attempts, drafts, contexts, and the gradient of each part."""
    batches, rows = max(sums["batches"], 1.0), max(sums["rows"], 1.0)
    drafts_right, draft_length = step.drafts_made.tolist()
    return {
        "avg_attempts": sums["attempts"] / batches,
        "avg_reasoning_length": draft_length,
        "reader_loss": sums["reader_loss"] / max(sums["reader_labels"], 1.0),
        "contrast": sums["contrast"] / batches,
        "context_variance": sums["context_variance"] / batches,
        "context_swap_difference": step.swap_difference(),
        "drafts_right": drafts_right,
        "drafted_share": sums["drafted"] / rows,
        **{f"gradient/{name}": norm for name, norm in gradient_norms(step.hybrid).items()},
    }


def gradient_norms(hybrid: Hybrid) -> dict[str, float]:
    """L2 norm of the gradient of each trained part, as it stands."""
    return {name: _norm(parameters) for name, parameters in hybrid.parts().items() if parameters}


def _norm(parameters: list[nn.Parameter]) -> float:
    squares = [p.grad.float().square().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def describe(config: JointConfig) -> Table:
    """What `joint` would run: data, parameters of every part; writes nothing."""
    config = with_data_path(config)
    base = prepare(_without_writing(config.data))
    require_heard_pairs(config, base)
    with torch.device("meta"):
        reader, width = _empty_reader(config, base)
        own = empty_hybrid(ReaderConfig(), config.trm, config.coupling, base.num_tasks)
        hybrid = Hybrid(reader, width, own.trm, config.coupling)
    table = Table(title="joint (dry run)", title_justify="left", show_header=False)
    table.add_row("tasks, pairs", f"{base.num_tasks:,}, {base.num_pairs:,}")
    table.add_row("evaluated split", f"{base.meta.test_set} ({sum(base.meta.in_test_set)} tasks)")
    table.add_row("data fingerprint", base.meta.fingerprint[:16])
    how = " (frozen)" if config.llama_frozen else ""
    if config.llama_model != TINY:
        how = f" ({config.llama_model}, {config.hub.mode})"
    for name, module in ((f"reader{how}", hybrid.reader), ("TRM", hybrid.trm)):
        table.add_row(name, f"{sum(p.numel() for p in module.parameters()):,} parameters")
    if config.ensemble_checkpoints:
        others = f"{len(config.ensemble_checkpoints)} more, as large"
        table.add_row("readers of the ensemble", others)
    for name, number in count_parameters(dict(hybrid.adapters.items())).items():
        table.add_row(f"adapters: {name}", f"{number:,} parameters")
    schedule = config.training.schedule
    length = f"{schedule.budget:.0f} s" if schedule.budget else f"{schedule.max_steps:,} steps"
    table.add_row("length", f"{config.epochs:,} epochs" if config.epochs else length)
    return table


def _empty_reader(config: JointConfig, base: BaseSet) -> tuple[nn.Module, int]:
    """The reader without its weights, and its width."""
    if config.llama_model != TINY:
        return empty_hub_model(config.hub)
    return TinyReader(config.reader, base.num_tasks), config.reader.hidden_size


def _without_writing(data: DataConfig) -> DataConfig:
    """A set that is not built yet is built in memory."""
    built = data.path is not None and (data.path / "meta.json").is_file()
    return data if built else data.model_copy(update={"path": None})
