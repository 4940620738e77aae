"""`[evaluation]` and `[solving]`: inference, vote, adaptation, budget."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel
from arctrm.config.training import Seconds

Ablation = Literal[
    "no-reader",
    "no-trm",
    "no-coupling",
    "no-ensemble",
    "swap-context",
    "no-draft",
    "no-adaptation",
]
"""What `eval` can leave out."""


class InferenceConfig(StrictModel):
    """How candidates are produced from a checkpoint."""

    views: int = Field(64, ge=1)
    """Views of each test input that are answered and voted on."""

    invariant_weight: float = Field(1.5, ge=0)
    """How much it counts against a grid that it breaks what all demonstrations keep, such as the
    number of cells of a colour, beside its place in the ranking; 0: it is not looked at."""

    steps: int | None = Field(None, ge=1)
    """Supervision steps per view; by default trm.halt_max_steps of the checkpoint."""

    halt: bool = False
    """Answer with the first step whose halting logit is positive, not with the last: fewer steps,
    other answers."""

    tokens_per_batch: int | None = Field(None, ge=1024)
    """Tokens in one packed batch; by default 131072 on a GPU (8192 with a hub reader) and 1024 on a
    CPU."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the blocks; auto: bfloat16 on a GPU and on a CPU that is faster in it, else
    float32. A hub reader on a CPU keeps hub.dtype where this is auto."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks; auto: on a GPU only."""

    llama_model: str | None = Field(None, min_length=1)
    """Where the hub reader of a hybrid is now: an id on the Hugging Face hub or a local folder; by
    default where the checkpoint was trained with it."""

    trust_remote_code: bool = False
    """Run Python code that comes with that model."""

    blank_task_embedding: bool = False
    """Ablation: answer with a blank task embedding."""


class LearningConfig(StrictModel):
    """Rates and batch of test-time training on the demonstrations of tasks."""

    parts: Literal["all", "reader"] = "all"
    """What learns: everything that answers, or of a reader and a TRM the reader only."""

    kind: Literal["muon", "adamw"] = "muon"
    """muon: Muon on block matrices + AdamW; adamw: AdamW on all."""

    muon_lr: float = Field(1e-3, gt=0)
    """Learning rate of Muon on the block matrices."""

    adamw_lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW on everything else, or on all."""

    tokens_per_batch: int | None = Field(None, ge=256)
    """Tokens in one packed batch; by default on a GPU 1024 for each task and at most 16384 for
    several (8192 with a hub reader), on a CPU 256 for each and at most 1024."""

    halt_max_steps: int = Field(3, ge=1)
    """Supervision steps before a row is replaced."""


class AdaptationConfig(LearningConfig):
    """Test-time training on a task's own demonstrations: many short steps (LOG.md)."""

    parts: Literal["all", "reader"] = "reader"
    """As above; a step of both takes four times as long."""

    kind: Literal["muon", "adamw"] = "adamw"
    """As above; Newton-Schulz alone takes a CPU twice as long as such a step of AdamW."""

    adamw_lr: float = Field(1e-4, gt=0)
    """As above."""

    enabled: bool = True
    """Adapt before answering."""

    max_steps: int = Field(2000, ge=1)
    """Bound on optimiser steps before and after the probe each, whatever the budget."""

    share: float = Field(0.6, ge=0, le=1)
    """Share of the time after the first answer that goes into adaptation; the rest answers."""

    known_share: float = Field(0.0, ge=0, le=1)
    """The same for a task whose demonstrations the model was trained on."""


class TaskChoiceConfig(StrictModel):
    """Which tasks are answered and scored."""

    test_set: str = "evaluation"
    """Bundled name or path of the tasks to answer."""

    tasks: tuple[str, ...] = ()
    """Only these task ids; empty = all."""

    max_tasks: int | None = Field(None, ge=1)
    """Only the first tasks by id."""

    held_out: int = Field(0, ge=0)
    """Only the tasks that `data.held_out` of the same number kept the test pairs of; 0 = all."""

    solutions: str | None = None
    """Kaggle solutions file, when the tasks come without answers."""


class EvaluationConfig(TaskChoiceConfig):
    """Which tasks `eval` answers and scores, adapted to or not, with what left out."""

    alternatives: ClassVar = (("adapt_steps", "adapt_budget"),)

    adapt_steps: int = Field(0, ge=0)
    """Optimiser steps on the demonstrations of all evaluated tasks, side by side in one job, before
    they are answered; 0 = none."""

    adapt_budget: Seconds | None = None
    """Wall-clock time of that job, such as "60s", instead of its steps."""

    ablate: tuple[Ablation, ...] = ()
    """Score again with one thing left out, each in turn: of a hybrid, or of an evaluation that
    adapts."""

    keep_candidates: bool = False
    """Write candidates.json.gz, too: every grid that was proposed, by whom, under which views, and
    what the reader finds of it."""

    @property
    def adapts(self) -> bool:
        """Whether the tasks are adapted to before they are answered."""
        return self.adapt_steps > 0 or self.adapt_budget is not None

    @property
    def adapted_for(self) -> str:
        """The key that says for how long, with its value."""
        if self.adapt_budget is not None:
            return f"adapt_budget = {self.adapt_budget}"
        return f"adapt_steps = {self.adapt_steps}"

    @model_validator(mode="after")
    def _one_length(self) -> "EvaluationConfig":
        if self.adapt_steps and self.adapt_budget is not None:
            raise ValueError(
                f"evaluation.adapt_steps = {self.adapt_steps} and evaluation.adapt_budget = "
                f"{self.adapt_budget} contradict each other; give one of the two"
            )
        return self

    @model_validator(mode="after")
    def _something_to_leave_out(self) -> "EvaluationConfig":
        if "no-adaptation" in self.ablate and not self.adapts:
            raise ValueError(
                "evaluation.ablate names 'no-adaptation', but nothing is adapted to; set "
                "evaluation.adapt_steps or evaluation.adapt_budget, or leave that row out"
            )
        return self
