"""Constrained decoding: many prompts in, one grid each out, greedily or by sampling.

A batch has one shape from its first output token to its last, apart from the few times when more
than half of its rows are finished and dropped; the host looks for that only now and then. What
comes out for a prompt does not depend on the batch: rows do not see each other, and every prompt
draws from a random stream of its own. The tiny reader goes other ways to the same results, on a GPU
(`reader.packed_decoding`) and, greedily, on a CPU (`reader.drafted_decoding`); here is the one
through transformers' cache, for all others.

Legend: R rows of the batch still decoded, B prompts of the batch, T output tokens, 12 choices.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE, Grid
from arctrm.reader import grammar
from arctrm.reader.drafted_decoding import DraftedDecoder
from arctrm.reader.grammar import END, MAX_OUTPUT_TOKENS, NUM_CHOICES, UNWRITTEN, choice_ids
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.packed_decoding import CHECK_EVERY, PackedDecoder
from arctrm.reader.places import is_packed
from arctrm.reader.rows import (
    Rows,
    by_length,
    encode_distinct,
    memory_guard,
    output_bounds,
    split,
)
from arctrm.reader.tiny import TinyReader

BATCH_SIZE = 64
CPU_BATCH, PACKED_BATCH, GPU_BATCH, HUB_BATCH = 16, 4096, 512, 8
"""Prompts decoded side by side: by the tiny reader (on a CPU; on a GPU, where what memory has room
for bounds them, too; with float32 or a probability threshold there), and by a hub model."""


def usual_batch_size(reader: GridReader, searching: bool = False) -> int:
    """Prompts in one batch where nobody says how many; branches when all probable grids are
    searched for.
    """
    if not isinstance(reader, TinyReader):
        return HUB_BATCH
    if reader.device.type != "cuda":
        return CPU_BATCH
    return PACKED_BATCH if is_packed(reader) and not searching else GPU_BATCH


@dataclass(frozen=True, eq=False)
class Decoded:
    """One continuation of a prompt."""

    grid: Grid | None
    """None if the bound on output tokens came before the end."""
    log_probability: float
    """Sum over its tokens (nats) of the model's log-probabilities as `reader.grammar` counts them;
    the sampling temperature does not enter."""
    tokens: tuple[int, ...]
    """In the reader's vocabulary, the end token included."""

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    mode: Literal["greedy", "sampled"] = "greedy"
    temperature: float = 1.0
    """Of sampling; probabilities are raised to the power 1 / temperature."""
    seed: int = 0

    @property
    def power(self) -> float | None:
        """The temperature, None for greedy decoding."""
        return None if self.mode == "greedy" else self.temperature


def decode(
    reader: GridReader,
    prompts: Sequence[Prompt],
    *,
    mode: Literal["greedy", "sampled"] = "greedy",
    temperature: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    max_output_tokens: int | Sequence[int] = MAX_OUTPUT_TOKENS,
    max_side: int = MAX_SIDE,
    drafts: Sequence[Grid | None] | None = None,
    deadline: float = math.inf,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Decoded]:
    """One grid for each prompt, in the order given; for several samples, give a prompt repeatedly.

    `max_output_tokens` is one bound for all prompts or one for each; a row that reaches it before
    its end gives no grid. Sampling draws from a random stream for each prompt, seeded by `seed`
    and its number in `streams` (default: its index). `drafts`, a grid or None for each prompt,
    change nothing but the time, where `follows_drafts`. At `deadline` (of `time.monotonic`) the
    rows that have not ended are given up: they give no grid. `advance` is told how many prompts
    are done.

    Raises:
        ResourceError: out of memory; names `reader.batch_size`.

    """
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} is not positive; use mode='greedy' instead")
    sampling = Sampling(mode, temperature, seed)
    bounds = output_bounds(max_output_tokens, len(prompts))
    numbers = range(len(prompts)) if streams is None else streams
    found: dict[int, Decoded] = {}
    with memory_guard(batch_size):
        decoder = _new_decoder(reader, prompts, bounds, sampling, max_side, deadline)
    for batch in decoder.batches(by_length(prompts, bounds), batch_size):
        own_prompts, own_bounds = [prompts[i] for i in batch], [bounds[i] for i in batch]
        noise = _noise([numbers[i] for i in batch], max(own_bounds), sampling)
        with memory_guard(batch_size):
            own_drafts = [None if drafts is None else drafts[i] for i in batch]
            spelled = decoder.decode(own_prompts, own_bounds, noise, own_drafts)
        results = _results(*spelled, own_bounds, choice_ids(reader.grid_tokens))
        found |= zip(batch, results, strict=True)
        advance(len(batch))
    return [found[index] for index in range(len(prompts))]


