"""`[trm]`: the Tiny Recursive Model (arXiv 2510.04871)."""

from typing import Literal

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel
from arctrm.config.scaling import ScalingConfig


class TRMConfig(StrictModel):
    """Size, recursion, layout and task embedding of TRM."""

    layout: Literal["compact", "reference"] = "compact"
    """compact: canvas cropped to the pair, packed, 2-D RoPE; reference: 30x30, 1-D RoPE."""

    hidden_size: int = Field(512, ge=8)
    """Width D of the latents."""

    num_heads: int = Field(8, ge=1)
    """Attention heads; hidden_size / num_heads must be a multiple of 4."""

    num_layers: int = Field(2, ge=1)
    """Blocks in the one network that is applied recursively."""

    expansion: float = Field(4.0, gt=0)
    """SwiGLU: inner size = 2/3 x expansion x hidden_size, rounded up to a multiple of 256."""

    H_cycles: int = Field(3, ge=1)
    """Updates of the answer latent z_H in a supervision step (only the last has a gradient)."""

    L_cycles: int = Field(4, ge=1)
    """Updates of the reasoning latent z_L before each update of z_H."""

    num_prefix_slots: int = Field(8, ge=3)
    """Slots TRM attends to beside the canvas: task embedding, dihedral code, colour flag, rest."""

    num_context_slots: int = Field(0, ge=0)
    """Slots beside those, filled by what a reader says of the task (zero without a reader)."""

    rope_base: float = Field(100.0, gt=1)
    """Base of the rotary positions (the reference uses 10000)."""

    qk_norm: bool = True
    """RMS-normalise queries and keys (the reference does not)."""

    stablemax: bool = False
    """Stablemax cross entropy as in the reference, instead of softmax."""

    halt_max_steps: int = Field(16, ge=1)
    """Supervision steps after which a row is replaced in training, and run in evaluation."""

    halt_exploration_prob: float = Field(0.1, ge=0, le=1)
    """Probability that a row must run a random number of steps before it may halt."""

    task_embedding: Literal["shared", "per_view"] = "shared"
    """One embedding per task with an explicit dihedral code, or one per (task, view)."""

    task_embedding_init: Literal["zero", "mean"] = "zero"
    """Start of the embeddings: zero, or all at one shared random vector (their mean)."""

    condition_cells: bool = True
    """Add task embedding, dihedral code and colour flag to every cell too (compact layout)."""

    scaling: ScalingConfig = ScalingConfig()
    """Rows that are shown larger while TRM is trained alone (compact layout, shared embeddings)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "TRMConfig":
        step = 4 * self.num_heads
        if self.hidden_size % step:
            low, high = self.hidden_size // step * step, -(-self.hidden_size // step) * step
            raise ValueError(
                f"trm.hidden_size = {self.hidden_size} is not a multiple of 4 x trm.num_heads = "
                f"{step}; use {f'{low} or ' if low else ''}{high}"
            )
        return self

    @model_validator(mode="after")
    def _reference_has_no_cell_conditioning(self) -> "TRMConfig":
        if self.layout == "reference" and self.condition_cells:
            raise ValueError(
                "trm.condition_cells = true contradicts trm.layout = 'reference'; "
                "set trm.condition_cells = false or trm.layout = 'compact'"
            )
        return self

    @model_validator(mode="after")
    def _scale_can_be_told(self) -> "TRMConfig":
        if self.scaling.share and (self.layout, self.task_embedding) != ("compact", "shared"):
            raise ValueError(
                f"trm.scaling.share = {self.scaling.share} with trm.layout = {self.layout!r} and "
                f"trm.task_embedding = {self.task_embedding!r}: TRM could not be told of it; set "
                "trm.scaling.share = 0, or trm.layout = 'compact' and trm.task_embedding = 'shared'"
            )
        return self

    @property
    def num_slots(self) -> int:
        """All slots before the cells of a row."""
        return self.num_prefix_slots + self.num_context_slots

    @property
    def inner_size(self) -> int:
        """Inner width of the SwiGLU MLP."""
        return -(-round(self.expansion * self.hidden_size * 2 / 3) // 256) * 256
