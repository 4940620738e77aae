"""From weights on disk to who answers: a reader, a refiner, or both, and the tasks they know.

What kind of model answers is decided here and nowhere else; all others ask for attributes.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from arctrm.checkpoints import (
    META,
    CheckpointMeta,
    read_meta,
    read_model,
    read_trunk,
    resolve_checkpoint,
)
from arctrm.config import (
    TINY,
    EvalConfig,
    HubConfig,
    InferenceConfig,
    SolveConfig,
    TaskChoiceConfig,
)
from arctrm.config.load import as_flags, load_config
from arctrm.data.task import Task
from arctrm.data.views import View
from arctrm.errors import CheckpointError, ConfigError
from arctrm.model.layout import Condition
from arctrm.model.reference import ReferenceRefiner, read_reference_file, reference_views
from arctrm.model.trm import Refiner, TrunkRefiner
from arctrm.model.trunk import TASK_TABLES, Trunk
from arctrm.reader.protocol import Reader
from arctrm.reader.tiny import TinyReader
from arctrm.system import compute_dtype

if TYPE_CHECKING:
    from arctrm.reader.text_module import TextReasoningModule
    from arctrm.solve.scoring import Scores
    from arctrm.solve.solution import OnProgress, Solution

BUNDLED = Path(__file__).parents[1] / "bundled"


class Voices(NamedTuple):
    """Who answers with a model."""

    reader: Reader | None  # writes and scores grids
    refiner: Refiner | None  # answers as a TRM; hears the reader where a question has a draft
    alone: Refiner | None  # the refiner without any path from the reader


Speak = Callable[[Any], Voices]  # makes the voices of models of one kind
Settings = Mapping[str, Any] | None
"""Keys as after `--set`, such as {"inference.views": 16}."""


@dataclass(frozen=True, eq=False, repr=False)
class Solver:
    """Who answers, and for which tasks they have an embedding."""

    speakers: Voices
    model: nn.Module  # the weights behind them, in float32: what adaptation copies and trains
    speak: Speak
    rows: Mapping[str, int]
    """Task key -> embedding row. Keys are fingerprints of demonstrations (also with the id before
    it): a renamed task is known, another one of the same name is not; or, not `by_content`, ids."""
    by_content: bool
    mean_row: int  # of the mean embedding over the trained tasks: where an unseen task starts
    name: str  # of the weights, for people
    views: Mapping[str, list[tuple[View, int]]] = field(default_factory=dict)
    """Of a published checkpoint: task id -> views that have an embedding, with its row."""
    reads_pairs: bool = False  # the reader is told the task by demonstrations in its prompt
    identity_colours: float = 0.2
    test_set: str | None = None  # the subset whose test pairs were kept out of training
    held_out: int = 0  # tasks of the other subsets whose test pairs were kept out, too
    voices: tuple[str, ...] = ("reader", "trm")  # that were trained
    adapted: bool = False  # the weights have been adapted to the tasks after training
    folder: Path | None = None  # of the checkpoint; None of a published file

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        settings: Settings = None,
    ) -> "Solver":
        """Load the bundled weights (None), a run, checkpoint or bundle folder, org/name on the
        Hugging Face hub, or a published TRM file.

        `device`: the GPU unless given, where there is one. `settings`: keys of `[inference]`.
        Raises CheckpointError or ConfigError.
        """
        config = load_config(SolveConfig, flags=as_flags(settings))
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        path = None if checkpoint is None else Path(checkpoint).expanduser()
        return load_solver(path, config.inference, place)

    def solve(
        self,
        task: Task,
        budget: float | str = "60s",
        on_progress: "OnProgress" = lambda progress: None,
        *,
        settings: Settings = None,
    ) -> "Solution":
        """Two grids and their evidence for every test input, within `budget` (seconds, or "5m").

        `on_progress` gets a `Progress` now and then. Ctrl-C raises `Stopped`, whose `solution` has
        the best grids so far.
        """
        from arctrm.solve.adapt import require_adaptable  # these are built on this module
        from arctrm.solve.questions import require_test_inputs
        from arctrm.solve.solve import solve_task

        config = load_config(
            SolveConfig, flags={"budget": ("budget", budget), **as_flags(settings)}
        )
        require_adaptable(self, "solve", "Solver.evaluate takes any checkpoint")
        require_test_inputs([task], task.id)
        return solve_task(self, task, config, on_progress)

    def evaluate(
        self,
        test_set: str = "evaluation",
        *,
        out: str | Path,
        resume: bool = False,
        settings: Settings = None,
    ) -> "Scores | None":
        """As `arctrm eval`: answer and score a bundled set, file or folder; write and print it."""
        from arctrm.solve.evaluate import evaluate

        given = {"test_set": ("evaluation.test_set", test_set), "out": ("out", str(out))}
        config = load_config(EvalConfig, flags=given | as_flags(settings))
        return evaluate(config, solver=self, resume=resume)

    def text_module(self, task: Task | None = None) -> "TextReasoningModule":
        """The reader as texts go in and grids come out, for an `ARCPlanner`. A tiny reader knows a
        task by its embedding: that of `task`, or the mean.
        """
        from arctrm.reader.text import GridText
        from arctrm.reader.text_module import TextReasoningModule

        if self.reader is None:
            raise CheckpointError(
                f"{self.name}: has no reader, which writes texts; use other weights"
            )
        row = None if task is None else self.row_of(task)
        condition = Condition(self.mean_row if row is None else row, keeps_colours=1)
        return TextReasoningModule(GridText(self.reader, condition))

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the weights as they were loaded to org/name on the Hugging Face hub, as a bundle
        with a model card; gives its address. Raises ConfigError without a login.
        """
        from arctrm.hub import push

        if self.folder is None:
            raise CheckpointError(f"{self.name}: only checkpoints of arctrm can be uploaded")
        return push(self.folder, name, private=private, token=token)

    def __repr__(self) -> str:
        known = f"{len(set(self.rows.values()))} tasks known"
        return f"<Solver: {self.name}, {' and '.join(self.voices)}, {known}, {self.device}>"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def reader(self) -> Reader | None:
        """Who writes and scores grids."""
        return self.speakers.reader

    @property
    def refiner(self) -> Refiner | None:
        """Who answers as a TRM."""
        return self.speakers.refiner

    def trm_views(self, inference: InferenceConfig) -> int:
        """Views that TRM answers: all of them where nobody reads."""
        few, every = inference.trm_views, inference.views
        return min(few, every) if self.reader else every

    @property
    def speaks_both(self) -> bool:
        """Whether reader and TRM both answer."""
        return self.reader is not None and self.refiner is not None

    def row_of(self, task: Task) -> int | None:
        """Embedding row of a task that the model was trained on, else None."""
        if not self.by_content:
            return self.rows.get(task.id)
        content = task.fingerprint()
        return self.rows.get(f"{task.id} {content}", self.rows.get(content))

    def notes_on(self, tasks: Sequence[Task], chosen: TaskChoiceConfig) -> list[str]:
        """Sentences about tasks that the weights do not know, or may know too well."""
        found, known = [], sum(self.row_of(task) is not None for task in tasks)
        if known < len(tasks) and not self.reads_pairs:
            how = "not answered" if self.views else "answered from the mean embedding"
            found.append(f"{len(tasks) - known} of {len(tasks)} tasks are not in the id map: {how}")
        kept_out = 0 < chosen.held_out <= self.held_out
        if known and not kept_out and self.test_set not in (None, chosen.test_set):
            found.append(
                f"{known} tasks may be scored on pairs that training saw: it kept those of "
                f"{self.test_set} out, not of {chosen.test_set}"
            )
        return found

    def with_model(self, model: nn.Module, *, adapted: bool = True) -> "Solver":
        """The same with other weights of the same kind."""
        return replace(self, model=model, speakers=self.speak(model), adapted=adapted)


