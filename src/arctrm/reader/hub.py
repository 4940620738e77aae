"""Any causal language model of the Hugging Face hub as a reader: frozen, LoRA or fully trained.

The model is used as it is (composed, not subclassed). Three things differ from plain use: its
cache is static with every layer at full length, so that tokens can be taken back whatever the
model's sliding windows; a soft prefix may follow the text, which leaves the text's cache valid; and
the head can be applied to chosen hidden states, so that training need not make logits of every
token.

Legend: B prompts, S tokens, P prefix vectors, N new tokens, D width, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from arctrm.config.reader_hub import HubReaderConfig
from arctrm.data.task import MAX_SIDE
from arctrm.errors import ConfigError
from arctrm.reader.interface import CACHE, GridTokens, Prompt
from arctrm.reader.probing import probe
from arctrm.reader.prompts import new_spelling, text_tokens
from arctrm.trm.strict import check_names

LARGEST_OUTPUT = MAX_SIDE * (MAX_SIDE + 1) + 1
"""Tokens of a 30x30 grid, row ends and the end included."""


class HubReader:
    """A causal LM and its tokenizer; follows `GridReader` and `TextReader`."""

    def __init__(self, model: Any, tokenizer: Any, config: HubReaderConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.name = config.name
        self.probe = probe(tokenizer, config.cells, config.name)
        self.spelling = new_spelling(tokenizer, self.probe.tokens)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._checkpointed: list[nn.Module] = []
        if config.gradient_checkpointing:
            self._checkpoint_layers()

    @property
    def grid_tokens(self) -> GridTokens:
        """The ids that spell a grid."""
        return self.probe.tokens

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return self.model.config.get_text_config(decoder=True).hidden_size

    @property
    def device(self) -> torch.device:
        """Where tokens go in; hidden states and logits come out there, also with a device map."""
        return self.model.get_input_embeddings().weight.device

    @property
    def max_tokens(self) -> int:
        """Tokens that the model can hold: prompt, prefix and new ones together."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 2**31

    @property
    def max_prompt_tokens(self) -> int:
        """Bound on a prompt: the configured one, else what leaves room for the largest grid."""
        room = max(self.max_tokens - LARGEST_OUTPUT, self.max_tokens // 2)
        return min(self.config.max_tokens or room, self.max_tokens)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a text."""
        ends = [self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id]
        flat = [i for end in ends for i in (end if isinstance(end, list) else [end])]
        return tuple(dict.fromkeys(token for token in flat if token is not None))

    def new_cache(self, length: int) -> StaticCache:
        """An empty cache for `length` tokens, padding included."""
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        # A sliding layer forgets what it slid past, so nothing could be taken back; the mask alone
        # makes the window.
        cache.layers = [
            StaticLayer(length) if type(layer) is StaticSlidingWindowLayer else layer
            for layer in cache.layers
        ]
        return cache

    def output_positions(self, start_B: Tensor, count: int, y_B: Tensor, x_B: Tensor) -> Tensor:
        """Positions int64 [B] of output token number `count`: tokens are counted."""
        return start_B + count

    def logits(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        condition_B3: Tensor,
        attention_mask: Tensor,
        cache: StaticCache,
        keep: int = 0,
    ) -> Tensor:
        """Next-token logits, float32 [B, S, V], or of the last `keep` tokens only [B, keep, V].

        A vocabulary of 128,000 makes logits of a whole prompt large: ask for what is used.
        """
        with self._evaluating():
            options = {"logits_to_keep": keep} if self._keeps_logits else {}
            out = self.model(
                **self._inputs(tokens_BS, positions_BS, attention_mask, cache), **options
            )
        return out.logits[:, -keep:].float().to(self.device)

    def embed(self, tokens_BS: Tensor, condition_B3: Tensor | None = None) -> Tensor:
        """Embeddings [B, S, D] in the dtype of the weights; `condition_B3` is ignored."""
        return self.model.get_input_embeddings()(tokens_BS)

    def run(
        self,
        inputs: Tensor,
        positions_BS: Tensor,
        attention_mask: Tensor,
        cache: StaticCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, float32 [B, S, D].

        `inputs` are tokens int64 [B, S] or embeddings [B, S, D]. Without a cache it can be
        differentiated; with one the inputs are appended to it, always in evaluation mode.
        """
        for layer in self._checkpointed:
            layer.training = cache is None and torch.is_grad_enabled()
        arguments = self._inputs(inputs, positions_BS, attention_mask, cache)
        with self._evaluating(cache is not None):
            out = self.model.get_decoder()(**arguments)
        return out.last_hidden_state.float().to(self.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [..., V], of hidden states [..., D].

        The model itself is asked, with its decoder replaced by what the decoder gave before, so
        that whatever it does there (soft caps, scales) is done.
        """
        rows = hidden.reshape(-1, 1, hidden.shape[-1]).to(self._dtype)
        with _forward_replaced(self.model.get_decoder(), MoeModelOutputWithPast(rows)):
            logits = self.model(inputs_embeds=rows, use_cache=False).logits
        return logits.float().to(self.device).view(*hidden.shape[:-1], -1)

    def encode(
        self, tokens_BS: Tensor, mask_BS: Tensor, latent_prefix: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states float32 [B, S + P, D] of a padded batch and their mask int64 [B, S + P].

        `mask_BS` is 1 on tokens, 0 on padding; `latent_prefix` [B, P, D] follows the text.
        """
        positions = (mask_BS.cumsum(1) - 1).clamp(min=0)
        if latent_prefix is None:
            return self.run(tokens_BS, positions, mask_BS), mask_BS
        count = latent_prefix.shape[1]
        after = self.positions_after(mask_BS.sum(1), tokens_BS[:, :0], count)
        mask = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), count)], 1)
        embedded = self.embed(tokens_BS)
        inputs = torch.cat([embedded, latent_prefix.to(embedded)], 1)
        return self.run(inputs, torch.cat([positions, after], 1), mask), mask

    def text_prompt(self, text: str) -> Prompt:
        """A text as tokens, with what the tokenizer puts before any text.

        Raises:
            ConfigError: it has no tokens, or one that the model has no embedding for.
        """
        ids = np.array(text_tokens(self.tokenizer, text), dtype=np.int64)
        rows = self.model.get_input_embeddings().weight.shape[0]
        if not len(ids) or ids.max() >= rows:
            problem = (
                f"the tokenizer gives id {ids.max()}, the model has {rows} embeddings; use the "
                "model's own tokenizer"
                if len(ids)
                else "an empty text has no tokens to read; give a text"
            )
            raise ConfigError(f"{self.name}: {problem}")
        return Prompt(ids, np.arange(len(ids)), len(ids))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, without special ones."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def positions_after(self, start_B: Tensor, tokens_BN: Tensor, num_prefix: int) -> Tensor:
        """Positions int64 [B, P + N] of a prefix and the new tokens after it."""
        count = num_prefix + tokens_BN.shape[1]
        return start_B[:, None] + torch.arange(count, device=start_B.device)

    def train(self, mode: bool = True) -> None:
        """Training mode (dropout); a frozen model stays in evaluation mode."""
        self.model.train(mode and self.config.mode != "frozen")

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: nothing, the LoRA matrices, or every weight."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained tensors, for a checkpoint; never those of a frozen model."""
        return {name: p.detach() for name, p in self.trainable_parameters().items()}

    def with_parameters(
        self, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]
    ) -> "HubReader":
        """The same reader with `new` parameters in place of `old` ones.

        The modules are copied; every other tensor, and the tokenizer, is there once for both.
        """
        shared = [self.tokenizer, *self.model.parameters(), *self.model.buffers()]
        memo: dict[int, Any] = {id(one): one for one in shared}
        memo |= {id(there): here for there, here in zip(old, new, strict=True)}
        return deepcopy(self, memo)

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, Tensor], path: Path) -> None:
        """Load what `trainable_state` gave; `path` is where it was read, for messages.

        Raises:
            CheckpointError: names or shapes differ.
        """
        own = self.trainable_parameters()
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        check_names(shapes, state, path, expected_by=f"the reader {self.name}")
        for name, parameter in own.items():
            parameter.copy_(state[name])

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def _inputs(
        self, inputs: Tensor, positions: Tensor, attention_mask: Tensor, cache: StaticCache | None
    ) -> dict[str, Any]:
        if inputs.is_floating_point():
            given = {"inputs_embeds": inputs.to(self._dtype)}
        else:
            given = {"input_ids": inputs}
        return given | {
            "attention_mask": attention_mask,
            "position_ids": positions,
            CACHE: cache,
            "use_cache": cache is not None,
        }

    @contextmanager
    def _evaluating(self, needed: bool = True) -> Iterator[None]:
        """Evaluation mode for what reads or writes a cache."""
        was_training = needed and self.model.training
        if was_training:
            self.model.eval()
        try:
            yield
        finally:
            if was_training:
                self.model.train()

    def _checkpoint_layers(self) -> None:
        """transformers checkpoints layers in training mode only: their flag is set as needed."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._checkpointed = [
            module
            for module in self.model.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]


@contextmanager
def _forward_replaced(module: nn.Module, result: Any) -> Iterator[None]:
    """Let `module` answer every call with `result`."""
    before = module.__dict__.get("forward")  # accelerate sets one on the instance
    module.forward = lambda *args, **kwargs: result  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]
