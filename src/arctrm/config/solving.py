"""`[inference]`, `[judge]`, `[adaptation]`, `[evaluation]`: how tasks are answered and scored."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from arctrm.config.base import FREE, Count, Names, Number, Rate, Share, StrictModel, Weight

Ablation = Literal["no-reader", "no-trm", "no-coupling", "other-context"]
"""What `eval` can leave out or mix up."""


Views = Annotated[int, Field(ge=1, le=10**6)]


def _names(value: object) -> object:
    """Names with commas between them are split, and every name comes once."""
    if isinstance(value, list | tuple):
        value = tuple(dict.fromkeys(n.strip() for item in value for n in str(item).split(",")))
    return value


class InferenceConfig(StrictModel):
    """How candidates are produced from a checkpoint."""

    views: Views = 64
    """Views of each test input that are answered and voted on."""
    trm_views: Views = 16
    """Of these, views that TRM answers beside a reader, from hidden cells and from its draft."""
    invariant_weight: Weight = 1.5
    """How much it counts against a grid that it breaks what all demonstrations keep; 0: nothing."""
    steps: int | None = Field(None, ge=1, le=4096)
    """Supervision steps of TRM's answers; by default trm.halt_max_steps of the checkpoint."""
    tokens_per_batch: int | None = Field(None, ge=1024, le=2**24, json_schema_extra=FREE)
    """Tokens of TRM in one batch; by default 131072 on a GPU (hub reader: 8192), 1024 on a CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the layers; auto: bfloat16 on a GPU (float16 below compute capability 8) and on
    a CPU that is faster in it; adaptation is in float32 where this is float16."""
    llama_model: str | None = Field(None, min_length=1)
    """Where the hub reader of a checkpoint is now, if not where it was in training."""
    trust_remote_code: bool = False
    """Run Python code that comes with that model."""


class JudgeConfig(StrictModel):
    """How the reader writes grids side by side, and how it judges the candidates of all voices."""

    batch_size: int | None = Field(None, ge=1, le=10**6, json_schema_extra=FREE)
    """Prompts decoded at once; by default up to 4096 on a GPU and 16 on a CPU, of a hub model 256
    and 8."""
    scored_candidates: Views = 8
    """Grids of each test input, the best by votes, that the reader scores."""
    scoring_views: Views = 8
    """Views under which a candidate is scored."""
    inverse_weight: Weight = 0.2
    """Weight of log p(input | candidate), after training with `reader.inverse_share`."""
    inverse_candidates: Views = 5
    """Grids of each test input, the best by the reader, whose input is asked for."""


class AdaptationConfig(StrictModel):
    """Test-time training of the reader on a task's own demonstrations: many short steps."""

    enabled: bool = True
    """Adapt before answering."""
    kind: Literal["muon", "adamw"] = "adamw"
    """muon: Muon on the matrices of the layers + AdamW; adamw: AdamW on all, in half the time."""
    muon_lr: Rate = 1e-3
    """Learning rate of Muon."""
    adamw_lr: Rate = 1e-4
    """Learning rate of AdamW."""
    tokens_per_batch: int | None = Field(None, ge=256, le=2**24)
    """Tokens in one packed batch; by default 1024 on a GPU and 256 on a CPU."""
    max_steps: Count = 2000
    """Bound on optimiser steps before and after the probe each, whatever the budget."""
    share: Share = 0.6
    """Share of the time after the first answer that goes into adaptation; the rest answers."""
    known_share: Share = 0.0
    """The same for a task whose demonstrations the model was trained on."""


class TaskChoiceConfig(StrictModel):
    """Which tasks are answered and scored."""

    test_set: str = "evaluation"
    """Bundled name or path of the tasks to answer."""
    tasks: Names = Field((), json_schema_extra=FREE)
    """Only these task ids; empty = all."""
    max_tasks: Count | None = Field(None, json_schema_extra=FREE)
    """Only the first tasks by id."""
    held_out: Number = 0
    """Only the tasks that `data.held_out` of the same number kept the test pairs of; 0 = all."""
    solutions: str | None = Field(None, json_schema_extra=FREE)
    """Kaggle solutions file, when the tasks come without answers."""


class EvaluationConfig(TaskChoiceConfig):
    """Which tasks `eval` answers and scores, and what is left out in further rows."""

    ablate: Annotated[tuple[Ablation, ...], BeforeValidator(_names)] = Field(
        (), json_schema_extra=FREE
    )
    """Score again with one thing left out, each in turn; no-coupling: TRM begins without drafts;
    other-context: TRM hears what a hub model reads of another task."""
    keep_candidates: bool = Field(False, json_schema_extra=FREE)
    """Write candidates.json.gz, too: every proposed grid with its voice, views and scores."""
