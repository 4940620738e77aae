"""The whole configuration of each command."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, model_validator

from arctrm.config import model, solving
from arctrm.config.base import FREE, Count, Seconds, Seed, StrictModel
from arctrm.config.data import DataConfig
from arctrm.config.training import TrackingConfig, TrainingConfig


class _Command(StrictModel):
    """What every command has."""

    seed: Seed = 0
    """Seed of everything random."""
    out: Path | None = Field(None, json_schema_extra=FREE)
    """Folder to write; of `baseline` also a file of results."""


class DataBuildConfig(_Command):
    """`arctrm data build`."""

    data: DataConfig = DataConfig()


class DataShowConfig(StrictModel):
    """`arctrm data show`."""

    seed: Seed | None = None
    """Draw the shown tasks at random; by default the first by id are shown."""
    out: Path | None = None
    """Text file to write instead of the terminal."""
    limit: Count = 5
    """Tasks to show at most."""
    statistics: bool = False
    """Print sizes and overlaps instead of tasks."""


class _RunConfig(_Command):
    """What both training commands have."""

    data: DataConfig = DataConfig()
    trunk: model.TrunkConfig = model.TrunkConfig()
    reader: model.ReaderConfig = model.ReaderConfig()
    trm: model.TRMConfig = model.TRMConfig()
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = Field(TrackingConfig(), json_schema_extra=FREE)

    def _batch_problem(self) -> Iterator[str]:
        tokens, share = self.training.tokens_per_batch, self.trm.share
        least = int(model.PAIR_TOKENS / min(share, 1 - share)) + 1
        if tokens < least:
            said = f"training.tokens_per_batch = {tokens} with trm.share = {share} leaves one voice"
            room = f"no room for the largest pair, {model.PAIR_TOKENS} tokens"
            yield f"{said} {room}; use {least} or more"


class PretrainConfig(_RunConfig):
    """`arctrm pretrain`."""

    is_tiny: ClassVar[bool] = True
    llama_frozen: ClassVar[bool] = False
    batch_size: ClassVar[int | None] = None
    epochs: ClassVar[int | None] = None

    voice: Literal["reader", "trm", "both"] = "both"
    """Which voices of the trunk are trained: the reader, TRM, or both in every optimiser step."""
    checkpoint: Path | None = Field(None, json_schema_extra=FREE)
    """Checkpoint, run or bundle folder that the trunk starts from; untrained when absent."""

    def _problems(self) -> Iterator[str]:
        if self.voice == "both":
            yield from self._batch_problem()
        elif self.trm.draft_share:
            drafts = f"trm.draft_share = {self.trm.draft_share} with voice = {self.voice!r}"
            yield f"{drafts}: drafts are the reader's; set voice = 'both' or trm.draft_share = 0"


JOINT_TRACKING = TrackingConfig(project="arc-hybrid-joint")
KNOWN_KEYS = {
    "llama_model": ("hub", "name"),
    "trm_hidden_size": ("trunk", "hidden_size"),
    "trm_halt_max_steps": ("trm", "halt_max_steps"),
    "lr": ("training", "optimiser", "adamw_lr"),
}
"""Key of the older pipeline -> path of the key that means the same."""
ALTERNATIVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    *(((known,), path) for known, path in KNOWN_KEYS.items()),
    (("llama_frozen",), ("hub", "mode")),
    (("checkpoint",), ("bundled",)),
    (("budget",), ("total_budget",)),
    (("training", "schedule", "budget"), ("training", "schedule", "max_steps")),
)
"""Keys that exclude each other: one given in a later layer (file, variable, flag) displaces the
others of its group in earlier layers."""


class JointConfig(_RunConfig):
    """`arctrm joint`: reader and TRM together; the first ten keys are the older pipeline's."""

    voice: ClassVar[Literal["both"]] = "both"

    data_path: str | None = Field(None, json_schema_extra=FREE)
    """Instead of data.subsets: a bundled name, a file, a folder of tasks or a built data set."""
    llama_model: str = Field(model.TINY, min_length=1)
    """"tiny": the reader's voice of the trunk; or a hub id or folder of a causal language model."""
    llama_frozen: bool = False
    """Leave the reader as it is. Of the tiny one: train TRM's own parts of `trm_checkpoint` only.
    Of a hub model: adapters and TRM; else hub.mode = "lora" or "full" says what of it."""
    trm_checkpoint: Path | None = Field(None, json_schema_extra=FREE)
    """Checkpoint, run or bundle folder that the trunk, and adapters if it has any, start from."""
    trm_hidden_size: int | None = Field(None, json_schema_extra=FREE)
    """The same as trunk.hidden_size."""
    trm_halt_max_steps: int | None = Field(None, json_schema_extra=FREE)
    """The same as trm.halt_max_steps."""
    batch_size: Count | None = None
    """Bound on the sequences of a batch; by default as many as the token budgets hold."""
    max_attempts: int = Field(2, ge=1, le=16)
    """Of a hub model: rounds of reader and TRM in a training step (coupling.back)."""
    epochs: Count | None = Field(None, json_schema_extra=FREE)
    """Length in passes over the pairs, instead of training.schedule.budget and .max_steps."""
    lr: float | None = Field(None, json_schema_extra=FREE)
    """The same as training.optimiser.adamw_lr."""

    reader_checkpoint: Path | None = Field(None, json_schema_extra=FREE)
    """Of a hub model: checkpoint folder whose LoRA or whole weights the reader starts from."""
    hub: model.HubConfig = model.HubConfig()
    coupling: model.CouplingConfig = model.CouplingConfig()
    tracking: TrackingConfig = Field(JOINT_TRACKING, json_schema_extra=FREE)
    evaluate: bool = Field(False, json_schema_extra=FREE)
    """Score the last checkpoint at the end, by the three tables below (those of `arctrm eval`)."""
    evaluation: solving.EvaluationConfig = Field(solving.EvaluationConfig(), json_schema_extra=FREE)
    inference: solving.InferenceConfig = Field(solving.InferenceConfig(), json_schema_extra=FREE)
    judge: solving.JudgeConfig = Field(solving.JudgeConfig(), json_schema_extra=FREE)

    @property
    def checkpoint(self) -> Path | None:
        """Where the trunk starts, as in `PretrainConfig`."""
        return self.trm_checkpoint

    @property
    def is_tiny(self) -> bool:
        """Whether the reader is a voice of the trunk."""
        return self.llama_model == model.TINY

    def eval_config(self, checkpoint: Path, out: Path | None) -> "EvalConfig":
        """The configuration that scores the run's checkpoint."""
        tables = {name: getattr(self, name) for name in ("evaluation", "inference", "judge")}
        return EvalConfig(seed=self.seed, out=out, checkpoint=checkpoint, **tables)

    @model_validator(mode="before")
    @classmethod
    def _spread_known_keys(cls, given: Any) -> Any:
        """Write the older pipeline's keys into the tables that mean the same."""
        if not isinstance(given, Mapping):
            return given
        # Tables that may be changed here; a model as the keys that it was given.
        config = {
            key: v.model_dump(exclude_unset=True) if isinstance(v, BaseModel) else deepcopy(v)
            for key, v in given.items()
        }
        is_hub = config.get("llama_model", model.TINY) != model.TINY
        for name, path in KNOWN_KEYS.items():
            if config.get(name) is not None and (is_hub or name != "llama_model"):
                _spread(config, path, config[name], name)
        hub = config.get("hub", {})
        if is_hub and isinstance(hub, dict):
            frozen = config.setdefault("llama_frozen", hub.get("mode") == "frozen")
            mode = hub.setdefault("mode", "frozen" if frozen is True else "lora")
            if isinstance(frozen, bool) and frozen != (mode == "frozen"):
                said = f"llama_frozen = {str(frozen).lower()} contradicts hub.mode = {mode!r}"
                raise ValueError(f"{said}; leave one of them out")
        return config

    def _problems(self) -> Iterator[str]:
        kind, given = "the tiny reader", {"the table reader": self.reader != model.ReaderConfig()}
        if self.is_tiny:
            named = f"reader_checkpoint = '{self.reader_checkpoint}'"
            kind, given = "a hub model", {named: bool(self.reader_checkpoint)}
            given["the table hub"] = self.hub != model.HubConfig()
        for key in (key for key, is_given in given.items() if is_given):
            said = f"llama_model = {self.llama_model!r} contradicts {key}, which is for {kind}"
            yield f"{said}; leave one of them out"
        if self.is_tiny:
            if not self.llama_frozen:  # else TRM has the whole batch
                yield from self._batch_problem()
            elif self.trm_checkpoint is None:
                yield "llama_frozen = true: there is no reader yet; give trm_checkpoint, too"
            return
        width, coupling = self.trunk.hidden_size, self.coupling
        if width % coupling.adapter_heads:
            heads = f"coupling.adapter_heads = {coupling.adapter_heads}"
            yield f"{heads} does not divide trunk.hidden_size = {width}; use 8, or another divisor"
        one = self.hub.training_tokens + coupling.num_back_vectors * coupling.back
        if coupling.reader_tokens_per_batch < one:
            said = f"coupling.reader_tokens_per_batch = {coupling.reader_tokens_per_batch}"
            yield f"{said} holds no sequence of hub.max_tokens; use {one} or more, or lower that"


