"""Constrained decoding: many prompts in, one grid each out, greedily or by sampling.

A batch has one shape from its first output token to its last, apart from the few times when more
than half of its rows are finished and dropped; the host looks for that only now and then. What
comes out for a prompt does not depend on the batch: rows do not see each other, and every prompt
draws from a random stream of its own.

Legend: R rows of the batch still decoded, B prompts of the batch, T output tokens, 12 choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE, Grid
from arctrm.reader import grammar
from arctrm.reader.grammar import END, MAX_OUTPUT_TOKENS, NUM_CHOICES
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.rows import (
    Rows,
    by_length,
    encode_distinct,
    memory_guard,
    output_bounds,
    split,
)

CHECK_EVERY = 8
"""Output tokens between two looks at which rows are finished: each look waits for the device."""

BATCH_SIZE = 64


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
    advance: Callable[[int], None] = lambda done: None,
) -> list[Decoded]:
    """One grid for each prompt, in the order given; for several samples, give a prompt repeatedly.

    `max_output_tokens` is one bound for all prompts or one for each; a row that reaches it before
    its end gives no grid. Sampling draws from a random stream for each prompt, seeded by `seed`
    and its number in `streams` (default: its index). `advance` is told how many prompts are done.

    Raises:
        ResourceError: out of memory; names `reader.batch_size`.

    """
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} is not positive; use mode='greedy' instead")
    sampling = Sampling(mode, temperature, seed)
    bounds = output_bounds(max_output_tokens, len(prompts))
    numbers = range(len(prompts)) if streams is None else streams
    found: dict[int, Decoded] = {}
    for batch in split(by_length(prompts, bounds), batch_size):
        own_prompts, own_bounds = [prompts[i] for i in batch], [bounds[i] for i in batch]
        noise = _noise([numbers[i] for i in batch], max(own_bounds), sampling)
        with memory_guard(batch_size):
            results = _decode_batch(reader, own_prompts, own_bounds, noise, sampling, max_side)
        found |= zip(batch, results, strict=True)
        advance(len(batch))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def _decode_batch(
    reader: GridReader,
    prompts: Sequence[Prompt],
    bounds: Sequence[int],
    noise: Tensor | None,
    sampling: Sampling,
    max_side: int,
) -> list[Decoded]:
    rows, logits = encode_distinct(reader, prompts, room=max(bounds))
    batch = _Batch(rows, bounds, noise, sampling, max_side)
    count, more = 0, batch.step(logits, 0)
    while more is not None:
        count += 1
        more = batch.step(more, count)
    return batch.results()


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
        self.choices_TB = torch.full((max(bounds), len(rows)), END, device=device)
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

    def results(self) -> list[Decoded]:
        """What was decoded for each prompt of the batch."""
        ids = self.rows.grid_ids.tolist()
        choices, log_p = self.choices_TB.T.cpu().numpy(), self.log_p_TB.T.cpu().double().numpy()
        return [
            decoded(own[:bound], float(own_log_p[:bound].sum()), ids)
            for own, own_log_p, bound in zip(choices, log_p, self.bounds, strict=True)
        ]


def decoded(choices: np.ndarray, log_probability: float, ids: Sequence[int]) -> Decoded:
    """The result that choices spell up to their first end; `ids` are the 12 token ids."""
    ends = (choices == END).nonzero()[0]
    own = choices[: ends[0] + 1] if len(ends) else choices
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
