"""Start parts of a hybrid from checkpoints of their own, whatever tasks those were trained on.

Every tensor must fit, by name and by shape, and so must the sizes that shapes do not show (heads);
only the rows of the task embeddings are put in the order of the new data set, by the content of the
tasks. A task that the checkpoint does not know starts from the mean of those it does.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arctrm.config.base import StrictModel
from arctrm.config.joint import TINY, JointConfig
from arctrm.config.reader import ReaderConfig
from arctrm.config.reader_hub import HubReaderConfig
from arctrm.config.trm import TRMConfig
from arctrm.data.dataset import BaseSet
from arctrm.errors import CheckpointError
from arctrm.hybrid import Hybrid
from arctrm.training.checkpoint_meta import CheckpointMeta, check_names, read_meta
from arctrm.training.checkpoints import read_model, resolve_checkpoint
from arctrm.trm.model import TASK_TABLES

ENSEMBLE = "ensemble"
OF_PRETRAINING = ("scale_emb.weights", "mosaic_emb.weights")
"""Tensors that a part has no use for any more, so that one checkpoint may have them and one not."""
TABLES: dict[str, tuple[type[StrictModel], tuple[str, ...]]] = {
    "trm": (
        TRMConfig,
        (
            *("layout", "task_embedding", "hidden_size", "num_heads", "num_layers", "expansion"),
            *("num_prefix_slots", "rope_base", "qk_norm", "condition_cells"),
        ),
    ),
    "reader": (
        ReaderConfig,
        (
            *("hidden_size", "num_heads", "num_layers", "loops", "expansion", "rope_base"),
            *("input_attention", "task_embedding", "inverse_share", "injection"),
        ),
    ),
    "hub": (HubReaderConfig, ("name", "revision", "mode", "lora_rank", "lora_alpha")),
}
"""Table of a configuration -> its model and the keys that must be the same."""


class StartingPoint(NamedTuple):
    """A checkpoint that a part of the hybrid starts from."""

    part: str
    """Name of the part in the hybrid: "trm", "reader", or "ensemble.0" and so on."""
    kind: str
    """"trm" or "reader": what of the checkpoint."""
    folder: Path
    meta: CheckpointMeta


def starting_points(config: JointConfig) -> list[StartingPoint]:
    """The checkpoints that parts start from; refuses what cannot fit, as far as their metadata
    shows it.

    Raises:
        CheckpointError: there is none, it holds another part, or sizes differ.
    """
    points = []
    given: list[tuple[str, str, Path | None]] = [
        ("trm", "trm", config.trm_checkpoint),
        ("reader", "reader", config.reader_checkpoint),
    ]
    more = enumerate(config.ensemble_checkpoints)
    given += [(f"{ENSEMBLE}.{number}", "reader", checkpoint) for number, checkpoint in more]
    for part, kind, checkpoint in given:
        if checkpoint is None:
            continue
        folder = resolve_checkpoint(checkpoint)
        meta = read_meta(folder)
        _check_holds(folder, meta, kind)
        if kind == "trm":
            _check_sizes(folder, meta, "trm", config)
            _check_adapters(folder, meta, config)
        elif config.llama_model == TINY:
            _check_is_tiny(folder, meta)
            _check_sizes(folder, meta, "reader", config)
        else:
            _check_is_hub(folder, meta, config)
            _check_sizes(folder, meta, "hub", config)
        points.append(StartingPoint(part, kind, folder, meta))
    return points


def load_part(hybrid: Hybrid, point: StartingPoint, base: BaseSet, config: JointConfig) -> str:
    """Load a part of the hybrid, with TRM the adapters, too, unless they shall be new; says what
    was loaded. Of a hub reader that is what was trained of it.

    Raises:
        CheckpointError: a tensor does not fit.
    """
    name, kind, folder, meta = point
    weights = part_weights(folder, meta, kind)
    if kind == "reader" and hybrid.tiny is None:
        _load(hybrid.reader, weights, folder)
        return f"trained weights of the reader from {folder}"
    known = _load(hybrid.get_submodule(name), weights, folder, _rows(meta, base))
    loaded = ["TRM" if kind == "trm" else "reader" if name == kind else "reader of the ensemble"]
    if kind == "trm" and not config.new_adapters:
        loaded += _load_adapters(hybrid, folder, meta)
    return f"{', '.join(loaded)} from {folder}, which knows {known} of {base.num_tasks} tasks"


def _check_adapters(folder: Path, meta: CheckpointMeta, config: JointConfig) -> None:
    both_tiny = config.llama_model == TINY == llama_model(meta)
    if config.new_adapters or held_by(meta) != "hybrid" or not both_tiny:
        return
    shared = [path for path in ("context", "draft", "back") if getattr(config.coupling, path)]
    there = ReaderConfig.model_validate(meta.config["reader"]).hidden_size
    here = config.reader.hidden_size
    if there != here and any(meta.config["coupling"].get(path) for path in shared):
        raise CheckpointError(
            f"{folder}: its adapters were made for a reader of width {there}, reader.hidden_size = "
            f"{here} here; use that width, or train other adapters with new_adapters = true"
        )


def held_by(meta: CheckpointMeta) -> str:
    """What a checkpoint holds: "trm", "reader" or "hybrid"."""
    return "hybrid" if "coupling" in meta.config else meta.config.get("model", "trm")


def llama_model(meta: CheckpointMeta) -> str:
    """The reader of a hybrid's checkpoint: "tiny", or the name of a hub model."""
    return meta.config.get("llama_model", TINY)


