"""Any causal language model of the Hugging Face hub as a reader: frozen, LoRA or fully trained.

The model is used as it is and is no submodule: state dicts, optimisers and averages see only what
is trained of it. Grids are spelt by 12 ids (`reader.hub_prompts`), and the head is applied to these
alone. Pairs in the layout of the trunk are read with words of the model where it has marks. Legend:
R prompts, S tokens, P soft prefix vectors, T tokens of the layout, D width, V vocabulary.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast

from arctrm.config import HubConfig
from arctrm.data.task import Grid, Pair
from arctrm.model.layout import PREFIX, Condition, Prompt
from arctrm.reader import hub_prompts
from arctrm.reader.grammar import MAX_OUTPUT_TOKENS, GridState
from arctrm.reader.hub_prompts import HubPrompt, find_spelling, new_prompt

KNOWN = inspect.signature(LlamaModel.forward).parameters
CACHE = "cache" if "cache" in KNOWN else "past_key_values"  # by which models take a cache
FREE_PLACES = 128  # of a cache, each time that it grows
SEQUENCES_AT_ONCE = 8  # of about one length, padded to the longest of them


class HubReader(nn.Module):
    """A causal LM and its tokenizer; follows `Reader`. Parameters are what is trained of it."""

    model: Any
    asks_inverse = follows_drafts = False

    def __init__(self, model: Any, tokenizer: Any, config: HubConfig):
        super().__init__()
        self.__dict__["model"] = model  # not a submodule
        self.tokenizer, self.config, self.name = tokenizer, config, config.name
        text = model.config.get_text_config(decoder=True)
        self.width, self.num_layers = text.hidden_size, text.num_hidden_layers
        self.max_tokens = getattr(text, "max_position_embeddings", None) or 2**31  # that it holds
        self.spelling = find_spelling(tokenizer, config.name)
        self.choices = torch.tensor(self.spelling.choices, device=self.device)
        self.pretrained = nn.Module()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # below the dotted name that the model gives it
                *path, last = name.split(".")
                owner = self.pretrained
                for part in path:
                    if part not in owner._modules:
                        owner.add_module(part, nn.Module())
                    owner = owner.get_submodule(part)
                owner.register_parameter(last, parameter)
        self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.is_shared = any(hasattr(layer, "unshard") for layer in self.layers)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        """Where tokens go in; states and logits come out there, also with a device map."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def batch_rows(self) -> int:
        """Of a GPU, where a step takes about as long for many rows as for few, or a CPU."""
        return 256 if self.device.type == "cuda" else 8

    @property
    def capacity(self) -> int:
        """Tokens of a store: keys and values fill at most half of a GPU's free memory."""
        if self.device.type != "cuda":
            return sys.maxsize
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + held
        return free // (2 * 2 * self.num_layers * self.width * self.dtype.itemsize)

    @property
    def max_prompt_tokens(self) -> int:
        """Bound on a prompt: the configured one, else what leaves room for the largest grid."""
        room = max(self.max_tokens - MAX_OUTPUT_TOKENS, self.max_tokens // 2)
        return min(self.config.max_tokens or room, self.max_tokens)

    def prompt(
        self, query: Grid, condition: Condition = Condition(), pairs: Sequence[Pair] = ()
    ) -> HubPrompt:
        """The prompt that asks for the output of `query` after `pairs`, the longest of them left
        out where it is too long. Raises ConfigError where the query alone does not fit.
        """
        bound = self.max_prompt_tokens
        return hub_prompts.pairs_prompt(self.spelling, query, pairs, bound, self.name)

    def chat_prompt(self, query: Grid, pairs: Sequence[Pair]) -> HubPrompt:
        """The same in plain language through the chat template. Raises ConfigError without one."""
        bound = self.max_prompt_tokens
        return hub_prompts.chat_prompt(self.tokenizer, query, pairs, bound, self.name)

    def opened(self, sizes: Sequence[int]) -> "HubReader":
        """Itself: there is nothing to prepare."""
        return self

    def store(self, prompts: Sequence[Prompt], room: Sequence[int]) -> "HubStore":
        """An empty store; its cache grows as needed, so `room` says nothing."""
        return HubStore(self, prompts)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] in the dtype of the weights."""
        return self.model.get_input_embeddings()(ids)

    def run(
        self, embedded_RSD: Tensor, positions_RS: Tensor, mask: Any = None, cache: Any = None
    ) -> Tensor:
        """Hidden states after the final norm, float32 [R, S, D]; `mask` int64 [R, tokens so far].

        Differentiable without a cache; to one the tokens are appended, in evaluation mode.
        """
        pauses = self.model.training and cache is not None
        if pauses:
            self.model.eval()
        if self.config.gradient_checkpointing:  # transformers does it in training mode only
            for layer in self.layers:
                layer.training = cache is None and torch.is_grad_enabled()
        out = self.model.get_decoder()(
            inputs_embeds=embedded_RSD.to(self.dtype),
            attention_mask=mask,
            position_ids=positions_RS,
            use_cache=cache is not None,
            **{CACHE: cache},
        )
        if pauses:
            self.model.train()
        return out.last_hidden_state.float().to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., V] of hidden states [..., D].

        The model is asked with its decoder replaced, for its soft caps and scales to be applied.
        """
        rows = hidden.reshape(-1, 1, hidden.shape[-1]).to(self.dtype)
        with _replaced(self.model.get_decoder(), lambda *_, **__: MoeModelOutputWithPast(rows)):
            logits = self.model(inputs_embeds=rows, use_cache=False).logits
        return logits.float().to(self.device).view(*hidden.shape[:-1], -1)

    def grid_logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [..., 12] of the choices that spell a grid."""
        head = self.model.get_output_embeddings()
        index = self.choices.to(head.weight.device)
        bias = None if getattr(head, "bias", None) is None else head.bias[index]
        with _replaced(head, lambda x: F.linear(x.to(head.weight), head.weight[index], bias)):
            return self.logits(hidden)

    def run_packed(
        self, tokens_T: Tensor, offsets: Tensor, soft_TD: Tensor | None = None
    ) -> Tensor:
        """Hidden states float32 [T, D] of packed sequences of pairs in tokens of the layout.

        Sequence n is tokens offsets[n] : offsets[n + 1]; PREFIX tokens are read as the vectors
        `soft_TD`. States of tokens in no sequence are zero.
        """
        bounds, device = offsets.cpu().numpy(), self.device
        tokens = tokens_T.cpu().numpy()
        begins = bounds[:-1][np.diff(bounds) > 0]
        ids, last = self.spelling.spelt(tokens, begins)
        owner = np.searchsorted(last, np.arange(len(ids)))
        first = np.append(-1, last)[bounds] + 1
        order = sorted(np.flatnonzero(np.diff(first)), key=lambda n: first[n] - first[n + 1])
        hidden = torch.zeros(len(ids), self.width, device=device)
        groups = [order[i : i + SEQUENCES_AT_ONCE] for i in range(0, len(order), SEQUENCES_AT_ONCE)]
        if self.is_shared:  # called in step: a process with fewer groups reads its last one again
            count = torch.tensor(len(groups), device=device)
            torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
            groups += groups[-1:] * (int(count) - len(groups))
        for chosen in groups:
            rows = [torch.arange(first[n], first[n + 1]) for n in chosen]
            places = pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
            mask, index = places >= 0, places.clamp(min=0)
            embedded = self.embed(torch.from_numpy(ids).to(device)[index])
            if soft_TD is not None:
                token = torch.from_numpy(owner).to(device)[index]
                is_soft = (tokens_T[token] == PREFIX)[..., None]
                embedded = torch.where(is_soft, soft_TD[token].to(embedded), embedded)
            positions = torch.arange(index.shape[1], device=device).expand_as(index)
            states = self.run(embedded, positions)  # causal: no token sees the padding behind
            hidden = hidden.index_copy(0, index[mask], states[mask])
        return hidden[torch.from_numpy(last).to(device)]

    def padded(
        self, prompts: Sequence[Prompt], new: Sequence[Sequence[int]] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [R, S, D], positions and mask int64 [R, S] of prompts, their soft prefixes
        and `new` ids behind them; padded on the left.
        """
        rows = []
        for number, prompt in enumerate(prompts):
            pieces = [self.embed(torch.from_numpy(prompt.tokens).to(self.device))]
            if isinstance(prompt, HubPrompt) and prompt.soft is not None:
                pieces.append(prompt.soft.to(pieces[0]))
            if new and len(new[number]):
                pieces.append(self.embed(torch.tensor(new[number], device=self.device)))
            rows.append(torch.cat(pieces))
        embedded = pad_sequence(rows, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        place = torch.arange(embedded.shape[1], device=self.device)
        positions = place - embedded.shape[1] + lengths[:, None]
        return embedded, positions.clamp(min=0), (positions >= 0).long()

    def last_states(self, prompts: Sequence[Prompt], new: Sequence[Sequence[int]]) -> Tensor:
        """State float32 [R, D] of the last of prompt, soft prefix and `new` ids; differentiable."""
        return self.run(*self.padded(prompts, new))[:, -1]

    def train(self, mode: bool = True) -> "HubReader":
        """Training mode (dropout of LoRA); a frozen model stays in evaluation mode."""
        super().train(mode)
        self.model.train(mode and self.config.mode != "frozen")
        return self

    def trainable_copy(self) -> "HubReader":
        """The same reader with trained parameters of its own, float32; all else is there once."""
        shared = [self.tokenizer, *self.model.parameters(), *self.model.buffers()]
        memo: dict[int, Any] = {id(one): one for one in shared}
        for parameter in self.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        return deepcopy(self, memo)


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer with free places behind them: a token more copies none of them.

    No layer forgets; the mask makes sliding windows.
    """

    held: Sequence[Any] = ()  # keys and values with the free places

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Append [R, heads, tokens, D of a head]; all keys and values."""
        new, begin = (key_states, value_states), self.get_seq_length()
        end = begin + key_states.shape[-2]
        if not self.held or self.held[0].shape[-2] < end or len(self.held[0]) != len(key_states):
            size = lambda x: (*x.shape[:2], end + FREE_PLACES, x.shape[-1])
            before, self.held = (self.keys, self.values), [x.new_empty(size(x)) for x in new]
            for place, old in zip(self.held, before, strict=True) if begin else ():
                place[:, :, :begin] = old
        for place, own in zip(self.held, new, strict=True):
            place[:, :, begin:end] = own
        self.keys, self.values = (place[:, :, :end] for place in self.held)
        self.is_initialized, self.device = True, key_states.device
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep these rows."""
        super().reorder_cache(beam_idx)
        self.held = ()


@torch.no_grad()
def halve_linear_layers(reader: HubReader) -> None:
    """On an x86 CPU, for good: weights of linear layers in float16, arithmetic in float32, no
    gradient; half the memory and 2-3 times the tokens a second. Leaves others.
    """
    if reader.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        return
    found = (m for m in reader.model.get_decoder().modules() if type(m) is nn.Linear)
    for one in cast(Iterator[Any], found):
        if one.weight.dtype == torch.float32:
            packed = torch.ops.quantized.linear_prepack_fp16(one.weight, one.bias)
            one.forward = partial(_half_linear, packed)
            one.weight = one.bias = None


def _half_linear(packed: Any, x: Tensor) -> Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


class HubStore:
    """Keys and values of prompts in lock step; follows `Store`.

    An append makes the cache longer for all rows; a row without a token there has a masked place.
    """

    def __init__(self, reader: HubReader, prompts: Sequence[Prompt]):
        self.reader, self.prompts = reader, prompts
        self.cache = Cache(layer_class_to_replicate=RoomyLayer)
        self.rows = list(range(len(prompts)))  # prompt of each row of the cache
        self.given_up: set[int] = set()
        self.mask = np.zeros((0, 0), dtype=np.int64)
        self.prompt_places = 0

    @torch.no_grad()
    def read(self) -> Tensor:
        """See `Store.read`."""
        return self.reader.grid_logits(self.read_states())

    @torch.no_grad()
    def append(self, rows: Tensor, choices: Tensor, states: GridState) -> Tensor:
        """See `Store.append`."""
        at = np.array([self.rows.index(row) for row in rows.tolist()])
        first = np.flatnonzero(np.diff(at, prepend=-1))
        rank = np.arange(len(at)) - np.repeat(first, np.diff(first, append=len(at)))
        there = np.zeros((len(self.rows), rank.max() + 1), dtype=bool)
        there[at, rank] = True
        ids = torch.zeros(there.shape, dtype=torch.long, device=self.reader.device)
        index = tuple(torch.from_numpy(part).to(ids.device) for part in (at, rank))
        ids[index] = self.reader.choices[choices]
        return self.reader.grid_logits(self.append_states(ids, there)[index])

    def rewind(self, row: int, length: int) -> None:
        """See `Store.rewind`; places that no row needs any more leave the cache."""
        own = self.mask[self.rows.index(row), self.prompt_places :]
        own[np.flatnonzero(own)[length:]] = 0
        kept = int(np.flatnonzero(self.mask.any(0))[-1]) + 1
        self.mask = self.mask[:, :kept]
        for layer in cast(Any, self.cache.layers):
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]

    def release(self, rows: Sequence[int]) -> None:
        """See `Store.release`; the cache is made smaller when half of its rows are given up."""
        self.given_up |= set(rows)
        kept = [at for at, row in enumerate(self.rows) if row not in self.given_up]
        if 0 < len(kept) <= len(self.rows) / 2:
            self._select(kept)
            self.rows = [self.rows[at] for at in kept]

    def read_states(self) -> Tensor:
        """Read all prompts; states [R, D] of their last tokens."""
        keys = [(p.tokens.tobytes(), id(getattr(p, "soft", None))) for p in self.prompts]
        different = [number for number, key in enumerate(keys) if keys.index(key) == number]
        embedded, positions, mask = self.reader.padded([self.prompts[i] for i in different])
        last = self.reader.run(embedded, positions, mask, self.cache)[:, -1]
        self.mask, self.prompt_places = mask.cpu().numpy(), mask.shape[1]
        index = [different.index(keys.index(key)) for key in keys]
        if len(different) < len(keys):
            self._select(index)
        return last[index]

    def append_states(self, ids_RS: Tensor, there_RS: np.ndarray) -> Tensor:
        """States [R, S, D] after appending ids where bool `there_RS`."""
        positions = self.mask.sum(1, keepdims=True) + there_RS.cumsum(1) - 1
        self.mask = np.concatenate((self.mask, there_RS), axis=1)
        positions, mask = (torch.from_numpy(x).to(ids_RS) for x in (positions, self.mask))
        return self.reader.run(self.reader.embed(ids_RS), positions, mask, self.cache)

    def _select(self, index: list[int]) -> None:
        places: Any = torch.tensor(index, device=self.reader.device)
        self.cache.reorder_cache(places)
        self.mask = self.mask[index]


def with_soft(prompts: Sequence[Prompt], soft_RPD: Tensor | None) -> list[Prompt]:
    """Prompts with a soft prefix each."""
    if soft_RPD is None:
        return list(prompts)
    both = zip(prompts, soft_RPD, strict=True)
    return [new_prompt(one.tokens, condition=one.condition, soft=soft) for one, soft in both]


@contextmanager
def _replaced(module: nn.Module, answer: Callable) -> Iterator[None]:
    """Let `module` be computed by `answer`."""
    before = module.__dict__.get("forward")  # accelerate sets one on the instance
    module.forward = answer  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]