class _Decoder(Protocol):
    """How batches are formed and decoded."""

    def batches(self, order: Sequence[int], batch_size: int) -> Iterable[list[int]]:
        """The prompts, in this order, at most `batch_size` together."""

    def decode(
        self,
        prompts: Sequence[Prompt],
        bounds: Sequence[int],
        noise_TB12: Tensor | None,
        drafts: Sequence[Grid | None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choices int64 [B, T], UNWRITTEN behind the last, and each row's log-probability [B]."""


def follows_drafts(reader: GridReader) -> bool:
    """Whether greedy decoding is faster with drafts: by the tiny reader on a CPU."""
    return isinstance(reader, TinyReader) and reader.device.type == "cpu"


def _new_decoder(
    reader: GridReader,
    prompts: Sequence[Prompt],
    bounds: Sequence[int],
    sampling: Sampling,
    max_side: int,
    deadline: float,
) -> _Decoder:
    if follows_drafts(reader) and sampling.power is None:
        assert isinstance(reader, TinyReader)
        return DraftedDecoder(reader, max_side, deadline)
    if not is_packed(reader):
        return _CachedDecoder(reader, sampling, max_side, deadline)
    assert isinstance(reader, TinyReader)
    sizes = [len(prompt.tokens) + bound for prompt, bound in zip(prompts, bounds, strict=True)]
    return PackedDecoder(reader, sizes, sampling.power, max_side, deadline=deadline)


@dataclass(frozen=True, eq=False)
class _CachedDecoder:
    """Decoding through the cache of transformers: hub models, CPUs, float32."""

    reader: GridReader
    sampling: Sampling
    max_side: int
    deadline: float = math.inf

    def batches(self, order: Sequence[int], batch_size: int) -> list[list[int]]:
        return split(order, batch_size)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Prompt],
        bounds: Sequence[int],
        noise_TB12: Tensor | None,
        drafts: Sequence[Grid | None],
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, logits = encode_distinct(self.reader, prompts, room=max(bounds))
        batch = _Batch(rows, bounds, noise_TB12, self.sampling, self.max_side)
        count, more = 0, batch.step(logits, 0)
        while more is not None and time.monotonic() < self.deadline:
            count += 1
            more = batch.step(more, count)
        return batch.spelled()


def _results(
    choices_BT: np.ndarray, log_p_B: np.ndarray, bounds: Sequence[int], ids: Sequence[int]
) -> list[Decoded]:
    return [
        decoded(own[:bound], float(log_p), ids)
        for own, log_p, bound in zip(choices_BT, log_p_B, bounds, strict=True)
    ]


class _Batch:
    """The rows of one batch, where each belongs, and what has been chosen so far."""

    def __init__(
        self,
        rows: Rows,
        bounds: Sequence[int],
        noise_TB12: Tensor | None,
        sampling: Sampling,
        max_side: int,
    ):
        device = rows.start_R.device
        self.rows, self.sampling, self.max_side = rows, sampling, max_side
        self.bounds = bounds
        self.bound_R = torch.tensor(bounds, device=device)
        self.noise = None if noise_TB12 is None else noise_TB12.to(device)
        self.state = grammar.start(len(rows), device)
        self.place_R = torch.arange(len(rows), device=device)
        self.choices_TB = torch.full((max(bounds), len(rows)), UNWRITTEN, device=device)
        self.log_p_TB = torch.zeros(max(bounds), len(rows), device=device)

    def step(self, logits_R12: Tensor, count: int) -> Tensor | None:
        """Choose output token number `count` of every row; the next logits, None if all ended."""
        before = self.state
        choice = self._choose(logits_R12, count)
        self.state = grammar.advance(before, choice)
        if count + 1 == len(self.choices_TB):
            return None
        if (count + 1) % CHECK_EVERY == 0:
            kept = (~self.state.finished & (self.bound_R > count + 1)).nonzero()[:, 0]
            if len(kept) == 0:
                return None
            if len(kept) < len(self.rows) / 2:
                self._keep(kept)
                choice, before = choice.index_select(0, kept), before.index_select(kept)
        return self.rows.feed_choices(choice, count, before.y, before.x)

    def _choose(self, logits_R12: Tensor, count: int) -> Tensor:
        log_p = grammar.log_probabilities(logits_R12, self.state, self.max_side)
        scores = log_p
        if self.noise is not None:
            noise = self.noise[count].index_select(0, self.place_R)
            scores = log_p / self.sampling.temperature + noise
        choice = scores.argmax(dim=-1)
        self.choices_TB[count].index_copy_(0, self.place_R, choice)
        self.log_p_TB[count].index_copy_(0, self.place_R, log_p.gather(1, choice[:, None])[:, 0])
        return choice

    def _keep(self, index: Tensor) -> None:
        """Drop all rows but those at `index`."""
        self.rows.select(index)
        self.state = self.state.index_select(index)
        self.place_R = self.place_R.index_select(0, index)
        self.bound_R = self.bound_R.index_select(0, index)

    def spelled(self) -> tuple[np.ndarray, np.ndarray]:
        """Choices [B, T] and the log-probability [B] of each prompt's row up to its bound."""
        log_p_TB = self.log_p_TB.cpu().double().numpy()
        within = np.arange(len(log_p_TB))[:, None] < np.array(self.bounds)
        return self.choices_TB.T.cpu().numpy(), (log_p_TB * within).sum(0)


def decoded(choices: np.ndarray, log_probability: float, ids: Sequence[int]) -> Decoded:
    """The result that choices spell up to their first end; `ids` are the 12 token ids."""
    ends = (choices == END).nonzero()[0]
    own = choices[: ends[0] + 1] if len(ends) else choices[choices != UNWRITTEN]
    tokens = tuple(ids[choice] for choice in own)
    return Decoded(grammar.decode_choices(own), log_probability, tokens)


def _noise(streams: Sequence[int], length: int, sampling: Sampling) -> Tensor | None:
    """Gumbel noise float32 [T, B, 12], a stream for each prompt, or None for greedy decoding."""
    if sampling.mode == "greedy":
        return None
    drawn = [
        np.random.default_rng([sampling.seed, stream]).gumbel(size=(length, NUM_CHOICES))
        for stream in streams
    ]
    return torch.from_numpy(np.stack(drawn, axis=1).astype(np.float32))
