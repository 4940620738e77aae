"""Text in, a latent and new text out: a reader as the planner and the older pipeline know it.

A problem is read, an optional soft prefix follows it, and new text follows that. Writing itself has
no gradient; the latent is computed over all tokens at once, with a gradient where one is enabled.
Legend: B texts, P prefix vectors, D width of the reader.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from arctrm.config import HubConfig
from arctrm.config.sentences import Setting, Settings, config_error
from arctrm.errors import ConfigError
from arctrm.model.layout import Prompt
from arctrm.reader.hub import HubReader, HubStore, with_soft
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.hub_prompts import new_prompt, text_ids
from arctrm.reader.protocol import Reader
from arctrm.reader.text import GridText


class HubText:
    """A hub model that reads and writes natural language; has what `GridText` has."""

    def __init__(self, hub: HubReader):
        self.hub = self.weights = hub
        self.name, self.max_tokens = hub.name, hub.max_tokens
        self.device, self.width = hub.device, hub.width

    def text_prompt(self, text: str) -> Prompt:
        """A text as tokens, with what the tokenizer puts before any text."""
        ids = text_ids(self.hub.tokenizer, text)
        if not ids:
            raise ConfigError(f"{self.name}: an empty text has no tokens to read; give a text")
        return new_prompt(ids)

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Prompt],
        prefix: Tensor | None,
        max_length: int | Sequence[int],
        is_over: Callable[[list[int]], bool] = lambda own: False,
    ) -> list[list[int]]:
        """See `GridText.write`; a text ends where it `is_over`, too. One bound, or one for each."""
        ends = (self.hub.tokenizer.eos_token_id, self.hub.model.generation_config.eos_token_id)
        stops = {i for end in ends for i in (end if isinstance(end, list) else [end])}
        store = HubStore(self.hub, with_soft(prompts, prefix))
        last = store.read_states()
        new: list[list[int]] = [[] for _ in prompts]
        bounds = np.broadcast_to(max_length, len(prompts))
        there = bounds[:, None] > 0
        while there.any():
            chosen = self.hub.logits(last).argmax(-1)
            for row in np.flatnonzero(there):
                token = int(chosen[row])
                new[row] += [] if token in stops else [token]
                full = len(new[row]) >= bounds[row]
                there[row] = not (token in stops or full or is_over(new[row]))
            if there.any():
                last = store.append_states(chosen[:, None], there)[:, 0]
        return new

    def latents(
        self, prompts: Sequence[Prompt], prefix: Tensor | None, new: Sequence[Sequence[int]]
    ) -> Tensor:
        """See `GridText.latents`; `new` are ids."""
        return self.hub.last_states(with_soft(prompts, prefix), new)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, without special ones."""
        return self.hub.tokenizer.decode(list(tokens), skip_special_tokens=True)


@dataclass(frozen=True, eq=False)
class LatentOutput:
    """What `generate_latent` gives; unpacks as `z_init, text`. Lists where texts were a list."""

    z_init: Tensor  # float32 [D] or [B, D]
    text: str | list[str]  # new text only
    prompt_tokens: int | list[int]
    new_tokens: int | list[int]  # without the token that ended the text
    prefix_tokens: int = 0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.z_init, self.text))


class TextReasoningModule(nn.Module):
    """A language model that reads a problem and gives a latent and new text.

    `model_name` is an id on the Hugging Face hub or a folder, loaded on `device` with the `options`
    of `HubConfig` (`freeze` = False trains the layers, or with `mode="lora"` what that adds); or
    it is a reader (`solver.reader`) or `GridText` that stays as trained as it is.
    """

    def __init__(
        self,
        model_name: str | Reader | GridText,
        freeze: bool = True,
        device: str | torch.device | None = None,
        **options: Any,
    ):
        super().__init__()
        loaded: Any = model_name
        if isinstance(model_name, str):
            mode = options.setdefault("mode", "frozen" if freeze else "full")
            if (mode == "frozen") != freeze:
                raise ConfigError(f"TextReasoningModule: freeze = {freeze} contradicts {mode = }")
            options |= {"name": model_name} | ({} if device is None else {"device": str(device)})
            try:
                loaded = load_hub_reader(HubConfig.model_validate(options))
            except ValidationError as error:
                given: Settings = {
                    (key,): Setting(x, "TextReasoningModule") for key, x in options.items()
                }
                raise config_error(error, given, HubConfig) from error
        elif options or device is not None:
            raise ConfigError("TextReasoningModule: a loaded reader takes no device and no options")
        elif hasattr(loaded, "store") and not isinstance(loaded, HubReader):
            loaded = GridText(loaded)  # a reader of grids alone
        elif not isinstance(loaded, HubReader | GridText):
            raise ConfigError(
                f"TextReasoningModule: got {type(loaded).__name__}, which reads no text; give a "
                "hub id, a folder, or the reader of a solver (solver.reader)"
            )
        self.model = loaded if isinstance(loaded, HubReader) else None  # its weights are trained
        self.reader: GridText | HubText = loaded if self.model is None else HubText(loaded)

    @property
    def hidden_size(self) -> int:
        """Width D of the latents."""
        return self.reader.width

    def generate_latent(
        self,
        problem_text: str | Sequence[str],
        latent_prefix: Tensor | None = None,
        max_length: int = 128,
    ) -> LatentOutput:
        """Read a problem (or B of them) and the soft prefix [D], [P, D] or [B, P, D] behind it,
        write at most `max_length` new tokens (greedily), and give the latent.

        `z_init` is the state after the final norm at the last token of problem, prefix and new
        text. It has a gradient, to the prefix and to trained weights, where gradients are enabled.
        """
        texts = [problem_text] if isinstance(problem_text, str) else list(problem_text)
        prompts = [self.reader.text_prompt(text) for text in texts]
        prefix = None if latent_prefix is None else self._prefix(latent_prefix, len(prompts))
        lengths, count = [len(p.tokens) for p in prompts], 0 if prefix is None else prefix.shape[1]
        if max(lengths) + count + max_length > self.reader.max_tokens:
            raise ConfigError(
                f"{self.reader.name}: a problem of {max(lengths)} tokens, {count} of a prefix and "
                f"{max_length} new ones are more than the {self.reader.max_tokens} that the model "
                "holds; shorten the text or lower max_length"
            )
        new = self.reader.write(prompts, None if prefix is None else prefix.detach(), max_length)
        wanted = any(p.requires_grad for p in self.reader.weights.parameters())
        wanted |= prefix is not None and prefix.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            z_init = self.reader.latents(prompts, prefix, new)
        written = [self.reader.text_of(own) for own in new]
        fields: tuple[Any, ...] = z_init, written, lengths, [len(own) for own in new]
        z_init, text, length, number = (
            (own[0] for own in fields) if isinstance(problem_text, str) else fields
        )
        return LatentOutput(z_init, text, length, number, count)

    def _prefix(self, latent_prefix: Tensor, count: int) -> Tensor:
        """[D], [P, D] or [B, P, D] as [B, P, D]."""
        width, shape = self.hidden_size, list(latent_prefix.shape)
        if shape[-1:] != [width] or shape[:-2] not in ([], [1], [count]):
            raise ConfigError(
                f"latent_prefix has the shape {shape}, allowed are [D], [P, D] and [B, P, D] with "
                f"B = {count} texts and D = {width}, the width of {self.reader.name}"
            )
        one = latent_prefix if len(shape) == 3 else latent_prefix.view(1, -1, width)
        return one.expand(count, -1, -1).to(self.reader.device)
