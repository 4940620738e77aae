"""The models: `[trunk]` with its two voices `[reader]` and `[trm]`, `[hub]`, `[coupling]`."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from arctrm.config.base import FREE, Count, Names, Part, Share, StrictModel, Weight

TINY = "tiny"
"""`llama_model` of a reader on the trunk of this package."""
MAX_DEPTH = 1024  # layers that a token goes through
PAIR_TOKENS = 2 * 30 * 31 + 3
"""Tokens of the largest pair: two 30x30 grids with row ends, start, separator, end."""


class TrunkConfig(StrictModel):
    """Size of the looped LLaMA that reader and TRM share."""

    hidden_size: int = Field(512, ge=16, le=16384)
    """Width D."""
    num_layers: int = Field(4, ge=1, le=256)
    """Decoder layers with weights of their own."""
    loops: int = Field(3, ge=1, le=256)
    """Times that a token goes through all layers (a looped transformer)."""
    injection: bool = True
    """Add a token's embedding again before every layer, each time by another matrix."""
    own_layers: int = Field(0, ge=0, le=256)
    """Layers of TRM's own, which take the place of the last ones in its passes."""
    num_heads: int = Field(8, ge=1, le=1024)
    """Attention heads; hidden_size / num_heads must be a multiple of 8."""
    expansion: float = Field(8 / 3, gt=0, le=64)
    """Inner size of the MLP = expansion x hidden_size, rounded up to a multiple of 64."""
    rope_base: float = Field(100.0, gt=1, le=1e9)
    """Base of the 3-D rotary positions (column, row, part of the sequence)."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=FREE)
    """Keep only the input of each layer in training: less memory, a third more time."""

    def _problems(self) -> Iterator[str]:
        if self.own_layers > self.num_layers:
            said = f"trunk.own_layers = {self.own_layers} is more than trunk.num_layers"
            yield f"{said} = {self.num_layers}; use {self.num_layers} or less"
        step = 8 * self.num_heads
        if self.hidden_size % step:
            said = f"trunk.hidden_size = {self.hidden_size} is not a multiple of 8 x"
            yield f"{said} trunk.num_heads = {step}; use {-(-self.hidden_size // step) * step}"
        if self.depth > MAX_DEPTH:
            said = f"trunk.num_layers = {self.num_layers} x trunk.loops = {self.loops}"
            yield f"{said} is {self.depth} layers; use at most {MAX_DEPTH}"

    @property
    def depth(self) -> int:
        """Layers that a token goes through."""
        return self.num_layers * self.loops

    @property
    def inner_size(self) -> int:
        """Inner width of the MLP."""
        return -(-round(self.expansion * self.hidden_size) // 64) * 64


class ReaderConfig(StrictModel):
    """How the reader's voice of the trunk is trained."""

    output_noise: Part = 0.0
    """Share of the output cells shown in a random colour, in every other training sequence."""
    inverse_share: Part = 0.0
    """Share of the sequences that ask for a pair's input, given its output (`judge.inverse_*`)."""


class TRMConfig(StrictModel):
    """How TRM's voice of the trunk is trained, and for how many supervision steps it answers."""

    share: float = Field(0.5, gt=0, lt=1)
    """Share of training.tokens_per_batch for TRM beside the tiny reader; all beside a hub one."""
    begin: Part = 0.0
    """Fraction of the run from which both voices are trained; before it the reader alone."""
    supervision_steps: int = Field(1, ge=1, le=64)
    """Supervision steps of a training step, with a loss after each and no gradient between them.
    With one, steps of an answer pass on the answer only; with more, the states, too."""
    halt_max_steps: int = Field(8, ge=1, le=4096)
    """Supervision steps of an answer."""
    hidden_whole: Share = 0.25
    """Share of the training rows whose answer is hidden as a whole; of others some cells are."""
    noise: Part = 0.1
    """Share of the shown answer cells that are wrong, in every other training row."""
    draft_share: Share = 0.0
    """Share of the training rows that begin with a draft of the reader; needs both voices."""
    aligned: bool = True
    """Begin a row with a draft from the reader's states of the drafted cells."""
    draft_every: Count = 300
    """Optimiser steps between two rounds of drafting."""
    drafted_pairs: Count = 2048
    """Pairs that the reader drafts anew in a round."""
    draft_temperature: float = Field(0.5, ge=0, le=100)
    """Temperature at which drafts are sampled; 0 = greedy."""


