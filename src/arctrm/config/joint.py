"""`arctrm joint`: reader, adapters and TRM trained together.

The ten keys of `JointModelConfig` are those of the older pipeline's file; each is read, and where
it says the same as a key of a table (`trm.hidden_size`, `training.optimiser.adamw_lr`), it fills
that key in. `data_path` and `epochs` need the data and are worked out when a run begins
(`training/joint_data.py`).
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from arctrm.config.base import StrictModel
from arctrm.config.data import DataConfig
from arctrm.config.reader import PAIR_TOKENS, ReaderConfig
from arctrm.config.reader_hub import HubReaderConfig
from arctrm.config.recipe import RecipeConfig
from arctrm.config.training import TrackingConfig, TrainingConfig
from arctrm.config.trm import TRMConfig
from arctrm.data.task import MAX_SIDE

TINY = "tiny"
POSITIONS = 32
"""Columns that a position of the tiny reader has room for."""


class JointModelConfig(StrictModel):
    """The keys that users of the older pipeline know."""

    data_path: str | None = None
    """Tasks to train on, instead of data.subsets: a bundled name, a file or folder of tasks, or the
    folder of a built data set. None is evaluated unless data.test_set is the same."""

    llama_model: str = TINY
    """"tiny", or a causal language model: an id on the Hugging Face hub or a local folder."""

    llama_frozen: bool = False
    """Train the adapters and TRM only; a hub model that is not frozen gets LoRA, or is trained as
    a whole with hub.mode = "full"."""

    trm_checkpoint: Path | None = None
    """Checkpoint or bundle folder that TRM starts from, and with it the adapters where it holds a
    hybrid; untrained when absent."""

    trm_hidden_size: int | None = Field(None, ge=8)
    """The same as trm.hidden_size."""

    trm_halt_max_steps: int | None = Field(None, ge=1)
    """The same as trm.halt_max_steps."""

    batch_size: int | None = Field(None, ge=2)
    """Bound on the sequences of a batch (they come in twos); by default as many as the token
    budgets hold."""

    max_attempts: int = Field(2, ge=1)
    """Rounds of reader and TRM in a training step; the second carries TRM's latents back."""

    epochs: int | None = Field(None, ge=1)
    """Length of the run in passes over the pairs: replaces training.schedule.budget and .max_steps
    by as many optimiser steps as ask for so many outputs."""

    lr: float | None = Field(None, gt=0)
    """The same as training.optimiser.adamw_lr."""


class CouplingConfig(StrictModel):
    """The three paths between reader and TRM, and the losses that train them.

    Without any path both are trained side by side and only pool their candidates.
    """

    context: bool = True
    """Reader's hidden states -> prefix slots and initial latents of TRM."""

    draft: bool = True
    """Reader's hidden state of each drafted cell -> that cell of TRM."""

    back: bool = True
    """TRM's latents -> soft prefix of the reader for the next attempt."""

    num_context_slots: int = Field(16, ge=1)
    """Prefix slots that the reader fills."""

    num_back_vectors: int = Field(4, ge=1, le=POSITIONS)
    """Vectors of the soft prefix."""

    adapter_heads: int = Field(8, ge=1)
    """Heads of the adapters' cross-attention."""

    supervision_steps: int = Field(2, ge=1)
    """Supervision steps of TRM in each attempt of a training step."""

    reader_tokens_per_batch: int = Field(16384, ge=PAIR_TOKENS + 16)
    """Tokens of the reader in one packed batch (training.tokens_per_batch: those of TRM)."""

    heard_pairs: Literal["all", "test"] = "all"
    """Pairs for which TRM hears the reader; the others TRM answers alone. test: test pairs only,
    for a reader that was trained on demonstrations alone (data.test_pair_weight = 0 in its own
    run): what it says of them is as right and as wrong as what it says of the pairs to be solved.
    Needs test pairs that are drawn."""

    draft_every: int = Field(2000, ge=1)
    """Optimiser steps between two rounds of drafting."""

    drafted_pairs: int = Field(2048, ge=1)
    """Pairs that the reader drafts anew in a round, at random among those that are drawn and
    heard."""

    draft_batch_size: int | None = Field(None, ge=1)
    """Prompts that are drafted at once; by default as many as in `arctrm eval`
    (`reader.batch_size`)."""

    draft_temperature: float = Field(1.0, ge=0)
    """Temperature at which drafts are sampled; 0 = greedy."""

    no_draft_share: float = Field(0.1, ge=0, le=1)
    """Share of rows that are shown no draft, so that TRM also answers without one."""

    right_draft_share: float = Field(0.2, ge=0, le=1)
    """Of the rows whose draft is right, the share that is shown it. The reader knows most training
    pairs by heart, but not test pairs: shown every draft, TRM would learn to copy."""

    trm_weight: float = Field(1.0, ge=0)
    """Weight of TRM's loss."""

    reader_weight: float = Field(1.0, ge=0)
    """Weight of the reader's own loss on output tokens."""

    contrast_weight: float = Field(0.05, ge=0)
    """Weight of the loss that keeps the contexts of different tasks apart."""


