"""Text in, a latent and new text out: the reader as the planner and the older pipeline know it.

Whatever model is behind it, a problem is read as left-padded text, an optional soft prefix follows
it, and new text follows that. The prefix comes after the text so that the text's cache serves every
attempt. Generation itself has no gradient; where something is trained, the latent is computed once
more over all tokens with one, and `hidden_states` is the differentiable way for training.

Legend: B texts, S tokens, P prefix vectors, N new tokens, D width of the reader.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from arctrm.config.reader_hub import HubReaderConfig
from arctrm.config.sentences import Setting, Settings, config_error
from arctrm.errors import ConfigError
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.interface import Prompt, left_padded
from arctrm.reader.text_interface import LatentOutput, TextReader


@dataclass(frozen=True, eq=False)
class _Read:
    """A batch of texts that was embedded, with its prefix; all tensors on the reader's device."""

    embedded: Tensor
    positions: Tensor
    mask: Tensor
    start: Tensor
    """int64 [B]: position number of what follows the text."""
    condition: Tensor
    num_prefix: int
    lengths: list[int]


class TextReasoningModule(nn.Module):
    """A language model that reads a problem and gives a latent and new text."""

    def __init__(
        self,
        model_name: str | TextReader,
        freeze: bool = True,
        device: str | torch.device | None = None,
        **options: Any,
    ):
        """Load `model_name` (hub id or folder), or use a reader that is already loaded.

        `options` are fields of `HubReaderConfig`; `freeze=False` trains every weight unless
        `mode="lora"` is among them.

        Raises:
            ConfigError: an option is unknown or contradicts another, or there is no such model.
        """
        super().__init__()
        if isinstance(model_name, str):
            reader: TextReader = load_hub_reader(_config(model_name, freeze, device, options))
        elif options or device is not None:
            raise ConfigError(
                f"TextReasoningModule: a loaded reader ({model_name.name}) takes no device and no "
                "options; give its name instead, or leave them out"
            )
        else:
            reader = model_name
            if freeze:
                reader.model.requires_grad_(False)
        self.reader = reader
        self.model = reader.model
        self.train(False)

    @property
    def hidden_size(self) -> int:
        """Width D of the latents."""
        return self.reader.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.reader.device

    def train(self, mode: bool = True) -> "TextReasoningModule":
        """Training mode; what is frozen stays in evaluation mode."""
        self.training = mode
        trained = any(p.requires_grad for p in self.model.parameters())
        self.reader.train(mode and trained)
        return self

    def generate_latent(
        self,
        problem_text: str | Sequence[str],
        latent_prefix: Tensor | None = None,
        max_length: int = 128,
    ) -> LatentOutput:
        """Read the problem, write at most `max_length` new tokens (greedily), give the latent.

        `z_init` is the hidden state after the final norm at the last token of problem, prefix and
        new text; the token that ends the text does not count. It has a gradient, to the prefix and
        to trained weights, where gradients are enabled.

        Args:
            problem_text: one text, or a list of B.
            latent_prefix: soft prefix [D], [P, D] or [B, P, D], read after the problem.
            max_length: bound on the new tokens (the problem does not count).

        Raises:
            ConfigError: an empty text, a prefix of another width, or more than the model holds.
        """
        texts = [problem_text] if isinstance(problem_text, str) else list(problem_text)
        out = self.continue_prompts(self._prompts(texts), latent_prefix, max_length)
        return out.first() if isinstance(problem_text, str) else out

    def continue_prompts(
        self, prompts: Sequence[Prompt], latent_prefix: Tensor | None = None, max_length: int = 128
    ) -> LatentOutput:
        """As `generate_latent`, for prompts that are tokens already (a chat template's, say).

        Raises:
            ConfigError: as there.
        """
        if max_length < 0:
            raise ConfigError(f"max_length = {max_length} new tokens, allowed is 0 or more")
        read = self._read(prompts, latent_prefix, max_length)
        z_init, new, lengths = self._generate(read, max_length)
        if torch.is_grad_enabled() and self._is_trained(latent_prefix):
            z_init = self._latent_of(read, new, lengths)
        ids = [row[:length] for row, length in zip(new.tolist(), lengths, strict=True)]
        written = [self.reader.text_of(row) for row in ids]
        return LatentOutput(z_init, written, read.lengths, lengths, read.num_prefix)

    def hidden_states(
        self, problem_texts: str | Sequence[str], latent_prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm and their mask, differentiable.

        Returns:
            float32 [B, S + P, D], left-padded, the prefix last, and bool [B, S + P].

        Raises:
            ConfigError: as `generate_latent`.
        """
        texts = [problem_texts] if isinstance(problem_texts, str) else list(problem_texts)
        read = self._read(self._prompts(texts), latent_prefix, 0)
        return self.reader.run(read.embedded, read.positions, read.mask), read.mask.bool()

    def _prompts(self, texts: Sequence[str]) -> list[Prompt]:
        if not texts:
            raise ConfigError("problem_text is an empty list; give at least one text")
        return [self.reader.text_prompt(text) for text in texts]

    def _read(
        self, prompts: Sequence[Prompt], latent_prefix: Tensor | None, max_length: int
    ) -> _Read:
        """Embed prompts, the prefix behind them."""
        tokens, positions, mask = (part.to(self.device) for part in left_padded(prompts))
        start = torch.tensor([p.output_start for p in prompts], device=self.device)
        condition = torch.tensor([p.condition for p in prompts], device=self.device)
        embedded = self.reader.embed(tokens, condition)
        num_prefix = 0
        if latent_prefix is not None:
            prefix = self._prefix(latent_prefix, len(prompts)).to(embedded)
            num_prefix = prefix.shape[1]
            after = self.reader.positions_after(start, tokens[:, :0], num_prefix)
            embedded = torch.cat([embedded, prefix], 1)
            positions = torch.cat([positions, after], 1)
            mask = torch.cat([mask, torch.ones_like(after)], 1)
        lengths = [len(prompt.tokens) for prompt in prompts]
        self._check_length(max(lengths), num_prefix, max_length)
        return _Read(embedded, positions, mask, start, condition, num_prefix, lengths)

    def _check_length(self, prompt: int, prefix: int, new: int) -> None:
        needed, allowed = prompt + prefix + new, self.reader.max_tokens
        if needed > allowed:
            raise ConfigError(
                f"{self.reader.name}: a problem of {prompt} tokens, {prefix} of a prefix and {new} "
                f"new ones make {needed}, and the model holds {allowed}; shorten the text or lower "
                "max_length"
            )

    def _prefix(self, latent_prefix: Tensor, count: int) -> Tensor:
        """[D], [P, D] or [B, P, D] as [B, P, D]."""
        if latent_prefix.shape[-1:] != (self.hidden_size,) or latent_prefix.dim() > 3:
            raise ConfigError(
                f"latent_prefix has the shape {list(latent_prefix.shape)}, allowed are [D], [P, D] "
                f"and [B, P, D] with D = {self.hidden_size}, the width of {self.reader.name}"
            )
        if latent_prefix.dim() == 3 and latent_prefix.shape[0] not in (1, count):
            raise ConfigError(
                f"latent_prefix is for {latent_prefix.shape[0]} texts, and {count} were given; "
                "give as many, or one prefix [P, D] for all"
            )
        one = (
            latent_prefix
            if latent_prefix.dim() == 3
            else latent_prefix.view(1, -1, self.hidden_size)
        )
        return one.expand(count, -1, -1)

    @torch.no_grad()
    def _generate(self, read: _Read, max_length: int) -> tuple[Tensor, Tensor, list[int]]:
        """Latents [B, D], new tokens [B, N] (rubbish after their end), and how many count."""
        reader, mask = self.reader, read.mask
        cache = reader.new_cache(mask.shape[1] + max_length)
        last = reader.run(read.embedded, read.positions, mask, cache)[:, -1]
        stops = torch.tensor(reader.stop_tokens, dtype=torch.long, device=self.device)
        new = torch.empty(len(mask), 0, dtype=torch.long, device=self.device)
        running = torch.ones(len(mask), dtype=torch.bool, device=self.device)
        lengths = torch.zeros(len(mask), dtype=torch.long, device=self.device)
        for _ in range(max_length):
            chosen = reader.head(last).argmax(-1)
            running = running & ~torch.isin(chosen, stops)
            if not running.any():
                break
            lengths += running
            new = torch.cat([new, chosen[:, None]], 1)
            mask = torch.cat([mask, running[:, None].to(mask)], 1)
            position = reader.positions_after(read.start, new, read.num_prefix)[:, -1:]
            embedded = reader.embed(chosen[:, None], read.condition)
            hidden = reader.run(embedded, position, mask, cache)[:, -1]
            last = torch.where(running[:, None], hidden, last)
        return last, new, lengths.tolist()

    def _latent_of(self, read: _Read, new: Tensor, lengths: list[int]) -> Tensor:
        """The same latents [B, D] with a gradient: one pass over problem, prefix and new tokens."""
        length = torch.tensor(lengths, device=self.device)[:, None]
        counts = torch.arange(new.shape[1], device=self.device) < length
        after = self.reader.positions_after(read.start, new, read.num_prefix)[:, read.num_prefix :]
        embedded = torch.cat([read.embedded, self.reader.embed(new, read.condition)], 1)
        hidden = self.reader.run(
            embedded,
            torch.cat([read.positions, after], 1),
            torch.cat([read.mask, counts.to(read.mask)], 1),
        )
        place = read.mask.shape[1] - 1 + length
        return hidden.take_along_dim(place[..., None], 1)[:, 0]

    def _is_trained(self, latent_prefix: Tensor | None) -> bool:
        prefix = latent_prefix is not None and latent_prefix.requires_grad
        return prefix or any(p.requires_grad for p in self.model.parameters())


def _config(
    name: str, freeze: bool, device: str | torch.device | None, options: dict[str, Any]
) -> HubReaderConfig:
    """The options as a configuration.

    Raises:
        ConfigError: one is unknown or wrong.
    """
    mode = options.get("mode", "frozen" if freeze else "full")
    if (mode == "frozen") != freeze:
        raise ConfigError(
            f"TextReasoningModule: freeze = {freeze} contradicts mode = {mode!r}; leave one of "
            "them out or set " + ("mode = 'frozen'" if freeze else "freeze = True")
        )
    given = {**options, "name": name, "mode": mode}
    if device is not None:
        given["device"] = str(device)
    try:
        return HubReaderConfig.model_validate(given)
    except ValidationError as error:
        settings: Settings = {
            (key,): Setting(value, "TextReasoningModule") for key, value in given.items()
        }
        raise config_error(error, settings, HubReaderConfig) from error
