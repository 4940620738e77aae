"""A hub reader behind `TextReasoningModule` that speaks grids only: what the planner asks.

A text is read as `TinyText` reads it, row by row, and laid out in the model's tokens as in
training, so that no tokenizer merges cells; what is written are the 12 tokens that spell grids, the
only ones that training says anything of.

Legend: B texts, S tokens, P prefix vectors, N new tokens, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import StaticCache

from arctrm.reader.grammar import choice_ids
from arctrm.reader.hub import HubReader
from arctrm.reader.hub_codes import HubCodes
from arctrm.reader.interface import Prompt
from arctrm.reader.tiny_text import text_of, written_prompt
from arctrm.reader.tokens import ROW_END


class HubGridText:
    """A hub reader that follows `TextReader`; `condition` as in `Prompt`."""

    def __init__(self, hub: HubReader, condition: tuple[int, int, int] = (0, 0, 1)):
        self.hub, self.condition, self.name = hub, condition, hub.name
        self.model: nn.Module = hub.model
        self.codes, spelt = HubCodes(hub), hub.grid_tokens
        self.stop_tokens = (spelt.end,)
        self.code_of = {spelt.row_end: ROW_END} | {t: c for c, t in enumerate(spelt.colours)}
        self.choices = torch.tensor(choice_ids(spelt), device=hub.device)

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return self.hub.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hub.device

    @property
    def max_tokens(self) -> int:
        """Tokens that the model can hold: prompt, prefix and new ones together."""
        return self.hub.max_tokens

    def new_cache(self, length: int) -> StaticCache:
        """An empty cache for `length` tokens, padding included."""
        return self.hub.new_cache(length)

    def text_prompt(self, text: str) -> Prompt:
        """The tokens of a text; what is written goes on where the text stops.

        Raises:
            ConfigError: as `TinyText.text_prompt`.
        """
        return self.codes.prompt(written_prompt(text, self.name, self.condition))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of new tokens."""
        return text_of([self.code_of[token] for token in tokens])

    def positions_after(self, start_B: Tensor, tokens_BN: Tensor, num_prefix: int) -> Tensor:
        """Positions int64 [B, P + N] of a prefix and the new tokens after it."""
        return self.hub.positions_after(start_B, tokens_BN, num_prefix)

    def embed(self, tokens_BS: Tensor, condition_B3: Tensor) -> Tensor:
        """Embeddings [B, S, D]; the condition says nothing to a hub model."""
        return self.hub.embed(tokens_BS)

    def run(
        self,
        inputs: Tensor,
        positions_BS: Tensor,
        attention_mask: Tensor,
        cache: StaticCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, float32 [B, S, D]."""
        return self.hub.run(inputs, positions_BS, attention_mask, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [..., V], -inf for all but the tokens that spell grids."""
        logits = self.hub.head(hidden)
        chosen = logits.index_select(-1, self.choices)
        return torch.full_like(logits, -torch.inf).index_copy(-1, self.choices, chosen)

    def train(self, mode: bool = True) -> None:
        """Training mode, where the model is trained."""
        self.hub.train(mode)
