"""`arctrm baseline`: a language model alone."""

from pathlib import Path

from pydantic import Field, model_validator

from arctrm.config.base import StrictModel
from arctrm.config.decoding import DecodingConfig
from arctrm.config.reader_hub import HubReaderConfig
from arctrm.config.solving import TaskChoiceConfig


class BaselineHubConfig(HubReaderConfig):
    """`[hub]` of baseline: the same keys, and no model unless one is named."""

    name: str | None = None  # type: ignore[assignment]
    """Id on the Hugging Face hub, such as Qwen/Qwen2.5-0.5B, or a local folder; when absent, the
    tiny reader of a checkpoint answers."""


class BaselineConfig(StrictModel):
    """`arctrm baseline`."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random."""
    out: Path | None = None
    """results.json, or a folder for it; submission.json is written beside it."""
    checkpoint: Path | None = None
    """Checkpoint folder of a tiny reader; the bundled weights when absent."""
    views: int = Field(8, ge=1)
    """Views of each test input that are answered and voted on."""
    attempts: int = Field(2, ge=1)
    """Grids kept of each test input, the best by vote; the first two are submitted."""
    max_new_tokens: int = Field(2048, ge=1)
    """Bound on the tokens of an answer in plain language (hub.prompt = "chat")."""
    hub: BaselineHubConfig = BaselineHubConfig()
    evaluation: TaskChoiceConfig = TaskChoiceConfig()
    reader: DecodingConfig = DecodingConfig()

    @model_validator(mode="after")
    def _one_model(self) -> "BaselineConfig":
        if self.checkpoint is not None and self.hub.name:
            raise ValueError(
                f"checkpoint = '{self.checkpoint}' contradicts hub.name = {self.hub.name!r}: one "
                "model answers; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _chat_is_free_text(self) -> "BaselineConfig":
        if self.hub.prompt != "chat":
            return self
        if not self.hub.name:
            raise ValueError(
                "hub.prompt = 'chat' needs a chat model, and the tiny reader is none; set hub.name "
                "or hub.prompt = 'grid'"
            )
        for key, free in (("min_probability", 0.0), ("rank", "votes")):
            value = getattr(self.reader, key)
            if value != free:
                raise ValueError(
                    f"reader.{key} = {value!r} contradicts hub.prompt = 'chat', whose answers are "
                    f"free text without probabilities of grids; set reader.{key} = {free!r} or "
                    "hub.prompt = 'grid'"
                )
        return self
