"""From a checkpoint on disk to a model that answers: bundled weights, run folders, reference files.

A `Solver` knows which tasks its embeddings belong to. Tasks are recognised by the content of their
demonstrations where the checkpoint recorded it, so that a renamed file is still known and another
task of the same name is not.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import ConfigDict, ValidationError
from torch import nn

from arctrm.config import CouplingConfig, DataConfig, InferenceConfig, ReaderConfig, TRMConfig
from arctrm.config.base import StrictModel
from arctrm.config.joint import TINY
from arctrm.config.reader_hub import HubReaderConfig
from arctrm.data.task import Task
from arctrm.data.views import IDENTITY, SAME_COLOURS, View, fixed_colours
from arctrm.errors import CheckpointError, ConfigError
from arctrm.hybrid import Hybrid, empty_hybrid, hub_hybrid
from arctrm.reader.hub import HubReader
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.interface import GridReader
from arctrm.reader.tiny import TinyReader
from arctrm.solving.hub_weights import check_adapters, filled, here_and_now, reader_width
from arctrm.training.checkpoint_meta import META
from arctrm.training.checkpoints import check_names, read_meta, read_model, resolve_checkpoint
from arctrm.training.joint_hub import joint_reader
from arctrm.training.joint_reader import JointReader
from arctrm.training.provenance import processor
from arctrm.training.source import view_of
from arctrm.training.stages import compute_dtype
from arctrm.trm.layers import run_level
from arctrm.trm.model import TRM, Table
from arctrm.trm.reference import read_reference_file

BUNDLED = Path(__file__).parents[1] / "bundled"
SEPARATOR = "|||"
"""Between task id, dihedral and colours in the reference's identifiers."""


