"""The stages of a recipe one after the other, in one command and one set of processes."""

import gc
from pathlib import Path

import torch
from accelerate import Accelerator

from arctrm.config import JointConfig
from arctrm.console import console, note
from arctrm.data.build import prepare
from arctrm.errors import CheckpointError
from arctrm.recipe.record import Record, read
from arctrm.recipe.stages import EVALUATION, Plan, RecipeStage, length, plan
from arctrm.solving import evaluate
from arctrm.solving.unfinished import UNFINISHED
from arctrm.training import joint, pretrain
from arctrm.training.checkpoints import check_same_config, latest_checkpoint, read_meta
from arctrm.training.devices import new_accelerator
from arctrm.training.joint_data import needs_heard_pairs, require_heard_pairs
from arctrm.training.provenance import run_record, write_run_record
from arctrm.training.schedule import Schedule
from arctrm.training.starting import starting_points


def run(config: JointConfig, out: Path, resume: bool) -> None:
    """Train the stages into their folders in `out`, then evaluate; with `resume`, what is left.

    Raises:
        UserError: configuration, data, checkpoints or machine do not allow it.
        KeyboardInterrupt: interrupted; everything up to there is kept.
    """
    planned = plan(config, out)
    # Every process decides what is left before any of them can write: all decide the same.
    old = _opened(planned, out, resume)
    left = _left(planned)
    accelerator = new_accelerator()
    accelerator.wait_for_everyone()
    _check_joint(left, config, accelerator)
    record = Record(out, accelerator, config, old)
    record.write()
    if accelerator.is_main_process:
        write_run_record(out, run_record(config))
    try:
        for stage in left:
            record.forget_scores()
            with record.timed(stage.name, length(stage)):
                _train(stage, accelerator)
        if planned.evaluation is not None and not record.content["evaluated"]:
            with record.timed(EVALUATION):
                begun = (out / EVALUATION / UNFINISHED).is_file()
                evaluate.run(planned.evaluation, out / EVALUATION, resume=begun)
            record.take_scores(out / EVALUATION)
    except KeyboardInterrupt as stop:
        kept = f"{out}: finished stages are kept; the same command with --resume goes on"
        raise KeyboardInterrupt(str(stop) or kept) from None
    accelerator.end_training()
    if accelerator.is_main_process:
        console().print(record.tables())


def _opened(planned: Plan, out: Path, resume: bool) -> dict[str, object] | None:
    """The record of the recipe that is resumed; refuses a folder that does not fit."""
    if latest_checkpoint(out) is not None:
        raise CheckpointError(
            f"{out}: already holds a run without a recipe; choose another --out, or leave the "
            "recipe out to continue it"
        )
    old = read(out)
    if resume and old is None:
        raise CheckpointError(f"{out}: no recipe to resume; leave out --resume to start one there")
    begun = [stage.folder.name for stage in planned.stages if latest_checkpoint(stage.folder)]
    if begun and not resume:
        raise CheckpointError(
            f"{out}: already holds a run ({', '.join(begun)}); add --resume to continue it, or "
            "choose another --out"
        )
    return old if resume else None


def _left(planned: Plan) -> tuple[RecipeStage, ...]:
    """The stages that are not finished: a later one that has begun was given what came before."""
    for index, stage in reversed(list(enumerate(planned.stages))):
        checkpoint = latest_checkpoint(stage.folder)
        if checkpoint is not None:
            return planned.stages[index + _is_finished(stage, checkpoint) :]
    return planned.stages


def _check_joint(
    left: tuple[RecipeStage, ...], config: JointConfig, accelerator: Accelerator
) -> None:
    """Refuse now, not after the stages before it, checkpoints and data that the joint stage cannot
    use."""
    for stage in left:
        if not isinstance(stage.config, JointConfig):
            continue
        starting_points(config)
        if needs_heard_pairs(stage.config):
            with accelerator.main_process_first():  # builds the data set where it has a path
                base = prepare(stage.config.data)
            require_heard_pairs(stage.config, base)


def _is_finished(stage: RecipeStage, checkpoint: Path) -> bool:
    """Whether a stage has reached its length.

    Raises:
        CheckpointError: it was trained by another configuration.
    """
    meta = read_meta(checkpoint)
    now = stage.config.model_dump(mode="json")
    check_same_config(meta.config, now, pretrain.MAY_DIFFER_ON_RESUME, where=str(checkpoint))
    return Schedule(stage.config.training.schedule).finished(meta.step, meta.elapsed)


def _train(stage: RecipeStage, accelerator: Accelerator) -> None:
    """One stage, from its latest checkpoint if it has one; leaves no memory taken."""
    resume = latest_checkpoint(stage.folder) is not None
    if accelerator.is_main_process:
        note(f"recipe: {stage.name}, {length(stage)}")
    if isinstance(stage.config, JointConfig):
        joint.run(stage.config, stage.folder, resume, accelerator)
    else:
        pretrain.run(stage.config, stage.folder, resume, shared=accelerator)
    if accelerator.is_main_process and (said := _too_short(stage)):
        note(said)
    # Compiled code is kept by the function that it was made of: another stage's sizes would add to
    # it until nothing more is compiled.
    torch.compiler.reset()
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def _too_short(stage: RecipeStage) -> str | None:
    """A sentence on a stage whose time was used up before its warm-up was over; else None."""
    schedule, checkpoint = stage.config.training.schedule, latest_checkpoint(stage.folder)
    if schedule.budget is None or checkpoint is None:
        return None
    steps, wanted = read_meta(checkpoint).step, schedule.warmup_steps
    if steps >= wanted:
        return None
    return (
        f"recipe: {stage.name} made {steps} optimiser steps in its {length(stage)}, fewer than its "
        f"warm-up of {wanted}: starting up took too much of them, and little was learned; raise "
        "recipe.budget, or this stage's share of it"
    )
