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
from arctrm.console import note
from arctrm.data.build import prepare
from arctrm.data.dataset import BaseSet
from arctrm.hybrid import Hybrid
from arctrm.reader.tiny import TinyReader
from arctrm.training import pretrain
from arctrm.training.drafts import DraftPool
from arctrm.training.joint_data import steps_of, with_data_path
from arctrm.training.joint_reader import TinyJointReader
from arctrm.training.joint_step import JOINT_COUNTS, JointStep
from arctrm.training.joint_stream import JointStream
from arctrm.training.metrics import Metrics, Sums
from arctrm.training.reader_stream import ReaderStream
from arctrm.training.source import PairSource
from arctrm.training.stages import RANK_SEED_STEP, TOKENS_PER_ROW, Stage, compute_dtype
from arctrm.training.starting import load_reader, load_trm
from arctrm.training.stream import PairStream
from arctrm.trm.layers import run_level
from arctrm.trm.model import TRM


def run(config: JointConfig, out: Path, resume: bool) -> None:
    """Train the hybrid into the run folder `out`; as `pretrain.run`."""
    pretrain.run(with_data_path(config), out, resume, joint_stage)


def joint_stage(config: JointConfig, base: BaseSet, accelerator: Accelerator) -> Stage:
    """The hybrid and its training steps, on this process's device."""
    device = accelerator.device
    torch.manual_seed(config.seed)
    hybrid = new_hybrid(config, base)
    for load, checkpoint in (
        (load_trm, config.trm_checkpoint),
        (load_reader, config.reader_checkpoint),
    ):
        if checkpoint is not None:
            said = load(hybrid, checkpoint, base, config)
            if accelerator.process_index == 0:
                note(said)
    hybrid.reader.requires_grad_(not config.llama_frozen)
    hybrid.to(device)
    dtype = compute_dtype(config.training.dtype, device)
    hybrid.trm.dtype = tiny(hybrid).dtype = dtype
    compiled = config.training.compile
    if compiled == "on" or (compiled == "auto" and device.type == "cuda"):
        hybrid.trm.level = torch.compile(run_level, dynamic=False)
        tiny(hybrid).compile_layers()
    torch.manual_seed(config.seed + RANK_SEED_STEP * accelerator.process_index)
    steps = [_step(config, hybrid, base) for _ in range(config.training.grad_accum)]
    counts = [step.counts for step in steps]
    metrics = Metrics(accelerator, counts, JOINT_COUNTS, lambda sums: _metrics(steps[0], sums))
    num_steps = None
    if config.epochs is not None:
        batches = config.training.grad_accum * accelerator.num_processes
        num_steps = steps_of(config.epochs, base, steps[0].stream, batches, config.seed)
    return Stage(hybrid, list(steps), metrics, capturable=False, num_steps=num_steps)


def new_hybrid(config: JointConfig, base: BaseSet) -> Hybrid:
    """An untrained hybrid with the task embeddings of a base set."""
    assert config.llama_model == TINY
    reader = TinyReader(config.reader, base.num_tasks)
    slots = config.coupling.num_context_slots if config.coupling.context else 0
    trm = TRM(config.trm.model_copy(update={"num_context_slots": slots}), base.num_tasks)
    return Hybrid(reader, config.reader.hidden_size, trm, config.coupling)


def tiny(hybrid: Hybrid) -> TinyReader:
    """The hybrid's tiny reader."""
    assert hybrid.tiny is not None
    return hybrid.tiny


def _step(config: JointConfig, hybrid: Hybrid, base: BaseSet) -> JointStep:
    training, coupling = config.training, config.coupling
    source = PairSource(base, config.data, config.seed, tiny(hybrid).device)
    reader = ReaderStream(source, config.reader, tiny(hybrid).dtype)
    trm = PairStream(base, config.data, hybrid.trm.config, config.seed, source.device, source)
    per_sequence = config.reader.pairs_per_sequence
    num_sequences = training.tokens_per_batch // TOKENS_PER_ROW // per_sequence
    if config.batch_size is not None:
        num_sequences = min(num_sequences, config.batch_size)
    stream = JointStream(
        reader,
        trm,
        DraftPool(reader),
        reader_tokens=coupling.reader_tokens_per_batch,
        trm_tokens=training.tokens_per_batch,
        num_sequences=max(2, num_sequences // 2 * 2),
        num_soft=coupling.num_back_vectors if coupling.back else 0,
        no_draft_share=coupling.no_draft_share if coupling.draft else 1.0,
        trm_dtype=hybrid.trm.dtype,
    )
    return JointStep(
        hybrid,
        TinyJointReader(tiny(hybrid)),
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
    with torch.device("meta"):
        hybrid = new_hybrid(config, base)
    table = Table(title="joint (dry run)", title_justify="left", show_header=False)
    table.add_row("tasks, pairs", f"{base.num_tasks:,}, {base.num_pairs:,}")
    table.add_row("evaluated split", f"{base.meta.test_set} ({sum(base.meta.in_test_set)} tasks)")
    table.add_row("data fingerprint", base.meta.fingerprint[:16])
    for name, module in (("reader", hybrid.reader), ("TRM", hybrid.trm)):
        table.add_row(name, f"{sum(p.numel() for p in module.parameters()):,} parameters")
    for name, number in count_parameters(dict(hybrid.adapters.items())).items():
        table.add_row(f"adapters: {name}", f"{number:,} parameters")
    schedule = config.training.schedule
    length = f"{schedule.budget:.0f} s" if schedule.budget else f"{schedule.max_steps:,} steps"
    table.add_row("length", f"{config.epochs:,} epochs" if config.epochs else length)
    return table


def _without_writing(data: DataConfig) -> DataConfig:
    """A set that is not built yet is built in memory."""
    built = data.path is not None and (data.path / "meta.json").is_file()
    return data if built else data.model_copy(update={"path": None})
