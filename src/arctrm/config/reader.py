"""`[reader]`: the tiny reader, a LLaMA trained from scratch on serialised grids."""

from typing import Literal

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel
from arctrm.config.scaling import ScalingConfig

PAIR_TOKENS = 2 * 30 * 31 + 3
"""Tokens of the largest pair: two 30x30 grids with row ends, start, separator, end."""


class ReaderConfig(StrictModel):
    """Size, positions and sequence form of the tiny reader."""

    hidden_size: int = Field(512, ge=16)
    """Width D."""

    num_layers: int = Field(10, ge=1)
    """Decoder layers."""

    loops: int = Field(1, ge=1)
    """Times that a token goes through all layers (a looped transformer): the arithmetic of
    num_layers x loops layers, the weights of num_layers."""

    injection: bool = False
    """Add what a token came with (cell, task, view) to its vector again before every pass through a
    layer, each time by another matrix of width x width."""

    num_heads: int = Field(8, ge=1)
    """Attention heads; hidden_size / num_heads must be a multiple of 8."""

    expansion: float = Field(8 / 3, gt=0)
    """Inner size of the MLP = expansion x hidden_size, rounded up to a multiple of 64."""

    rope_base: float = Field(100.0, gt=1)
    """Base of the 3-D rotary positions (column, row, part of the sequence)."""

    sequence: Literal["pair", "task"] = "pair"
    """pair: one input and its output per sequence; task: other pairs of the task come first."""

    max_pairs: int = Field(6, ge=1)
    """Pairs in one sequence of the form "task", the last one included."""

    max_tokens: int = Field(4096, ge=PAIR_TOKENS)
    """Tokens in one sequence of the form "task"; pairs that do not fit are left out."""

    input_attention: Literal["causal", "full"] = "causal"
    """full: the tokens of an input see all of it, what lies below and to the right, too (a prefix
    language model); needs the form "pair"."""

    output_noise: float = Field(0.0, ge=0, lt=1)
    """Share of the output cells that are shown in a random colour, in every other training
    sequence: what comes next must not hang on what was written before. Labels stay true."""

    inverse_share: float = Field(0.0, ge=0, lt=1)
    """Share of the sequences that ask for the input of a pair, given its output, while the reader
    is trained alone. It then judges grids by how well they explain the input, too
    (`reader.inverse_weight` of eval and solve); every task has a second vector for it."""

    scaling: ScalingConfig = ScalingConfig()
    """Sequences that are shown larger while the reader is trained alone."""

    mosaic_share: float = Field(0.0, ge=0, lt=1)
    """Share of the other sequences that show two pairs of their task as one, both inputs beside
    each other and both outputs likewise, while the reader is trained alone; as long as no side
    exceeds scaling.sides. Needs the form "pair"."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what each layer adds to a token's vector that is left out where the reader's own
    loss is computed, the rest enlarged to make up for it; never where grids are read or written."""

    task_embedding: bool = True
    """Add a learned vector of the task to every token."""

    gradient_checkpointing: bool = False
    """Keep the input of each layer instead of all activations while the reader is trained, alone or
    joined: less memory, a third more time."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ReaderConfig":
        step = 8 * self.num_heads
        if self.hidden_size % step:
            low, high = self.hidden_size // step * step, -(-self.hidden_size // step) * step
            raise ValueError(
                f"reader.hidden_size = {self.hidden_size} is not a multiple of 8 x "
                f"reader.num_heads = {step}; use {f'{low} or ' if low else ''}{high}"
            )
        return self

    @model_validator(mode="after")
    def _inputs_come_first(self) -> "ReaderConfig":
        if self.input_attention == "full" and self.sequence != "pair":
            raise ValueError(
                f"reader.input_attention = 'full' with reader.sequence = {self.sequence!r}: only "
                "what comes first in a sequence can be seen whole; set reader.sequence = 'pair' or "
                "reader.input_attention = 'causal'"
            )
        return self

    @model_validator(mode="after")
    def _mosaics_are_pairs(self) -> "ReaderConfig":
        if self.mosaic_share and self.sequence != "pair":
            raise ValueError(
                f"reader.mosaic_share = {self.mosaic_share} with reader.sequence = "
                f"{self.sequence!r}: only a pair that is alone in its sequence can be shown as one "
                "with another; set reader.sequence = 'pair' or reader.mosaic_share = 0"
            )
        return self

    @property
    def sees_inputs_whole(self) -> bool:
        """Whether the tokens of an input see each other."""
        return self.input_attention == "full"

    @property
    def depth(self) -> int:
        """Layers that a token goes through."""
        return self.num_layers * self.loops

    @property
    def inner_size(self) -> int:
        """Inner width of the MLP."""
        return -(-round(self.expansion * self.hidden_size) // 64) * 64

    @property
    def pairs_per_sequence(self) -> int:
        """Pairs that a sequence has room for."""
        return self.max_pairs if self.sequence == "task" else 1

    @property
    def longest_sequence(self) -> int:
        """Bound on the tokens of a sequence."""
        return self.max_tokens if self.sequence == "task" else PAIR_TOKENS