class HubConfig(StrictModel):
    """Which causal language model reads, how it is loaded, and what of it is trained."""

    name: str = Field("meta-llama/Llama-3.2-1B", min_length=1)
    """Id on the Hugging Face hub, a folder or a GGUF file; in joint, llama_model says the same."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    mode: Literal["frozen", "lora", "full"] = "frozen"
    """What is trained: nothing, LoRA matrices (needs the extra arctrm[peft]), or all layers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto: bfloat16 on a newer GPU, else float32, as where all are trained."""
    device: str | None = Field(None, json_schema_extra=FREE)
    """Where the weights go, such as "cuda:0" or "cpu"; by default where the command computes."""
    device_map: str | None = Field(None, json_schema_extra=FREE)
    """"auto" spreads a model that is too large for one GPU over all; excludes device."""
    sharded: bool = Field(False, json_schema_extra=FREE)
    """In training the processes share the layers' weights, gradients and moments (FSDP)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=FREE)
    """Keep the input of each layer instead of all activations: less memory, a third more time."""
    lora_rank: int = Field(16, ge=1, le=4096)
    """Rank of the LoRA matrices."""
    lora_alpha: float = Field(32.0, gt=0, le=1e6)
    """LoRA's contribution is scaled by lora_alpha / lora_rank."""
    lora_dropout: Part = 0.0
    """Dropout before the LoRA matrices."""
    lora_targets: Names = ()
    """Names of the linear layers that get LoRA, such as q_proj; empty: all but the head."""
    prompt: Literal["grid", "chat"] = "grid"
    """grid: tokens spelt cell by cell; chat: plain language through the chat template."""
    max_pairs: int = Field(6, ge=1, le=64)
    """Pairs of a training sequence, the asked one included."""
    max_tokens: int | None = Field(None, ge=1, le=10**7)
    """Bound on the tokens of a sequence; by default 4096 in training, else what the model holds."""

    def _problems(self) -> Iterator[str]:
        of_map, of_mode = f"hub.device_map = {self.device_map!r}", f"hub.mode = {self.mode!r}"
        if self.device and self.device_map:
            yield f"hub.device = {self.device!r} contradicts {of_map}; leave one of them out"
        if self.mode == "full" and self.dtype not in ("auto", "float32"):
            yield f"hub.dtype = {self.dtype!r} with {of_mode}: trained weights must be float32"
        if self.mode != "frozen" and self.device_map:
            yield f"{of_map} with {of_mode}: a model that is trained must be on one device"

    @property
    def training_tokens(self) -> int:
        """Bound on the tokens of a training sequence."""
        return self.max_tokens or 4096


class CouplingConfig(StrictModel):
    """The paths between a hub reader and TRM, and their losses; the tiny reader needs none."""

    context: bool = True
    """Reader's hidden states -> TRM's first z_H and z_L, and its context slots."""
    aligned: bool = True
    """Reader's hidden state of each drafted cell -> that cell of TRM."""
    back: bool = False
    """TRM's latents -> soft prefix of the reader for the next attempt."""
    num_context_slots: int = Field(16, ge=1, le=1024)
    """Vectors of the context; TRM adds their mean to every token of the question."""
    num_back_vectors: int = Field(4, ge=1, le=32)
    """Vectors of the soft prefix."""
    adapter_heads: int = Field(8, ge=1, le=1024)
    """Heads of the adapters' cross-attention; divides trunk.hidden_size."""
    trm_weight: Weight = 1.0
    """Weight of TRM's loss."""
    reader_weight: Weight = 1.0
    """Weight of the reader's own loss on output tokens."""
    reader_tokens_per_batch: int = Field(16384, ge=64, le=2**24)
    """Tokens of the hub reader in one packed batch (training.tokens_per_batch: those of TRM)."""
