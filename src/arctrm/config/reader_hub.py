"""`[hub]`: a reader from the Hugging Face hub or a local folder."""

from typing import Literal

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel


class HubReaderConfig(StrictModel):
    """Which causal language model reads, how it is loaded, and what of it is trained."""

    name: str = Field("meta-llama/Llama-3.2-1B", min_length=1)
    """Id on the Hugging Face hub, such as Qwen/Qwen2.5-0.5B, or a local folder."""

    revision: str | None = None
    """Branch, tag or commit of the hub id."""

    mode: Literal["frozen", "lora", "full"] = "frozen"
    """What is trained: nothing, LoRA matrices (needs the extra arctrm[peft]), or every weight."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto: bfloat16 on a GPU, float32 on a CPU and where all are trained."""

    device: str | None = None
    """Where the weights go, such as "cuda:0" or "cpu"; by default where the command computes."""

    device_map: str | None = None
    """"auto" spreads a model that is too large for one GPU over all; excludes device."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    gradient_checkpointing: bool = False
    """Keep the input of each layer instead of all activations: less memory, a third more time."""

    lora_rank: int = Field(16, ge=1)
    """Rank of the LoRA matrices."""

    lora_alpha: float = Field(32.0, gt=0)
    """LoRA's contribution is scaled by lora_alpha / lora_rank."""

    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the LoRA matrices."""

    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get LoRA, such as q_proj; empty: all but the head."""

    cells: Literal["auto", "restricted", "separated"] = "auto"
    """Token of a cell: the bare digit, the digit with the space before it, or what there is."""

    prompt: Literal["grid", "chat"] = "grid"
    """grid: tokens spelt cell by cell; chat: plain language through the chat template."""

    max_tokens: int | None = Field(None, ge=1)
    """Bound on a prompt, demonstrations are left out above it; by default what the model holds."""

    @model_validator(mode="after")
    def _one_place(self) -> "HubReaderConfig":
        if self.device is not None and self.device_map is not None:
            raise ValueError(
                f"hub.device = {self.device!r} contradicts hub.device_map = {self.device_map!r}; "
                "leave one of them out"
            )
        return self
