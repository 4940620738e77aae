"""`arctrm pretrain`: TRM or the tiny reader alone, from a configuration to checkpoints.

The path of the data: sources -> base set -> stream on the device -> training steps -> loop.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from arctrm.config import PretrainConfig, TrainingConfig
from arctrm.config.joint import JointConfig
from arctrm.console import note
from arctrm.data.build import prepare
from arctrm.data.dataset import BaseSet
from arctrm.data.overlap import check_inverse
from arctrm.data.sources import load_tasks
from arctrm.errors import CheckpointError
from arctrm.reader.tiny import TinyReader
from arctrm.training.checkpoints import (
    RECIPE_RECORD,
    RECIPE_RESULT,
    check_id_map,
    check_names,
    check_same_config,
    latest_checkpoint,
    read_meta,
    read_model,
    read_rank,
    read_trainer,
)
from arctrm.training.devices import new_accelerator
from arctrm.training.estimate import estimate
from arctrm.training.loop import Run, restore, train
from arctrm.training.optimisers import EMA, FlatGradients, Optimisers
from arctrm.training.progress import TrainingProgress
from arctrm.training.provenance import git_revision, run_record, write_run_record
from arctrm.training.stages import Stage, is_captured, new_model, new_stage
from arctrm.training.tracking import Tracker
from arctrm.trm.model import count_parameters

MAY_DIFFER_ON_RESUME = (
    "out",
    "tracking",
    "data.path",
    "training.schedule",
    "epochs",
    "recipe",
    "reader_checkpoint",
    "trm_checkpoint",
    "reader.gradient_checkpointing",
    "training.compile",
    "training.cuda_graph",
    "training.checkpoint_every",
    "training.checkpoint_every_steps",
    "training.keep_last",
    "training.log_every",
)
"""Keys that do not change what the checkpoint of a run holds, the weights it began with included.
"""

NewStage = Callable[[Any, BaseSet, Accelerator], Stage]
"""(configuration, data, accelerator) -> what is trained."""


def run(
    config: PretrainConfig | JointConfig,
    out: Path,
    resume: bool,
    stage: NewStage = new_stage,
    shared: Accelerator | None = None,
) -> None:
    """Train a model into the run folder `out`, from its latest checkpoint with `resume`.

    Processes that train more than this are `shared`: they stay joined when this ends.

    Raises:
        UserError: data, checkpoint or machine do not allow it.
        KeyboardInterrupt: after saving, when interrupted.
    """
    began_at = time.monotonic()
    checkpoint = _starting_point(out, resume)
    accelerator = shared or new_accelerator()
    base = _shared_prepare(config, accelerator)
    job, capturable = _build(config, base, out, accelerator, began_at, stage)
    if checkpoint is not None:
        _restore(job, checkpoint)
    if capturable and is_captured(config.training, accelerator.device):
        job.capture()
    is_main = accelerator.is_main_process
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_run_record(out, run_record(config, data_fingerprint=base.meta.fingerprint))
        note(f"{'resuming' if resume else 'training'} in {out}: {_summary(job, base)}")
    tracker = Tracker(
        out,
        config.tracking,
        job.resolved,
        resume=resume,
        is_main=is_main,
        resume_step=job.step if resume else None,
    )
    train(job, tracker, TrainingProgress(job.schedule, is_main=is_main))
    if is_main:
        note(f"checkpoint: {latest_checkpoint(out)}")
    if shared is None:
        accelerator.end_training()


def build_run(
    config: PretrainConfig, base: BaseSet, out: Path, accelerator: Accelerator, began_at: float
) -> Run:
    """Model, stream, steps and optimisers of a fresh run."""
    return _build(config, base, out, accelerator, began_at, new_stage)[0]


def _build(
    config: PretrainConfig | JointConfig,
    base: BaseSet,
    out: Path,
    accelerator: Accelerator,
    began_at: float,
    new: NewStage,
) -> tuple[Run, bool]:
    """The run, and whether its steps can be captured."""
    stage = new(config, base, accelerator)
    training = _of_length(config.training, stage.num_steps)
    trained = [p for p in stage.model.parameters() if p.requires_grad]
    notes: dict[str, Any] = {"task_fingerprints": base.task_fingerprints()}
    if stage.parts:
        notes["parts"] = stage.parts
    run = Run(
        out=out,
        config=training,
        resolved=config.model_dump(mode="json"),
        accelerator=accelerator,
        model=stage.model,
        steps=list(stage.steps),
        metrics=stage.metrics,
        carry=stage.carry(),
        gradients=FlatGradients(trained),
        optimisers=Optimisers(stage.model, training.optimiser),
        ema=EMA(stage.model, training.ema_decay) if training.ema_decay > 0 else None,
        task_ids=base.meta.task_ids,
        fingerprint=base.meta.fingerprint,
        git_revision=git_revision(),
        notes=notes,
        began_at=began_at,
    )
    if isinstance(stage.model, TinyReader):
        run.smallest_batch = stage.model.config.longest_sequence
        run.width_key = "reader.hidden_size"
    return run, stage.capturable


def _of_length(training: TrainingConfig, num_steps: int | None) -> TrainingConfig:
    if num_steps is None:
        return training
    length = {"budget": None, "max_steps": num_steps}
    schedule = training.schedule.model_copy(update=length)
    return training.model_copy(update={"schedule": schedule})


def describe(config: PretrainConfig) -> Table:
    """What `pretrain` would run: data, parameters, memory and cost; writes nothing."""
    path = config.data.path
    built = path is not None and (path / "meta.json").is_file()
    base = prepare(config.data if built else config.data.model_copy(update={"path": None}))
    with torch.device("meta"):
        model = new_model(config, base)
    sizes = count_parameters(model)
    cost = estimate(model.config, config.training, sum(sizes.values()))
    table = Table(title="pretrain (dry run)", title_justify="left", show_header=False)
    rows = {
        "tasks, pairs": f"{base.num_tasks:,}, {base.num_pairs:,} ({base.num_bytes / 1e6:.1f} MB)",
        "evaluated split": f"{base.meta.test_set} ({sum(base.meta.in_test_set)} tasks)",
        "data fingerprint": base.meta.fingerprint[:16],
        "parameters": f"trunk {sizes['trunk']:,}, task embeddings {sizes['task_embeddings']:,}",
        **cost,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _starting_point(out: Path, resume: bool) -> Path | None:
    checkpoint = latest_checkpoint(out)
    if (out / RECIPE_RECORD).is_file():
        raise CheckpointError(
            f"{out}: holds the stages of a recipe; choose another --out, or name one of them, such "
            f"as {out / RECIPE_RESULT}"
        )
    if resume and checkpoint is None:
        raise CheckpointError(
            f"{out}: no checkpoint to resume from; leave out --resume to start a run there"
        )
    if not resume and checkpoint is not None:
        raise CheckpointError(
            f"{out}: already holds a run ({checkpoint.name}); add --resume to continue it, or "
            "choose another --out"
        )
    return checkpoint


def _shared_prepare(config: PretrainConfig | JointConfig, accelerator: Accelerator) -> BaseSet:
    """Process 0 builds the data set first, where it has to be built; the others open it."""
    with accelerator.main_process_first():
        base = prepare(config.data)
    _check_inverse(config, base)
    return base


def _check_inverse(config: PretrainConfig | JointConfig, base: BaseSet) -> None:
    """The overlap guard, where the reader is trained on inverse tasks, too."""
    trains_reader = isinstance(config, PretrainConfig) and config.model == "reader"
    if trains_reader and config.reader.inverse_share and config.data.test_set is not None:
        check_inverse(base, load_tasks(config.data.test_set))


def _restore(job: Run, checkpoint: Path) -> None:
    meta = read_meta(checkpoint)
    check_same_config(meta.config, job.resolved, MAY_DIFFER_ON_RESUME, where=str(checkpoint))
    check_id_map(meta.task_ids, job.task_ids, str(checkpoint), "the data set")
    if meta.data_fingerprint != job.fingerprint:
        raise CheckpointError(
            f"{checkpoint}: trained on data {meta.data_fingerprint[:12]}, the data set is "
            f"{job.fingerprint[:12]}; resume with the same data"
        )
    rank, now = job.accelerator.process_index, job.accelerator.num_processes
    if meta.world_size != now and rank == 0:
        note(
            f"{checkpoint}: written by {meta.world_size} process(es), resumed with {now}: the run "
            "goes on with other batches than it would have had"
        )
    weights = read_model(checkpoint, ema=False)
    shapes = {name: tuple(t.shape) for name, t in job.model.state_dict().items()}
    check_names(shapes, weights, checkpoint)
    restore(
        job,
        meta,
        weights,
        read_model(checkpoint, ema=True),
        read_trainer(checkpoint),
        read_rank(checkpoint, rank) if rank < meta.world_size else None,
    )


def _summary(job: Run, base: BaseSet) -> str:
    sizes = count_parameters(job.model)
    return (
        f"{base.num_tasks:,} tasks, {base.num_pairs:,} pairs; trunk {sizes['trunk']:,} + task "
        f"embeddings {sizes['task_embeddings']:,} parameters; {job.accelerator.num_processes} "
        f"process(es) on {job.accelerator.device.type}, {job.config.tokens_per_batch:,} tokens "
        "per batch"
    )
