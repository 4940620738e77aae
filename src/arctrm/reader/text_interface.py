"""What a latent and new text are, and what is asked of a reader to give them.

Legend: B texts, S tokens, P prefix vectors, N new tokens, D width of the reader, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import StaticCache

from arctrm.reader.interface import Prompt


class TextReader(Protocol):
    """What is asked of a reader besides reading grids: to tokenise, embed and run text."""

    name: str

    @property
    def model(self) -> nn.Module:
        """Holds the weights."""

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def max_tokens(self) -> int:
        """Tokens that the model can hold: prompt, prefix and new ones together."""

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a text."""

    def new_cache(self, length: int) -> StaticCache:
        """An empty cache for `length` tokens, padding included."""

    def text_prompt(self, text: str) -> Prompt:
        """A text as tokens; `output_start` is the position of what follows it."""

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, without special ones."""

    def positions_after(self, start_B: Tensor, tokens_BN: Tensor, num_prefix: int) -> Tensor:
        """Positions int64 [B, P + N] of a prefix and the new tokens after it."""

    def embed(self, tokens_BS: Tensor, condition_B3: Tensor) -> Tensor:
        """Embeddings [B, S, D]."""

    def run(
        self,
        inputs: Tensor,
        positions_BS: Tensor,
        attention_mask: Tensor,
        cache: StaticCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, float32 [B, S, D], of embeddings [B, S, D]."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [..., V]."""

    def train(self, mode: bool = True) -> Any:
        """Training mode, where the reader is trained."""


@dataclass(frozen=True, eq=False)
class LatentOutput:
    """What `generate_latent` gives; unpacks as `z_init, text`.

    A list of texts was given: `z_init` is [B, D] and the other fields are lists.
    """

    z_init: Tensor
    """float32 [D] or [B, D]: the hidden state of the last token read, see `generate_latent`."""
    text: str | list[str]
    """New text only."""
    prompt_tokens: int | list[int]
    """Tokens of the problem text."""
    new_tokens: int | list[int]
    """Tokens of the new text, without the one that ended it."""
    prefix_tokens: int = 0
    """Vectors of the latent prefix."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.z_init, self.text))

    def first(self) -> "LatentOutput":
        """The output of the first text of a list, as for one text."""
        rows: dict[str, Any] = {
            field: getattr(self, field)[0]
            for field in ("z_init", "text", "prompt_tokens", "new_tokens")
        }
        return replace(self, **rows)
