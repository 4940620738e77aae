"""`[reader]` of eval, solve and baseline: how a reader decodes grids and scores candidates."""

from typing import Literal

from pydantic import Field

from arctrm.config.base import StrictModel


class DecodingConfig(StrictModel):
    """Decoding and scoring with a reader."""

    batch_size: int | None = Field(None, ge=1)
    """Prompts decoded side by side, at most; by default 4096 on a GPU (fewer where memory has no
    room, 512 in float32 or with min_probability) and 16 on a CPU, 8 by a hub model."""

    min_probability: float = Field(0.0, ge=0, lt=1)
    """Propose every grid at least this likely beside the greedy one; 0 = the greedy one alone."""

    rank: Literal["votes", "experts"] = "votes"
    """votes: by the share of views that propose a grid; experts: by the reader's log-probability
    of it, summed over views."""

    scored_candidates: int = Field(8, ge=1)
    """Grids of each test input, the best by votes, that are scored."""

    scoring_views: int = Field(8, ge=1)
    """Views under which a candidate is scored."""


class JudgingConfig(DecodingConfig):
    """Of eval and solve: what a reader says of candidates the other way round, too."""

    rank: Literal["votes", "experts"] = "experts"
    """votes: by the share of views that propose a grid; experts: by the reader's log-probability
    of it, summed over views."""

    inverse_weight: float = Field(0.2, ge=0)
    """experts, of a reader that was trained on inverse tasks, too (`reader.inverse_share`): weight
    of the log-probability of the input, given a candidate; 0: it is not asked."""

    inverse_candidates: int = Field(5, ge=1)
    """Grids of each test input, the best by the reader, about which it is so asked."""
