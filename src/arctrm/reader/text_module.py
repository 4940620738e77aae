"""Text in, a latent and new text out: a reader as the planner and the older pipeline know it.

A problem is read, an optional soft prefix follows it, and new text follows that. Writing itself has
no gradient; the latent is computed over all tokens at once, with a gradient where one is enabled.

Legend: B texts, P prefix vectors, D width of the reader.
"""

from collections.abc import Iterator, Sequence
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
from arctrm.reader.protocol import TextReader


class HubText:
    """A hub model that reads and writes natural language; follows `TextReader`."""

    def __init__(self, hub: HubReader):
        self.hub, self.name, self.max_tokens = hub, hub.name, hub.max_tokens
        self.device, self.width = hub.device, hub.width

    @property
    def trains(self) -> bool:
        """Whether any weight asks for a gradient."""
        return any(parameter.requires_grad for parameter in self.hub.parameters())

    def text_prompt(self, text: str) -> Prompt:
        """A text as tokens, with what the tokenizer puts before any text.

        Raises:
            ConfigError: it has no tokens, or one that the model has no embedding for.
        """
        ids = text_ids(self.hub.tokenizer, text)
        rows = len(self.hub.model.get_input_embeddings().weight)
        if not ids:
            raise ConfigError(f"{self.name}: an empty text has no tokens to read; give a text")
        if max(ids) >= rows:
            raise ConfigError(
                f"{self.name}: the tokenizer gives id {max(ids)}, the model has {rows} embeddings; "
                "use the model's own tokenizer"
            )
        return new_prompt(ids)

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Prompt], prefix: Tensor | None, max_length: int
    ) -> list[list[int]]:
        """See `TextReader.write`."""
        ends = (self.hub.tokenizer.eos_token_id, self.hub.model.generation_config.eos_token_id)
        stops = {i for end in ends for i in (end if isinstance(end, list) else [end])}
        store = HubStore(self.hub, with_soft(prompts, prefix))
        last = store.read_states()
        new: list[list[int]] = [[] for _ in prompts]
        there = np.ones((len(prompts), 1), dtype=bool)
        for _ in range(max_length):
            chosen = self.hub.logits(last).argmax(-1)
            there[:, 0] &= [one not in stops for one in chosen.tolist()]
            if not there.any():
                break
            for row in np.flatnonzero(there):
                new[row].append(int(chosen[row]))
            last = store.append_states(chosen[:, None], there)[:, 0]
        return new

    def latents(
        self, prompts: Sequence[Prompt], prefix: Tensor | None, new: Sequence[Sequence[int]]
    ) -> Tensor:
        """See `TextReader.latents`; `new` are ids."""
        return self.hub.last_states(with_soft(prompts, prefix), new)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, without special ones."""
        return self.hub.tokenizer.decode(list(tokens), skip_special_tokens=True)


@dataclass(frozen=True, eq=False)
class LatentOutput:
    """What `generate_latent` gives; unpacks as `z_init, text`.

    Where a list of texts was given, `z_init` is [B, D] and the other fields are lists.
    """

    z_init: Tensor
    """float32 [D] or [B, D]: the state of the last token of problem, prefix and new text."""
    text: str | list[str]
    """New text only."""
    prompt_tokens: int | list[int]
    new_tokens: int | list[int]
    """Without the token that ended the text."""
    prefix_tokens: int = 0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.z_init, self.text))


class TextReasoningModule(nn.Module):
    """A language model that reads a problem and gives a latent and new text.

    Args:
        model_name: id on the Hugging Face hub or a folder, or a reader that is already loaded (a
            `HubReader`, or `GridText` of any reader), whose weights stay as trained as they are.
        freeze: train nothing of a model that is loaded here; False trains every weight unless
            `mode="lora"` is among the options.
        device: where a model that is loaded here computes.
        options: fields of `HubConfig`.

    Raises:
        ConfigError: an option is unknown or contradicts another, or there is no such model.
    """

    def __init__(
        self,
        model_name: str | HubReader | TextReader,
        freeze: bool = True,
        device: str | torch.device | None = None,
        **options: Any,
    ):
        super().__init__()
        if isinstance(model_name, str):
            model_name = load_hub_reader(_config(model_name, freeze, device, options))
        elif options or device is not None:
            raise ConfigError(
                f"TextReasoningModule: a loaded reader ({model_name.name}) takes no device and no "
                "options; give its name instead, or leave them out"
            )
        given: Any = model_name
        self.model = given if isinstance(given, HubReader) else None  # its parameters are trained
        self.reader: TextReader = given if self.model is None else HubText(given)

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
        """Read the problem, write at most `max_length` new tokens (greedily), give the latent.

        `z_init` is the state after the final norm at the last token of problem, prefix and new
        text. It has a gradient, to the prefix and to trained weights, where gradients are enabled.

        Args:
            problem_text: one text, or a list of B.
            latent_prefix: soft prefix [D], [P, D] or [B, P, D], read after the problem.
            max_length: bound on the new tokens (the problem does not count).

        Raises:
            ConfigError: an empty text, a prefix of another width, or more than the model holds.
        """
        texts = [problem_text] if isinstance(problem_text, str) else list(problem_text)
        if not texts:
            raise ConfigError("problem_text is an empty list; give at least one text")
        prompts = [self.reader.text_prompt(text) for text in texts]
        out = self.continue_prompts(prompts, latent_prefix, max_length)
        if not isinstance(problem_text, str):
            return out
        lists: Any = (out.z_init, out.text, out.prompt_tokens, out.new_tokens)
        z_init, text, prompt, new = (field[0] for field in lists)
        return LatentOutput(z_init, text, prompt, new, out.prefix_tokens)

    def continue_prompts(
        self, prompts: Sequence[Prompt], latent_prefix: Tensor | None = None, max_length: int = 128
    ) -> LatentOutput:
        """As `generate_latent`, for prompts that are tokens already (a chat template's, say)."""
        if max_length < 0:
            raise ConfigError(f"max_length = {max_length} new tokens, allowed is 0 or more")
        prefix = None if latent_prefix is None else self._prefix(latent_prefix, len(prompts))
        lengths, count = [len(p.tokens) for p in prompts], 0 if prefix is None else prefix.shape[1]
        needed = max(lengths) + count + max_length
        allowed = getattr(self.reader, "max_tokens", needed)
        if needed > allowed:
            raise ConfigError(
                f"{self.reader.name}: a problem of {max(lengths)} tokens, {count} of a prefix and "
                f"{max_length} new ones make {needed}, and the model holds {allowed}; shorten the "
                "text or lower max_length"
            )
        new = self.reader.write(prompts, None if prefix is None else prefix.detach(), max_length)
        wanted = self.reader.trains or (prefix is not None and prefix.requires_grad)
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            z_init = self.reader.latents(prompts, prefix, new)
        texts = [self.reader.text_of(own) for own in new]
        return LatentOutput(z_init, texts, lengths, [len(own) for own in new], count)

    def _prefix(self, latent_prefix: Tensor, count: int) -> Tensor:
        """[D], [P, D] or [B, P, D] as [B, P, D]."""
        width, shape = self.hidden_size, list(latent_prefix.shape)
        if latent_prefix.shape[-1:] != (width,) or latent_prefix.dim() > 3:
            raise ConfigError(
                f"latent_prefix has the shape {shape}, allowed are [D], [P, D] and [B, P, D] with "
                f"D = {width}, the width of {self.reader.name}"
            )
        if latent_prefix.dim() == 3 and shape[0] not in (1, count):
            raise ConfigError(
                f"latent_prefix is for {shape[0]} texts, and {count} were given; give as many, or "
                "one prefix [P, D] for all"
            )
        one = latent_prefix if latent_prefix.dim() == 3 else latent_prefix.view(1, -1, width)
        return one.expand(count, -1, -1).to(self.reader.device)


def _config(
    name: str, freeze: bool, device: str | torch.device | None, options: dict[str, Any]
) -> HubConfig:
    """The options as a configuration.

    Raises:
        ConfigError: one is unknown or wrong.
    """
    mode = options.get("mode", "frozen" if freeze else "full")
    if (mode == "frozen") != freeze:
        cure = "mode = 'frozen'" if freeze else "freeze = True"
        raise ConfigError(
            f"TextReasoningModule: freeze = {freeze} contradicts mode = {mode!r}; leave one of "
            f"them out or set {cure}"
        )
    given = {**options, "name": name, "mode": mode}
    if device is not None:
        given["device"] = str(device)
    try:
        return HubConfig.model_validate(given)
    except ValidationError as error:
        settings: Settings = {
            (key,): Setting(value, "TextReasoningModule") for key, value in given.items()
        }
        raise config_error(error, settings, HubConfig) from error