def _spread(config: dict[str, Any], path: tuple[str, ...], value: Any, name: str) -> None:
    """Write `value` at `path`; another value there is a contradiction."""
    table = config
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return  # the field's own error says what is wrong
    if table.setdefault(path[-1], value) != value:
        said = f"{name} = {value} contradicts {'.'.join(path)} = {table[path[-1]]}"
        raise ValueError(f"{said}; leave one of them out")


JointModelConfig = JointConfig  # the name in the older pipeline


class EvalConfig(_Command):
    """`arctrm eval`."""

    checkpoint: Path | None = Field(None, json_schema_extra=FREE)
    """Checkpoint folder or file, or ORG/NAME on the Hugging Face hub; else the bundled weights."""
    bundled: bool = Field(False, json_schema_extra=FREE)
    """Use the bundled weights; excludes checkpoint."""
    submission: Path | None = None
    """Score this submission.json (or the one in this folder); no weights are loaded."""
    evaluation: solving.EvaluationConfig = solving.EvaluationConfig()
    inference: solving.InferenceConfig = solving.InferenceConfig()
    judge: solving.JudgeConfig = solving.JudgeConfig()

    def _problems(self) -> Iterator[str]:
        keys = [f"submission = {str(self.submission)!r}"] if self.submission else []
        keys += [f"checkpoint = {str(self.checkpoint)!r}"] if self.checkpoint else []
        keys += ["bundled = true"] if self.bundled else []
        keys += ["evaluation.ablate"] if self.submission and self.evaluation.ablate else []
        if len(keys) > 1:
            yield f"{keys[0]} contradicts {keys[1]}: one of them answers; leave the other out"