def origin(meta: CheckpointMeta, kind: str) -> dict[str, Any]:
    """How the part `kind` ("reader", "trm") of a checkpoint was trained, for `notes.parts`.

    Of a hybrid: what its own notes say of the part, and under "joined_before" the joint runs that
    have trained it since.
    """
    said = meta.notes.get("parts", {}).get(kind)
    if said is None:
        return {
            **_run(meta),
            "world_size": meta.world_size,
            "examples": meta.examples,
            "seed": meta.config["seed"],
            "data": meta.config["data"],
            "training": meta.config["training"],
        }
    coupling = meta.config.get("coupling", {})
    joined = any(coupling.get(path) for path in ("context", "draft", "back"))
    if not joined or (kind == "reader" and meta.config.get("llama_frozen")):
        return said
    return said | {"joined_before": [*said.get("joined_before", []), _run(meta)]}


def _run(meta: CheckpointMeta) -> dict[str, Any]:
    return {"step": meta.step, "elapsed": meta.elapsed, "git_revision": meta.git_revision}


def part_weights(folder: Path, meta: CheckpointMeta, kind: str) -> dict[str, Tensor]:
    """The weights of one part, float32, without its name before them.

    Raises:
        CheckpointError: the checkpoint has no such part.
    """
    _check_holds(folder, meta, kind)
    stored = read_model(folder, ema=True, meta=meta)
    weights = {name: tensor.float() for name, tensor in stored.items()}
    if held_by(meta) == kind:
        return weights
    first = f"{kind}."
    return {n.removeprefix(first): t for n, t in weights.items() if n.startswith(first)}


def _check_holds(folder: Path, meta: CheckpointMeta, kind: str) -> None:
    held = held_by(meta)
    if held not in (kind, "hybrid"):
        raise CheckpointError(
            f"{folder}: holds a {held}, not a {kind}; give the checkpoint of a {kind} or a hybrid"
        )


def _check_is_tiny(folder: Path, meta: CheckpointMeta) -> None:
    if llama_model(meta) != TINY:
        raise CheckpointError(
            f"{folder}: its reader is {llama_model(meta)}, not the tiny reader; set llama_model to "
            "that name, or give the checkpoint of a tiny reader"
        )


def _check_is_hub(folder: Path, meta: CheckpointMeta, config: Any) -> None:
    if held_by(meta) != "hybrid" or llama_model(meta) == TINY:
        raise CheckpointError(
            f"{folder}: its reader is the tiny one, llama_model = {config.llama_model!r} here; "
            "give the checkpoint of a hybrid with that model, or set llama_model = 'tiny'"
        )


def _check_sizes(folder: Path, meta: CheckpointMeta, table: str, config: Any) -> None:
    model, keys = TABLES[table]
    there, here = model.model_validate(meta.config.get(table, {})), getattr(config, table)
    for key in keys:
        if getattr(there, key) != getattr(here, key):
            raise CheckpointError(
                f"{folder}: {table}.{key} = {getattr(there, key)!r} there, "
                f"{getattr(here, key)!r} here; use the value of the checkpoint"
            )


def _load_adapters(hybrid: Hybrid, folder: Path, meta: CheckpointMeta) -> list[str]:
    """Load the adapters that both have, all of each; their names."""
    if held_by(meta) != "hybrid":
        return []
    weights = part_weights(folder, meta, "adapters")
    loaded = []
    for name, adapter in hybrid.adapters.items():
        own = {n.removeprefix(f"{name}."): t for n, t in weights.items() if n.startswith(name)}
        if not own:
            continue
        check_width(folder, own, hybrid.hidden_size)
        _load(adapter, own, folder)
        loaded.append(f"adapter {name}")
    return loaded


def check_width(folder: Path, weights: dict[str, Tensor], width: int) -> None:
    """Refuse the weights of an adapter for a reader of another width.

    (`project` has the reader's width on the side that is not TRM's.)

    Raises:
        CheckpointError: names both widths.
    """
    shape = weights["project.weight"].shape
    there = shape[0] if "from_H.weight" in weights else shape[1]
    if there != width:
        raise CheckpointError(
            f"{folder}: its adapters were made for a reader of width {there}, this reader has "
            f"width {width}; use the reader that they were trained with, or the checkpoint of a "
            "TRM alone"
        )


def _load(
    part: nn.Module, weights: dict[str, Tensor], folder: Path, rows: list[int | None] | None = None
) -> int:
    if rows is not None:
        weights |= {n: _in_order(weights[n], rows) for n in TASK_TABLES if n in weights}
    own = part.state_dict()
    differ = [name for name in OF_PRETRAINING if (name in own) != (name in weights)]
    weights = {n: t for n, t in weights.items() if n not in differ}
    weights |= {n: t for n, t in own.items() if n in differ}
    check_names({n: tuple(t.shape) for n, t in own.items()}, weights, folder)
    part.load_state_dict(weights)
    return sum(row is not None for row in rows or ())


def _rows(meta: CheckpointMeta, base: BaseSet) -> list[int | None]:
    """The checkpoint's embedding row of each task of the base set."""
    keys = meta.notes.get("task_fingerprints")
    if keys:
        known = {key: row for row, key in enumerate(keys)}
        return [known.get(key) for key in base.task_fingerprints()]
    known = {name: row for row, name in enumerate(meta.task_ids)}
    return [known.get(name) for name in base.meta.task_ids]


def _in_order(embeddings: Tensor, rows: list[int | None]) -> Tensor:
    mean = embeddings.mean(0)
    return torch.stack([mean if row is None else embeddings[row] for row in rows])