class JointConfig(JointModelConfig):
    """`arctrm joint`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    out: Path | None = None
    """Run folder."""
    reader_checkpoint: Path | None = None
    """Checkpoint or bundle folder that the reader starts from: of a tiny reader or a hybrid, whose
    LoRA a hub reader takes over."""
    ensemble_checkpoints: tuple[Path, ...] = ()
    """Checkpoint or bundle folders of more tiny readers, of the same sizes: all of them propose and
    judge. They are not trained here, and TRM hears the first reader only."""
    new_adapters: bool = False
    """Leave the adapters of trm_checkpoint where they are and train new ones: for a reader of
    another width than theirs."""
    data: DataConfig = DataConfig()
    trm: TRMConfig = TRMConfig()
    reader: ReaderConfig = ReaderConfig()
    """The tiny reader; sequence, max_pairs and max_tokens also say what a hub model is shown."""
    hub: HubReaderConfig = HubReaderConfig()
    coupling: CouplingConfig = CouplingConfig()
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig(project="arc-hybrid-joint")
    recipe: RecipeConfig = RecipeConfig()

    @model_validator(mode="after")
    def _spread_known_keys(self) -> "JointConfig":
        """Write the older names into the tables that mean the same."""
        for name, path in KNOWN_KEYS.items():
            value = getattr(self, name)
            if value is not None:
                self.__dict__[path[0]] = _with(getattr(self, path[0]), path, 1, value, name)
        return self

    @model_validator(mode="after")
    def _choose_reader(self) -> "JointConfig":
        """`llama_model` names the hub reader; `llama_frozen` and `hub.mode` say what is trained."""
        if self.llama_model == TINY:
            if self.hub != HubReaderConfig():
                raise ValueError(
                    f"llama_model = 'tiny' contradicts the table hub (hub.name = "
                    f"{self.hub.name!r}); set llama_model to the name of the model, or leave hub "
                    "out"
                )
            return self
        if self.ensemble_checkpoints:
            raise ValueError(
                f"ensemble_checkpoints with llama_model = {self.llama_model!r}: an ensemble is of "
                "tiny readers; leave ensemble_checkpoints out"
            )
        if self.reader.sees_inputs_whole:
            raise ValueError(
                f"reader.input_attention = 'full' with llama_model = {self.llama_model!r}: a model "
                "of the hub keeps its own attention; leave reader.input_attention out"
            )
        if self.reader.inverse_share:
            raise ValueError(
                f"reader.inverse_share = {self.reader.inverse_share} with llama_model = "
                f"{self.llama_model!r}: the tiny reader alone learns inverse tasks; leave "
                "reader.inverse_share out"
            )
        if self.reader.gradient_checkpointing:
            raise ValueError(
                f"reader.gradient_checkpointing = true with llama_model = {self.llama_model!r}: "
                "that is of the tiny reader; set hub.gradient_checkpointing = true"
            )
        hub = _with(self.hub, ("hub", "name"), 1, self.llama_model, "llama_model")
        assert isinstance(hub, HubReaderConfig)
        mode = "frozen" if self.llama_frozen else "lora"
        if "mode" in hub.model_fields_set:
            mode = hub.mode
        frozen = mode == "frozen"
        if "llama_frozen" in self.model_fields_set and frozen != self.llama_frozen:
            raise ValueError(
                f"llama_frozen = {str(self.llama_frozen).lower()} contradicts hub.mode = "
                f"{hub.mode!r}; leave one of them out"
            )
        self.__dict__["llama_frozen"] = frozen
        self.__dict__["hub"] = hub.model_copy(update={"mode": mode})
        return self

    @model_validator(mode="after")
    def _hub_reader_can_be_trained(self) -> "JointConfig":
        hub = self.hub
        if hub.mode == "full" and hub.dtype not in ("auto", "float32"):
            raise ValueError(
                f"hub.dtype = {hub.dtype!r} with hub.mode = 'full': trained weights are float32; "
                "set hub.dtype = 'float32' or hub.mode = 'lora'"
            )
        if hub.mode != "frozen" and hub.device_map is not None:
            raise ValueError(
                f"hub.device_map = {hub.device_map!r} with hub.mode = {hub.mode!r}: what is "
                "trained must be on one device; leave hub.device_map out or set llama_frozen = true"
            )
        return self

    @model_validator(mode="after")
    def _recipe_fits(self) -> "JointConfig":
        """What a stage of the recipe trains must not come from somewhere else."""
        recipe = self.recipe
        if not recipe.is_given:
            return self
        if recipe.reader and recipe.readers > 1 and self.ensemble_checkpoints:
            raise ValueError(
                f"ensemble_checkpoints contradicts recipe.readers = {recipe.readers}, which trains "
                "the ensemble from scratch; leave one of them out"
            )
        if self.epochs is not None:
            raise ValueError(
                f"epochs = {self.epochs} contradicts the length of the recipe (recipe.budget or "
                "recipe.max_steps); leave one of them out"
            )
        if recipe.reader and self.llama_model != TINY:
            raise ValueError(
                f"recipe.reader = {recipe.reader} trains the tiny reader, but llama_model = "
                f"{self.llama_model!r}; set recipe.reader = 0"
            )
        for name in ("reader", "trm"):
            share, checkpoint = getattr(recipe, name), getattr(self, f"{name}_checkpoint")
            if share and checkpoint is not None:
                raise ValueError(
                    f"{name}_checkpoint = {str(checkpoint)!r} contradicts recipe.{name} = {share}, "
                    "which trains that part from scratch; leave the checkpoint out, or set the "
                    "share to 0"
                )
        return self

    @model_validator(mode="after")
    def _inverse_tasks_are_learned(self) -> "JointConfig":
        """Joint training asks for outputs only: a reader that it begins with knows no inputs."""
        learned = self.recipe.is_given and self.recipe.reader > 0
        if self.reader.inverse_share and not learned and self.reader_checkpoint is None:
            raise ValueError(
                f"reader.inverse_share = {self.reader.inverse_share}: inverse tasks are learned "
                "where the tiny reader is trained alone, and here it is not; give a recipe with a "
                "stage for the reader (recipe.budget, recipe.reader) or a reader_checkpoint, or "
                "set reader.inverse_share = 0"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "JointConfig":
        width, heads = self.trm.hidden_size, self.coupling.adapter_heads
        if width % heads:
            raise ValueError(
                f"coupling.adapter_heads = {heads} does not divide trm.hidden_size = {width}; use "
                f"{next(n for n in range(heads, 0, -1) if width % n == 0)}"
            )
        return self

    @model_validator(mode="after")
    def _two_sequences_fit(self) -> "JointConfig":
        """Sequences come in twos: a two that exceeds a budget would never be trained on."""
        coupling, pairs = self.coupling, self.reader.pairs_per_sequence
        slots = self.trm.num_prefix_slots + coupling.num_context_slots * coupling.context
        for key, budget, one in (
            (
                "training.tokens_per_batch",
                self.training.tokens_per_batch,
                pairs * (slots + MAX_SIDE * MAX_SIDE),
            ),
            (
                "coupling.reader_tokens_per_batch",
                coupling.reader_tokens_per_batch,
                self.reader.longest_sequence + coupling.num_back_vectors * coupling.back,
            ),
        ):
            if budget < 2 * one:
                lower = ", or lower reader.max_pairs and reader.max_tokens" if pairs > 1 else ""
                raise ValueError(
                    f"{key} = {budget} holds no two sequences of the largest grids "
                    f"(reader.sequence = {self.reader.sequence!r}: {one} tokens each); use "
                    f"{2 * one} or more{lower}"
                )
        return self

    @model_validator(mode="after")
    def _contexts_have_slots(self) -> "JointConfig":
        if self.trm.layout != "compact" or self.trm.task_embedding != "shared":
            raise ValueError(
                f"trm.layout = {self.trm.layout!r} with trm.task_embedding = "
                f"{self.trm.task_embedding!r} cannot be joined to a reader; use 'compact' with "
                "'shared'"
            )
        return self


KNOWN_KEYS = {
    "trm_hidden_size": ("trm", "hidden_size"),
    "trm_halt_max_steps": ("trm", "halt_max_steps"),
    "lr": ("training", "optimiser", "adamw_lr"),
}
"""Older key -> the key that means the same."""


def _with(
    table: StrictModel, path: tuple[str, ...], depth: int, value: Any, name: str
) -> StrictModel:
    """A copy of the table with `value` at `path`; an explicit other value is a contradiction."""
    key = path[depth]
    now = getattr(table, key)
    if isinstance(now, StrictModel):
        new: Any = _with(now, path, depth + 1, value, name)
    elif key in table.model_fields_set and now != value:
        raise ValueError(
            f"{name} = {value} contradicts {'.'.join(path)} = {now}; leave one of them out"
        )
    else:
        new = value
    try:
        type(table).model_validate({**dict(table), key: new})  # a copy alone is not checked
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(str(problem.get("ctx", {}).get("error", problem["msg"]))) from None
    return table.model_copy(update={key: new})