def load_solver(
    checkpoint: Path | None, inference: InferenceConfig, device: torch.device
) -> Solver:
    """As `Solver.from_pretrained`."""
    if checkpoint is not None and checkpoint.is_file():
        if checkpoint.with_name(META).is_file():
            raise CheckpointError(f"{checkpoint}: one file of a checkpoint; give its folder")
        return _published(checkpoint, device)
    folder = resolve_checkpoint(checkpoint or BUNDLED)
    meta = read_meta(folder)
    if meta.trained.llama_model != TINY:
        solver = _hub(folder, meta, inference, device)
    elif inference.llama_model is not None:
        raise ConfigError(f"inference.llama_model: {folder} holds no hub reader")
    else:
        solver = _tiny(folder, inference, device)
    # The cache of the Hugging Face hub says less than the name there.
    return (
        solver
        if checkpoint is None or checkpoint.exists()
        else replace(solver, name=str(checkpoint))
    )


def _tiny(folder: Path, inference: InferenceConfig, device: torch.device) -> Solver:
    trunk, meta = read_trunk(folder)
    dtype = compute_dtype(inference.dtype, device, trains=False)
    trm, knows_inverse = meta.trained.trm, meta.trained.reader.inverse_share > 0

    def speak(model: Trunk) -> Voices:
        fast = model.cast(dtype)
        reader = TinyReader(fast, asks_inverse=knows_inverse) if "reader" in meta.voices else None
        answers = TrunkRefiner(fast, trm.halt_max_steps, aligned=trm.aligned)
        refiner = answers if "trm" in meta.voices else None
        return Voices(reader, refiner, refiner)

    model = with_mean(trunk).to(device).eval().requires_grad_(False)
    return _solver(folder, meta, model, speak)


