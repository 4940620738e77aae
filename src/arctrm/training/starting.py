"""Start one part of a hybrid from a checkpoint of its own, whatever tasks that was trained on.

Every tensor must fit, by name and by shape; only the rows of the task embeddings are put in the
order of the new data set, by the content of the tasks. A task that the checkpoint does not know
starts from the mean of those it does.
"""

from pathlib import Path

import torch
from torch import Tensor

from arctrm.data.dataset import BaseSet
from arctrm.errors import CheckpointError
from arctrm.reader.tiny import TinyReader
from arctrm.training.checkpoint_meta import CheckpointMeta, check_names
from arctrm.training.checkpoints import read_meta, read_model, resolve_checkpoint
from arctrm.trm.model import TRM

EMBEDDINGS = "puzzle_emb.weights"


def load_part(part: TRM | TinyReader, checkpoint: Path, base: BaseSet) -> int:
    """Load `part` from a run, checkpoint or bundle folder; the number of tasks it knows.

    Raises:
        CheckpointError: there is none, it is of the other kind of model, or sizes differ.
    """
    folder = resolve_checkpoint(checkpoint)
    meta = read_meta(folder)
    kind = "reader" if isinstance(part, TinyReader) else "trm"
    held = meta.config.get("model", "trm")
    if "coupling" in meta.config:
        held = "hybrid"
    if held not in (kind, "hybrid"):
        raise CheckpointError(
            f"{folder}: holds a {held}, not a {kind}; give the checkpoint of a {kind}"
        )
    weights = {name: tensor.float() for name, tensor in read_model(folder, ema=True).items()}
    if held == "hybrid":
        weights = {n.removeprefix(f"{kind}."): t for n, t in weights.items() if n.startswith(kind)}
    rows = _rows(meta, base)
    weights[EMBEDDINGS] = _in_order(weights[EMBEDDINGS], rows)
    check_names({n: tuple(t.shape) for n, t in part.state_dict().items()}, weights, folder)
    part.load_state_dict(weights)
    return sum(row is not None for row in rows)


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