@dataclass(frozen=True)
class Solver:
    """A model with its id map."""

    model: TRM | TinyReader | Hybrid
    """Its last task embedding is the mean of the trained ones: where an unseen task starts."""
    rows: dict[str, int]
    """Task key (content fingerprint, also with the id before it; else id) -> embedding row."""
    by_content: bool
    """Whether the keys of `rows` are content fingerprints."""
    views: dict[str, list[tuple[View, int]]]
    """Task id -> the views that have an embedding of their own, with its row (per-view models)."""
    name: str
    seed: int = 0
    identity_colours: float = 0.2
    num_aug: int = 0
    test_set: str | None = None
    """The subset whose test pairs were kept out of training."""
    held_out: int = 0
    """Tasks of the other subsets whose test pairs were kept out, too."""
    with_ensemble: bool = True
    """Whether readers beside the first answer, where there are more."""
    adapted: bool = False
    """Whether the weights have been adapted to the tasks after training."""

    @property
    def has_trm(self) -> bool:
        """Whether there is a TRM to answer with."""
        return not isinstance(self.model, TinyReader)

    @property
    def trm(self) -> TRM:
        """The TRM, where there is one."""
        assert not isinstance(self.model, TinyReader)
        return self.model.trm if isinstance(self.model, Hybrid) else self.model

    @property
    def hybrid(self) -> Hybrid | None:
        """Both models and what joins them, where there are both."""
        return self.model if isinstance(self.model, Hybrid) else None

    @property
    def tiny(self) -> TinyReader | None:
        """The reader, where it is a tiny one."""
        if isinstance(self.model, Hybrid):
            return self.model.tiny
        return self.model if isinstance(self.model, TinyReader) else None

    @property
    def hub(self) -> HubReader | None:
        """The reader, where it is a hub model."""
        return self.model.hub if isinstance(self.model, Hybrid) else None

    @property
    def reader(self) -> GridReader | None:
        """The reader, where there is one."""
        return self.tiny if self.hub is None else self.hub

    @property
    def readers(self) -> list[GridReader]:
        """Who proposes and judges: the reader and those of its ensemble, if there are any."""
        if self.reader is None:
            return []
        return [self.reader, *(self.ensemble if self.with_ensemble else ())]

    @property
    def ensemble(self) -> list[TinyReader]:
        """The readers beside the first."""
        others = self.model.ensemble if isinstance(self.model, Hybrid) else ()
        return [cast(TinyReader, one) for one in others]

    def without_ensemble(self) -> "Solver":
        """The same, of whose readers only the first answers."""
        return replace(self, with_ensemble=False)

    @property
    def joint_reader(self) -> JointReader | None:
        """The reader as it is shown tasks, where there is one."""
        if self.reader is None:
            return None
        return joint_reader(self.model.reader if isinstance(self.model, Hybrid) else self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.puzzle_emb.weights.device

    def row_of(self, task: Task) -> int | None:
        """Embedding row of a task that the model was trained on, else None."""
        if not self.by_content:
            return self.rows.get(task.id)
        content = task.fingerprint()
        return self.rows.get(f"{task.id} {content}", self.rows.get(content))

    @property
    def mean_row(self) -> int:
        """Embedding row of the mean."""
        return self.model.puzzle_emb.weights.shape[0] - 1

    def views_of(self, task: Task, count: int) -> list[tuple[View, int]] | None:
        """Views with their rows, for models with one embedding per view; None for the others."""
        if self.views:
            return self.views.get(task.id, [])[:count]
        if not self.has_trm or self.trm.config.task_embedding == "shared":
            return None
        row = self.row_of(task)
        if row is None:
            return []
        numbers = range(min(count, self.num_aug))
        return [(self._numbered_view(task, row, k), row * self.num_aug + k) for k in numbers]

    def _numbered_view(self, task: Task, row: int, number: int) -> View:
        fixed = torch.from_numpy(fixed_colours(task))[None]
        dihedral, colours = view_of(
            self.seed, torch.tensor([row]), torch.tensor([number]), fixed, self.identity_colours
        )
        return View(int(dihedral), tuple(colours[0].tolist()))


def load_solver(
    checkpoint: Path | None, inference: InferenceConfig, device: torch.device
) -> Solver:
    """Load the bundled weights, a checkpoint folder or a reference checkpoint file.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not fit its own configuration or
            the hub reader that it was trained with.
        ConfigError: there is no such hub reader, or it cannot be used.

    """
    if checkpoint is not None and checkpoint.is_file():
        if checkpoint.with_name(META).is_file():
            raise CheckpointError(
                f"{checkpoint}: is one file of a checkpoint; give its folder {checkpoint.parent}"
            )
        solver = _reference_solver(checkpoint)
    else:
        solver = _own_solver(resolve_checkpoint(checkpoint or BUNDLED), inference, device)
    solver.model.to(device).eval()
    dtype = _inference_dtype(inference.dtype, device)
    for tiny in [solver.tiny, *solver.ensemble] if solver.tiny is not None else ():
        _append_mean(tiny)
        tiny.to(dtype).dtype = dtype
        if inference.blank_task_embedding:  # of TRM it is blanked where it is asked
            for table in task_tables(tiny):
                table.weights.detach().zero_()
    if solver.has_trm:
        _append_mean(solver.trm)
        solver.trm.dtype = dtype
        if inference.compile == "on" or (inference.compile == "auto" and device.type == "cuda"):
            solver.trm.level = torch.compile(run_level, dynamic=False)
    solver.model.requires_grad_(False)
    return solver


def _inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """As in training, but a CPU that is faster in bfloat16 computes in it."""
    if name == "auto" and device.type == "cpu" and _cpu_is_faster_in_bfloat16():
        return torch.bfloat16
    return compute_dtype(name, device)


def _cpu_is_faster_in_bfloat16() -> bool:
    """With AMX; with AVX-512 alone an AMD processor is (nearly twice), an Intel one is slower (1.4
    times; both measured).
    """
    read = getattr(torch.cpu, "get_capabilities", dict)  # absent in older torch
    capabilities: dict[str, object] = read()
    if capabilities.get("amx_bf16"):
        return True
    return bool(capabilities.get("avx512_bf16")) and "Intel" not in processor()


class _Trained(StrictModel):
    """What a checkpoint must say of its training for its embeddings to be used."""

    model_config = ConfigDict(extra="ignore")

    seed: int
    model: Literal["trm", "reader"] = "trm"
    trm: TRMConfig
    reader: ReaderConfig = ReaderConfig()
    llama_model: str = TINY
    hub: HubReaderConfig = HubReaderConfig()
    coupling: CouplingConfig | None = None
    """Of a hybrid: a checkpoint of `arctrm joint`."""
    ensemble_checkpoints: tuple[str, ...] = ()
    """Where its further readers came from."""
    data: DataConfig


class _Notes(StrictModel):
    model_config = ConfigDict(extra="ignore")

    task_fingerprints: tuple[str, ...] = ()


def _own_solver(folder: Path, inference: InferenceConfig, device: torch.device) -> Solver:
    meta = read_meta(folder)
    try:
        trained = _Trained.model_validate(meta.config)
        keys = _Notes.model_validate(meta.notes).task_fingerprints or meta.task_ids
    except ValidationError as error:
        first = error.errors()[0]
        key, got = ".".join(map(str, first["loc"])), first["input"]
        got = "" if isinstance(got, dict) else f" = {got!r}"
        raise CheckpointError(
            f"{folder / META}: {key}{got}: {first['msg']}; "
            "give a checkpoint that `arctrm pretrain` wrote"
        ) from error
    if len(keys) != len(meta.task_ids):
        raise CheckpointError(
            f"{folder}: its notes.task_fingerprints name {len(keys)} tasks, its id map "
            f"{len(meta.task_ids)}; use a checkpoint.json as `arctrm pretrain` wrote it"
        )
    by_content = keys is not meta.task_ids
    rows = {key: row for row, key in enumerate(keys)}
    if by_content:  # two tasks with the same demonstrations: the one of that name comes first
        names = zip(meta.task_ids, keys, strict=True)
        rows |= {f"{name} {key}": row for row, (name, key) in enumerate(names)}
    return Solver(
        _load_model(folder, trained, len(meta.task_ids), inference, device),
        rows,
        by_content,
        {},
        "bundled weights" if folder == BUNDLED else str(folder),
        trained.seed,
        trained.data.identity_colours,
        trained.data.num_aug,
        trained.data.test_set,
        trained.data.held_out,
    )


def _load_model(
    folder: Path,
    trained: _Trained,
    num_tasks: int,
    inference: InferenceConfig,
    device: torch.device,
) -> TRM | TinyReader | Hybrid:
    weights = {name: tensor.float() for name, tensor in read_model(folder, ema=True).items()}
    if trained.coupling is not None and trained.llama_model != TINY:
        hub = here_and_now(trained.hub, inference, device)
        width = reader_width(folder, hub)
        check_adapters(folder, weights, width)
        hybrid = hub_hybrid(
            load_hub_reader(hub, device), trained.reader, trained.trm, trained.coupling, num_tasks
        )
        return filled(hybrid, weights, folder)
    if inference.llama_model is not None:
        raise ConfigError(
            f"inference.llama_model = {inference.llama_model!r}: {folder} holds no hub reader; "
            "leave it out"
        )
    with torch.device("meta"):  # compare before anything of the configured size is made
        model = _empty_model(trained, num_tasks)
    check_names({n: tuple(t.shape) for n, t in model.state_dict().items()}, weights, folder)
    model.load_state_dict(weights, assign=True)
    return model


def _empty_model(trained: _Trained, num_tasks: int) -> TRM | TinyReader | Hybrid:
    if trained.coupling is not None:
        num_readers = 1 + len(trained.ensemble_checkpoints)
        return empty_hybrid(trained.reader, trained.trm, trained.coupling, num_tasks, num_readers)
    if trained.model == "reader":
        return TinyReader(trained.reader, num_tasks)
    per_view = trained.data.num_aug if trained.trm.task_embedding == "per_view" else 1
    return TRM(trained.trm, num_tasks * per_view)


def _reference_solver(path: Path) -> Solver:
    """A published checkpoint; its embeddings mean something only with `identifiers.json`."""
    trm = read_reference_file(path).trm
    identifiers = path.with_name("identifiers.json")
    try:
        names = json.loads(identifiers.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: needs the identifiers.json of its data set beside it, which says whose each "
            f"embedding is, but {identifiers} cannot be read ({_reason(error)}); copy it there"
        ) from error
    num_rows = trm.puzzle_emb.weights.shape[0]
    if not isinstance(names, list) or len(names) != num_rows:
        listed = f"lists {len(names)} embeddings" if isinstance(names, list) else "is not a list"
        raise CheckpointError(
            f"{identifiers}: {listed}, {path.name} holds {num_rows} embeddings; use the "
            "identifiers.json of the data set it was trained on"
        )
    views: dict[str, list[tuple[View, int]]] = {}
    for row, name in enumerate(names):
        task_id, *augmentation = str(name).split(SEPARATOR)
        views.setdefault(task_id, []).append((_reference_view(augmentation, identifiers), row))
    return Solver(trm, {task: v[0][1] for task, v in views.items()}, False, views, str(path))


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _reference_view(augmentation: list[str], where: Path) -> View:
    if not augmentation:
        return IDENTITY
    name = SEPARATOR.join(augmentation)
    match = re.fullmatch(r"t([0-7])\|\|\|([0-9]{10})", name)
    colours = tuple(int(colour) for colour in match[2]) if match else ()
    if match is None or sorted(colours) != sorted(SAME_COLOURS):
        raise CheckpointError(
            f"{where}: {name!r} is not a dihedral t0..t7 and a permutation of ten colours, such "
            f"as 't3{SEPARATOR}0213456789'; use the identifiers.json of the data set"
        )
    return View(int(match[1]), colours)


def _append_mean(model: TRM | TinyReader) -> None:
    for table in task_tables(model):
        trained = table.weights.detach()
        table.weights = nn.Parameter(torch.cat((trained, trained.mean(0, keepdim=True))))


def task_tables(model: TRM | TinyReader) -> list[Table]:
    """The task embeddings of a model: of a reader that was asked for inputs, too, two tables."""
    has_inverse = isinstance(model, TinyReader) and model.config.inverse_share
    return [model.puzzle_emb, *([model.inverse_emb] if has_inverse else ())]
