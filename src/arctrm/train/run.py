"""`arctrm pretrain` and `arctrm joint`: from a configuration to checkpoints, in the order of a run.

Data -> model (untrained, or from a checkpoint whose tasks are matched by content) -> steps -> the
loop -> for `joint` with `evaluate`, the score of what was trained.
"""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arctrm import checkpoints
from arctrm.config import DataConfig, JointConfig, PretrainConfig, TrunkConfig, differences
from arctrm.console import console, dry_run_table, note
from arctrm.data.base_set import FILE, BaseSet, open_base_set, prepare
from arctrm.data.overlap import check_inverse
from arctrm.data.sources import BUNDLED, load_tasks, subset_label
from arctrm.errors import CheckpointError, ConfigError, ResourceError
from arctrm.model.attention import Kernel, has_packed_kernel, has_tiles
from arctrm.model.trunk import TASK_TABLES, Trunk
from arctrm.system import (
    COMPILED,
    compute_dtype,
    git_revision,
    hold,
    is_gpu,
    new_accelerator,
    write_run_record,
)
from arctrm.train.loop import Run, restore, train
from arctrm.train.sharding import fill, spread
from arctrm.train.steps import metrics_of, sampled_lengths, voice_steps
from arctrm.train.tracking import Tracker, clock

Config = PretrainConfig | JointConfig

RANK_SEED_STEP = 1_000_003  # between the seeds of two processes
LEAST_HEAD = 16  # width of a head that torch's compiled attention takes


def pretrain(config: PretrainConfig, *, resume: bool = False, dry_run: bool = False) -> None:
    """Train the trunk into the run folder `config.out`, or go on from its latest checkpoint."""
    if dry_run:
        console().print(dry_run_table("pretrain", describe(config)))
    else:
        _train(config, resume).end_training()