class SolveConfig(_Command):
    """`arctrm solve`."""

    checkpoint: Path | None = Field(None, json_schema_extra=FREE)
    """Checkpoint folder or file, or ORG/NAME on the Hugging Face hub; else the bundled weights."""
    budget: Seconds = Field(60.0, json_schema_extra=FREE)
    """Wall-clock time per task."""
    total_budget: Seconds | None = Field(None, json_schema_extra=FREE)
    """Wall-clock time of the command instead, shared by the tasks: large, unseen ones get more."""
    keep_going: bool = Field(False, json_schema_extra=FREE)
    """In a folder or file, report a bad task and leave it out."""
    max_attempts: int = Field(2, ge=1, le=16)
    """Rounds of reader and TRM of the planner; more than one where TRM's latents go back."""
    inference: solving.InferenceConfig = solving.InferenceConfig(views=32)
    judge: solving.JudgeConfig = solving.JudgeConfig()
    adaptation: solving.AdaptationConfig = solving.AdaptationConfig()

    def _problems(self) -> Iterator[str]:
        if self.total_budget is None:
            return
        if self.budget != type(self).model_fields["budget"].default:
            yield f"budget = {self.budget:g} contradicts total_budget; leave one of them out"
        if self.out is None:
            yield "total_budget: answers are kept in a folder, and none is named; give --out"


class BaselineHubConfig(model.HubConfig):
    """`[hub]` of baseline: the same keys, and no model unless one is named."""

    name: str | None = None  # type: ignore[assignment]
    """Id on the Hugging Face hub, a folder or a GGUF file; when absent, the tiny reader answers."""


class BaselineConfig(_Command):
    """`arctrm baseline`: a language model alone, its answers ranked by votes."""

    checkpoint: Path | None = None
    """Checkpoint folder of a tiny reader; the bundled weights when absent."""
    views: solving.Views = 8
    """Views of each test input that are answered and voted on."""
    attempts: solving.Views = 2
    """Grids kept of each test input, the best by votes; the first two are submitted."""
    max_new_tokens: Count = 2048
    """Bound on the tokens of an answer in plain language (hub.prompt = "chat")."""
    batch_size: int | None = Field(None, ge=1, le=10**6, json_schema_extra=FREE)
    """Prompts answered side by side, at most; by default as many as `judge.batch_size` of eval."""
    server: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1, that answers in
    plain language as the model hub.name; its key, if it wants one, is in OPENAI_API_KEY."""
    server_timeout: Seconds = Field(600.0, json_schema_extra=FREE)
    """Time for one answer of the server, before it is asked again."""
    hub: BaselineHubConfig = BaselineHubConfig()
    evaluation: solving.TaskChoiceConfig = solving.TaskChoiceConfig()

    def _problems(self) -> Iterator[str]:
        if self.checkpoint is not None and self.hub.name:
            said = f"checkpoint = '{self.checkpoint}' contradicts hub.name = {self.hub.name!r}"
            yield f"{said}: one model answers; leave one of them out"
        if self.server is not None:
            if not self.hub.name:
                yield f"server = {self.server!r} needs the name of its model; give --model"
            address = urlsplit(self.server)
            if address.scheme not in ("http", "https") or not address.hostname:
                yield f"server = {self.server!r} is no address such as http://localhost:8000/v1"
            if "@" in address.netloc:
                yield "server: has a password, which would be written; set OPENAI_API_KEY instead"
        if self.hub.prompt == "chat" and not self.hub.name:
            yield "hub.prompt = 'chat' needs a chat model; set hub.name"


COMMANDS: dict[str, type[StrictModel]] = {
    "data build": DataBuildConfig,
    "data show": DataShowConfig,
    "pretrain": PretrainConfig,
    "joint": JointConfig,
    "eval": EvalConfig,
    "baseline": BaselineConfig,
    "solve": SolveConfig,
}
"""Command -> model of its configuration."""


def commands_with(key: str) -> list[str]:
    """The commands that know this top-level key."""
    return [name for name, table in COMMANDS.items() if key in table.model_fields]