def with_mean(trunk: Trunk) -> Trunk:
    """The same trunk with one more row in the tables of tasks: their mean."""
    state = trunk.state_dict()
    for name in TASK_TABLES:
        state[name] = torch.cat((state[name], state[name].mean(0, keepdim=True)))
    return trunk.holding(state)


def _solver(folder: Path, meta: CheckpointMeta, model: nn.Module, speak: Speak) -> Solver:
    """What every checkpoint of arctrm says of itself."""
    data, keys = meta.trained.data, meta.task_fingerprints
    rows = {key: row for row, key in enumerate(keys)}
    # Of two tasks with the same demonstrations the one of that name comes first.
    named = enumerate(zip(meta.task_ids, keys, strict=True))
    rows |= {f"{name} {key}": row for row, (name, key) in named}
    return Solver(
        speak(model),
        model,
        speak,
        rows,
        by_content=True,
        mean_row=len(keys),
        name="bundled weights" if folder == BUNDLED else str(folder),
        identity_colours=data.identity_colours,
        test_set=data.test_set,
        held_out=data.held_out,
        voices=meta.voices,
        folder=folder,
    )


def _hub(
    folder: Path, meta: CheckpointMeta, inference: InferenceConfig, device: torch.device
) -> Solver:
    """Trunk and adapters of a checkpoint, and what was trained of its reader."""
    from arctrm.model.hybrid import HybridModel, HybridRefiner
    from arctrm.reader.hub_loading import load_hub_reader

    trained, most = meta.trained, meta.trained.trm.halt_max_steps
    try:
        reader = load_hub_reader(here_and_now(trained.hub, inference, device), device)
    except ConfigError as error:
        cure = "set inference.llama_model to where the model is now"
        raise CheckpointError(f"{folder}: {error}; {cure}") from error
    hybrid = HybridModel(reader, trained.new_trunk(len(meta.task_ids)), trained.coupling)
    own = {name.replace("reader.pretrained.", "hub.", 1): name for name in hybrid.state_dict()}
    shapes = {stored: hybrid.state_dict()[name].shape for stored, name in own.items()}
    tensors = read_model(folder, expected=shapes)
    hybrid.load_state_dict({name: tensors[stored] for stored, name in own.items()})
    hybrid.trunk = with_mean(hybrid.trunk)
    hybrid.trunk.dtype = compute_dtype(inference.dtype, device, trains=False)

    def speak(model: HybridModel) -> Voices:
        both = (HybridRefiner(model, most, coupled=hears) for hears in (True, False))
        return Voices(model.reader, *both)

    model = hybrid.to(device).eval().requires_grad_(False)
    return replace(_solver(folder, meta, model, speak), reads_pairs=True, voices=("reader", "trm"))


def here_and_now(hub: HubConfig, inference: InferenceConfig, device: torch.device) -> HubConfig:
    """The hub reader as it was trained, but where it is now, and for this device."""
    dtype = hub.dtype if inference.dtype == "auto" else inference.dtype
    if dtype == "auto" and device.type == "cuda":  # what adaptation trains must not be float16
        usual: Any = str(compute_dtype("auto", device, trains=hub.mode != "frozen"))
        dtype = usual.removeprefix("torch.")
    moved = {"name": inference.llama_model, "revision": None} if inference.llama_model else {}
    # Whether code of the model's makers may be run is not the checkpoint's to say.
    own = {"device": None, "dtype": dtype, "trust_remote_code": inference.trust_remote_code}
    return hub.model_copy(update={**moved, **own})


def _published(path: Path, device: torch.device) -> Solver:
    """A TRM with an embedding for each view."""
    model = read_reference_file(path).to(device).eval().requires_grad_(False)
    num_rows = len(model.puzzle_emb["weights"])
    views = reference_views(path, num_rows)
    rows = {task: own[0][1] for task, own in views.items()}

    def speak(model: Any) -> Voices:
        refiner = ReferenceRefiner(model)
        return Voices(None, refiner, refiner)

    more: dict[str, Any] = {"name": str(path), "views": views, "voices": ("trm",)}
    return Solver(speak(model), model, speak, rows, by_content=False, mean_row=num_rows, **more)


def weights_fingerprint(module: nn.Module) -> str:
    """12 hex digits over names, shapes and first values of all weights, the same in any dtype."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(module.state_dict().items()):
        if not tensor.is_meta:  # of a model that does not fit into memory
            values = tensor.detach().flatten()[:16].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()