def joint(config: JointConfig, *, resume: bool = False, dry_run: bool = False) -> None:
    """Train reader and TRM together, and score them where `evaluate` says so; as `pretrain`."""
    config = with_data_path(config)
    data, asked = config.data, config.evaluation
    kept = asked.held_out and asked.held_out == data.held_out and asked.test_set in data.subsets
    if config.evaluate and not kept and asked.test_set != data.test_set:
        raise ConfigError(
            f"evaluation.test_set = {asked.test_set!r}, but data.test_set = {data.test_set!r} is "
            "what training keeps the answers of apart; make them equal, or set evaluate = false"
        )
    if dry_run:
        console().print(dry_run_table("joint", describe(config)))
        return
    began_at = time.monotonic()
    accelerator = _train(config, resume)
    if not config.evaluate:
        return accelerator.end_training()
    from arctrm.solve.evaluate import FINISHED, evaluate
    from arctrm.solve.results import UNFINISHED

    gc.collect()  # what was captured gives its memory back
    is_gpu = accelerator.device.type == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
    assert config.out is not None
    folder, trained_at = config.out / "eval", time.monotonic()
    resumed = (folder / UNFINISHED).is_file()
    if accelerator.is_main_process:
        for name in FINISHED:  # of fewer steps, before this run was resumed
            (folder / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    evaluate(config.eval_config(config.out, folder), resume=resumed)
    ended_at = time.monotonic()
    said = f"training {clock(trained_at - began_at)}, evaluation {clock(ended_at - trained_at)}"
    if is_gpu:
        hours = (ended_at - began_at) / 3600 * accelerator.num_processes
        said += f", about ${3 * hours:.2f} at $3 a GPU hour"
    if accelerator.is_main_process:
        note(said)


def _train(config: Config, resume: bool) -> Accelerator:
    began_at = time.monotonic()
    if config.out is None:
        raise ConfigError("out: a run needs a folder; give --out runs/<name>")
    # 1. The run folder: every process looks before any of them writes.
    checkpoint = checkpoints.latest_checkpoint(config.out)
    if resume != (checkpoint is not None):
        raise CheckpointError(
            f"{config.out}: no checkpoint to resume from; leave out --resume to start a run there"
            if checkpoint is None
            else f"{config.out}: already holds a run ({checkpoint.name}); add --resume to continue "
            "it, or choose another --out"
        )
    accelerator = new_accelerator()
    is_main = accelerator.is_main_process
    accelerator.wait_for_everyone()
    # 2. Data: process 0 builds the set where it has to be built; the others open it.
    with accelerator.main_process_first():
        base = prepare(config.data)
    if config.reader.inverse_share and config.data.test_set is not None:
        check_inverse(base, load_tasks(config.data.test_set))
    with hold(config.out) if is_main else nullcontext():
        # 3. Model, steps, optimisers; the state of the run that is resumed.
        run = build_run(config, base, accelerator, began_at)
        if checkpoint is not None:
            _restore(run, checkpoint, config)
            if is_main and run.schedule.finished(run.step, run.elapsed):
                more = "a longer training.schedule.budget or max_steps goes on"
                note(f"{config.out}: the run is finished at step {run.step}; {more}")
        # 4. Training.
        if is_main:
            write_run_record(config.out, config, data_fingerprint=base.meta.fingerprint)
            count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
            note(
                f"{'resuming' if resume else 'training'} in {config.out}: "
                f"{base.num_tasks:,} tasks, {base.num_pairs:,} pairs, {count:,} parameters; "
                f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
                f"{f'; attention: {run.compiled}' if run.compiled else ''}"
            )
        step, told = (run.step if resume else None), run.meta.config
        with Tracker(config.out, config.tracking, told, resume_step=step, is_main=is_main) as to:
            train(run, to)
        if is_main:
            note(f"checkpoint: {checkpoints.latest_checkpoint(config.out)}")
    return accelerator


def _restore(run: Run, checkpoint: Path, config: Config) -> None:
    meta = checkpoints.read_meta(checkpoint)
    for difference in differences(meta.config, config):
        raise CheckpointError(
            f"{checkpoint}: {difference}; resume with the same value, or choose another --out"
        )
    here, there = (one.data_fingerprint[:12] for one in (run.meta, meta))
    if here != there:
        raise CheckpointError(f"{checkpoint}: trained on data {there}, the data set is {here}")
    now = run.accelerator.num_processes
    if meta.world_size != now and run.accelerator.is_main_process:
        note(
            f"{checkpoint}: written by {meta.world_size} process(es), resumed with {now}: "
            "the run goes on with other batches than it would have had"
        )
    restore(run, checkpoint, meta)


def build_run(config: Config, base: BaseSet, accelerator: Accelerator, began_at: float) -> Run:
    """Model, steps and optimisers of a fresh run; `began_at`: monotonic time of its start."""
    assert config.out is not None
    training, device = config.training, accelerator.device
    _check_memory(config, base, device)
    torch.manual_seed(config.seed)
    trunk = new_trunk(config, base).to(device)
    trunk.dtype = compute_dtype(training.dtype, device)
    hub = None if config.is_tiny else cast(JointConfig, config)
    wanted = training.compile == "on" or (training.compile == "auto" and is_gpu(device, COMPILED))
    is_compiled = wanted and not hub  # whose batches have no fixed shapes
    packed = has_packed_kernel(device, trunk.dtype)
    captures = packed and not hub
    compiled: Kernel | None = None
    if packed and is_compiled:
        if (width := trunk.width // config.trunk.num_heads) < LEAST_HEAD:
            raise ConfigError(
                f"trunk.num_heads: heads of {width} numbers; compiled attention needs "
                f"{LEAST_HEAD}; lower trunk.num_heads, or set training.compile = 'off'"
            )
        tiled = training.attention == "auto" and has_tiles(device, trunk.dtype, width)
        compiled = "tiles" if tiled else "flex"
    if training.cuda_graph == "on" and not captures:
        raise ConfigError(
            "training.cuda_graph = 'on': a graph needs the trunk alone, in bfloat16 on a GPU; set "
            "training.cuda_graph = 'auto'"
        )
    notes = {}
    if config.checkpoint is not None:
        notes = _start_trunk(trunk, config.checkpoint, config, base, accelerator.is_main_process)
    if is_compiled:
        trunk.compile_blocks()
    hybrid = _hub_hybrid(hub, trunk, accelerator.num_processes) if hub else None
    torch.manual_seed(config.seed + RANK_SEED_STEP * accelerator.process_index)
    model, of_counts = nn.ModuleDict({"trunk": trunk}), metrics_of
    voices: tuple[str, ...] = ("reader", "trm") if config.voice == "both" else (config.voice,)
    if hub and hybrid:
        from arctrm.train.joint_hub import hub_metrics, hub_steps

        model.update({"adapters": hybrid.adapters, "hub": hybrid.reader.pretrained})
        steps, of_counts, voices = hub_steps(hub, hybrid, base), hub_metrics, ("trm",)
    else:
        steps = voice_steps(config, trunk, base, compiled=compiled)
    model.train()
    if config.epochs is not None:
        count = steps_of(config.epochs, base, steps, accelerator.num_processes)
        changes = {"budget": None, "max_steps": count}
        schedule = training.schedule.model_copy(update=changes)
        training = training.model_copy(update={"schedule": schedule})
    meta = checkpoints.CheckpointMeta.model_validate(
        {
            **dict.fromkeys(("step", "elapsed", "examples"), 0),
            "config": config.model_dump(mode="json"),
            "voices": voices,
            "task_ids": base.meta.task_ids,
            "task_fingerprints": base.task_fingerprints(),
            "git_revision": git_revision(),
            "data_fingerprint": base.meta.fingerprint,
            "notes": notes,
        }
    )
    captures = captures and training.cuda_graph != "off"
    given = config.out, training, accelerator, model, steps, of_counts, meta, began_at
    return Run(*given, captures, compiled)


def _check_memory(config: Config, base: BaseSet, device: torch.device) -> None:
    """Refuse a model whose weights, gradients, moments and average exceed all memory: on a CPU the
    system would end the process, or others.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in new_trunk(config, base).parameters())
    wanted, there = 4 * 5 * count, psutil.virtual_memory().total
    if device.type == "cpu" and wanted > there:
        raise ResourceError(
            f"out of memory with trunk.hidden_size = {config.trunk.hidden_size} and "
            f"trunk.num_layers = {config.trunk.num_layers}: {count:,} parameters take "
            f"{wanted / 2**30:.0f} GiB of {there / 2**30:.0f}; lower them"
        )


def new_trunk(config: Config, base: BaseSet) -> Trunk:
    """The untrained trunk of a configuration, with the task embeddings of a base set."""
    trained = checkpoints.Trained.model_validate(config.model_dump(mode="json"))
    return trained.new_trunk(base.num_tasks)


def _start_trunk(
    trunk: Trunk, checkpoint: Path, config: Config, base: BaseSet, is_main: bool
) -> dict[str, Any]:
    """Put the weights of a checkpoint into the trunk; what new checkpoints note of it. Tasks are
    matched by content; new ones start from the mean, other ways of scaling anew.
    """
    folder = checkpoints.resolve_checkpoint(checkpoint)
    meta = checkpoints.read_meta(folder)
    for key in TrunkConfig.model_fields.keys() - {"gradient_checkpointing"}:
        there, here = (getattr(one.trunk, key) for one in (meta.trained, config))
        if there != here and (key, there) != ("own_layers", 0):
            raise CheckpointError(
                f"{folder}: trunk.{key} = {there!r} there, {here!r} here; use the former"
            )
    own = trunk.state_dict()
    weights = {n: t for n, t in own.items() if n.startswith("own.")}
    weights |= _part(checkpoints.read_model(folder), "trunk.")
    rows = meta.rows_of(base.task_fingerprints())
    for name in TASK_TABLES:
        if name in weights:
            mean = weights[name].mean(0)
            weights[name] = torch.stack([mean if r is None else weights[name][r] for r in rows])
    ways = [one.data.scaling for one in (meta.trained, config)]
    other_ways = len({(way.factors, way.shapes) if way.share else None for way in ways}) > 1
    if other_ways:
        weights["scale_emb"] = own["scale_emb"]
    checkpoints.check_names(own, weights, folder)
    trunk.load_state_dict(weights)
    if "trm" not in meta.voices or meta.trained.trunk.own_layers != config.trunk.own_layers:
        trunk.begin_trm()
    if config.is_tiny and config.llama_frozen:
        if "reader" not in meta.voices:
            raise CheckpointError(f"{folder}: holds no reader to be frozen; give one with a reader")
        trained = trunk.trm_parameters()
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(name in trained)
    known = sum(row is not None for row in rows)
    anew = "; the vectors of data.scaling, which differs, start anew" if other_ways else ""
    if is_main:
        note(f"trunk from {folder}, which knows {known} of {base.num_tasks} tasks{anew}")
    run = {"step": meta.step, "elapsed": meta.elapsed, "git_revision": meta.git_revision}
    return {"start": run | {"data_fingerprint": meta.data_fingerprint, "notes": meta.notes}}


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def _hub_hybrid(config: JointConfig, trunk: Trunk, processes: int) -> Any:
    from arctrm.model.hybrid import HybridModel
    from arctrm.reader.hub_loading import load_hub_reader

    if config.hub.sharded and processes == 1:
        raise ConfigError(
            "hub.sharded = true: one process has nobody to share with; start several with "
            "`torchrun --standalone --nproc_per_node N -m arctrm joint ...`, or leave it out"
        )
    reader = load_hub_reader(config.hub, trunk.device, spread if config.hub.sharded else None)
    if reader.device.type != trunk.device.type:
        raise ConfigError(f"hub.device: TRM is trained on {trunk.device}; leave hub.device out")
    hybrid = HybridModel(reader, trunk, config.coupling)
    starts: list[tuple[Path | None, str, nn.Module]] = [
        (config.trm_checkpoint, "adapters.", hybrid.adapters),
        (config.reader_checkpoint, "hub.", reader.pretrained),
    ]
    for path, prefix, module in starts:
        if path is None:
            continue
        folder, own = checkpoints.resolve_checkpoint(path), module.state_dict()
        weights = _part(checkpoints.read_model(folder), prefix)
        if module is hybrid.adapters:  # those that both have, each as a whole
            there, here = ({name.partition(".")[0] for name in names} for names in (weights, own))
            both = tuple(f"{name}." for name in there & here)
            own = {name: tensor for name, tensor in own.items() if name.startswith(both)}
            weights = {name: t for name, t in weights.items() if name.startswith(both)}
        checkpoints.check_names(own, weights, folder)
        fill(module.state_dict(), weights)
    return hybrid


def with_data_path(config: JointConfig) -> JointConfig:
    """The configuration with `data_path` written into its table `data`; idempotent."""
    source, data = config.data_path, config.data
    if source is None:
        return config
    folder, changes = Path(source), dict[str, Any](subsets=(source,))
    labels: tuple[str, ...] = (subset_label(source),)
    if source in BUNDLED or not (folder / FILE).is_file():
        changes["test_set"] = source if data.test_set == source else None
    elif data.path in (None, folder):
        meta = open_base_set(folder).meta
        changes, labels = {**meta.built_from, "path": folder}, meta.subsets
    else:
        raise ConfigError(
            f"data_path = {source!r} contradicts data.path = {str(data.path)!r}; leave one out"
        )
    changes["weights"] = {name: w for name, w in data.weights.items() if name in labels}
    return config.model_copy(update={"data": DataConfig.model_validate({**dict(data), **changes})})


def steps_of(epochs: int, base: BaseSet, steps: Sequence[Any], num_processes: int) -> int:
    """Optimiser steps in which `epochs` times as many outputs are asked for as there are pairs."""
    asked = 0.0
    for step in (step for step in steps if step.end >= 1):
        lengths = sampled_lengths(step.sequences)
        fitting = min(step.num_tokens / float(lengths.sum(1).mean()), len(step.queue))
        asked += fitting * float((lengths > 0).sum(1).double().mean())
    return math.ceil(epochs * base.num_pairs / (asked * num_processes))


def describe(config: Config) -> dict[str, str]:
    """What a run would train: data, parameters, memory, length; writes nothing."""
    built = config.data.path is not None and (config.data.path / FILE).is_file()
    base = prepare(config.data if built else config.data.model_copy(update={"path": None}))
    with torch.device("meta"):
        trunk = new_trunk(config, base)
    tables = sum(getattr(trunk, name).numel() for name in TASK_TABLES)
    total = sum(p.numel() for p in trunk.parameters())
    schedule, training = config.training.schedule, config.training
    rows = {
        "tasks, pairs": f"{base.num_tasks:,}, {base.num_pairs:,}",
        "evaluated split": f"{base.meta.test_set} ({sum(base.meta.in_test_set)} tasks)",
        "voices": config.voice,
        "parameters": f"trunk {total - tables:,}, task embeddings {tables:,}",
        "memory": f"about {_memory(config, total) / 2**30:.1f} GiB per process",
        "batch": f"{training.tokens_per_batch:,} tokens x {training.grad_accum}",
        "length": f"{schedule.budget} s" if schedule.budget else f"{schedule.max_steps:,} steps",
    }
    if isinstance(config, JointConfig):
        if not config.is_tiny:
            from arctrm.reader.hub_loading import empty_hub_model

            empty, width = empty_hub_model(config.hub)
            count = sum(p.numel() for p in empty.parameters())
            rows["voices"] = "trm"
            rows["reader"] = f"{config.llama_model} ({config.hub.mode}), {count:,} of width {width}"
        if config.epochs is not None:
            rows["length"] = f"{config.epochs:,} epochs"
        rows["evaluation"] = config.evaluation.test_set if config.evaluate else "none"
    return rows


def _memory(config: Config, num_parameters: int) -> float:  # bytes
    sizes, training = config.trunk, config.training
    of_layer = 12 * sizes.hidden_size + 4 * sizes.inner_size
    kept = of_layer * sizes.depth
    if sizes.gradient_checkpointing:
        kept = sizes.hidden_size * sizes.depth + of_layer
    width = 2 if torch.cuda.is_available() else 4
    return 4 * 5 * num_parameters + width * kept * training.tokens_per_batch
