"""Constrained decoding: many prompts in, one grid each out, greedily or by sampling.

What comes out for a prompt does not depend on the batch: rows do not see each other, and sampling
is greedy decoding with noise from a random stream of each prompt's own. Two loops give the same
grids. One keeps the rows on the host, for any `Store`. The other, on packed places, is a captured
graph for each token.

The loop on the host may follow drafts. A draft is a grid that may well come out: the answer under
another view, or the input of a task that changes little. Its tokens are read at once, as those of a
prompt, which costs a fraction of writing them one by one; those that the reader would have chosen
itself are kept, and behind the first that it would not it goes on with its own choice. What comes
out is what comes out without a draft, but for rounding (greedy speculative decoding, Leviathan et
al. 2023, with drafts instead of a smaller model).

Legend: R rows of a batch, T tokens fed at once or tokens of an output, 12 choices.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE, Grid
from arctrm.model.layout import Prompt, groups
from arctrm.reader import grammar
from arctrm.reader.grammar import END, MAX_OUTPUT_TOKENS, NUM_CHOICES, ROW_END, GridState
from arctrm.reader.protocol import Reader, Store
from arctrm.reader.store import PackedStore, content
from arctrm.system import memory_errors

CHECK_EVERY = 8
"""Output tokens between two looks at which rows have ended: each look waits for the device."""
FIRST_WINDOW, LEAST_WINDOW, MOST_WINDOW = 32, 8, 256
"""Tokens of a draft that are read at once: at first; after a wrong one; after right ones."""
MOST_FAILURES = 6
"""Readings of a draft in a row of which less than two tokens were kept: it is dropped."""
FEWEST_ROWS = 64  # Rows of the smallest captured step
UNWRITTEN = -1


@dataclass(frozen=True, eq=False)
class Decoded:
    """One continuation of a prompt."""

    grid: Grid | None  # None if the bound on output tokens or the deadline came before the end
    log_probability: float
    """Sum over its tokens (nats) of the model's log-probabilities as `reader.grammar` counts them;
    the sampling temperature does not enter."""
    choices: tuple[int, ...]  # Its tokens, as `reader.grammar` numbers them, the end included

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.choices)


def decode(
    reader: Reader,
    prompts: Sequence[Prompt],
    *,
    mode: Literal["greedy", "sampled"] = "greedy",
    temperature: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    batch_size: int | None = None,
    max_output_tokens: int | Sequence[int] = MAX_OUTPUT_TOKENS,
    max_side: int = MAX_SIDE,
    drafts: Sequence[Grid | None] | None = None,
    deadline: float = math.inf,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Decoded]:
    """One grid for each prompt, in the order given; for several samples, give a prompt repeatedly.

    `batch_size` bounds the prompts side by side (default: `reader.batch_rows`). `max_output_tokens`
    is one bound for all prompts or one for each; a row that reaches it before its end gives no
    grid. Sampling raises probabilities to the power 1 / `temperature` and draws from a stream for
    each prompt, seeded by `seed` and its number in `streams` (default: its index). `drafts`, a grid
    or None for each prompt, change nothing but the time, where `reader.follows_drafts`. At
    `deadline` (of `time.monotonic`) rows that have not ended are given up: they give no grid.
    `advance` is told how many prompts are done.

    Raises:
        ResourceError: out of memory; names `judge.batch_size`.

    """
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature} is not positive; use mode='greedy' instead")
    if isinstance(max_output_tokens, int):
        max_output_tokens = [max_output_tokens] * len(prompts)
    bounds = list(max_output_tokens)
    sizes = [len(prompt.tokens) + own for prompt, own in zip(prompts, bounds, strict=True)]
    batch_size = max(1, batch_size or reader.batch_rows)
    power = None if mode == "greedy" else temperature
    drafts = drafts if drafts and reader.follows_drafts else [None] * len(prompts)
    fitting = [None if d is None or max(d.shape) > max_side else d for d in drafts]
    found: dict[int, Decoded] = {}
    order = by_length(prompts, bounds)
    with memory_guard(batch_size):
        opened = reader.opened(sizes)
    own_sizes = [sizes[index] for index in order]
    for part in groups([1] * len(order), own_sizes, batch_size, opened.capacity):
        batch = order[part]
        numbers = batch if streams is None else [streams[index] for index in batch]
        rows = [
            _Row(place, bounds[index], _noise(seed, number, bounds[index], power), fitting[index])
            for place, (index, number) in enumerate(zip(batch, numbers, strict=True))
        ]
        with memory_guard(batch_size):
            store = opened.store([prompts[i] for i in batch], [bounds[i] for i in batch])
            if isinstance(store, PackedStore):
                own = _graph_loop(store, rows, power, max_side, deadline)
            else:
                own = _host_loop(store, rows, power, max_side, deadline)
        found |= zip(batch, own, strict=True)
        advance(len(batch))
    return [found[index] for index in range(len(prompts))]


def by_length(prompts: Sequence[Prompt], room: Sequence[int]) -> list[int]:
    """Indices of prompts by the tokens that they and their outputs need; equal ones together."""
    keys = [(len(p.tokens) + own, *content(p)) for p, own in zip(prompts, room, strict=True)]
    return sorted(range(len(prompts)), key=keys.__getitem__)


def memory_guard(batch_size: int) -> AbstractContextManager[None]:
    """Turn running out of memory into a sentence that names `judge.batch_size`."""
    cure = f"; lower it, for example --set judge.batch_size={batch_size // 2}"
    if batch_size == 1:
        cure = ", which is the least; use a smaller model, a narrower dtype or a shorter prompt"
    return memory_errors(lambda: f"out of memory with judge.batch_size = {batch_size}{cure}")


class _Row:
    """A prompt that is being continued on the host; `draft` may be followed."""

    def __init__(self, number: int, bound: int, noise: np.ndarray, draft: Grid | None):
        self.number, self.bound, self.noise = number, bound, noise
        self.choices: list[int] = []
        self.log_p = 0.0
        self.last = self.next = (0, 0, 0)
        """Row, column and known width at the last choice and at the next."""
        self.path: np.ndarray | None = None
        """Choices that the draft spells; where the row has chosen already, its own."""
        self.window, self.failures = FIRST_WINDOW, 0
        if draft is not None:
            self.path, states = grammar.encode_choices(draft)
            self.states = np.stack([part.numpy() for part in (states.y, states.x, states.width)])
            """int64 [3, T]: row, column and width before each of them."""

    def take(self, choice: int, log_p: float) -> None:
        """Choose the next token."""
        y, x, width = self.last = self.next
        self.next = (y + 1, 0, x) if choice == ROW_END else (y, x + (choice < ROW_END), width)
        if self.path is not None and self.path[len(self.choices)] != choice:
            if max(choice, self.path[len(self.choices)]) < ROW_END:
                self.path[len(self.choices)] = choice  # the size is still that of the draft
            else:
                self.path = None
        self.choices.append(choice)
        self.log_p += log_p

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.choices[-1] == END or len(self.choices) == self.bound

    def feed(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens to read now: the last choice and what comes next of the draft, but not its end;
        choices [T], and where each token and the one behind it stand, [3, T + 1].
        """
        count, near = len(self.choices), np.array([self.last, self.next]).T
        if self.path is None:
            return np.array(self.choices[-1:]), near
        end = max(count, min(count + self.window, len(self.path) - 1, self.bound - 1))
        ahead = self.path[count:end]
        behind = self.states[:, count + 1 : end + 1]
        return np.append(self.choices[-1], ahead), np.hstack((near, behind))

    def keep(self, read: np.ndarray, best: np.ndarray, log_p: np.ndarray) -> int:
        """Take those of the tokens `read` of the draft that are the `best`; how many."""
        if not len(read):
            return 0
        wrong = (best[: len(read)] != read).nonzero()[0]
        kept = int(wrong[0]) if len(wrong) else len(read)
        for choice, own in zip(read[:kept].tolist(), log_p[:kept].tolist(), strict=True):
            self.take(choice, own)
        if kept < len(read):
            self.window = max(LEAST_WINDOW, min(2 * kept, MOST_WINDOW))
            self.failures = self.failures + 1 if kept < 2 else 0
            self.path = None if self.failures == MOST_FAILURES else self.path
        else:
            self.window, self.failures = min(2 * self.window, MOST_WINDOW), 0
        return kept


@torch.no_grad()
def _host_loop(
    store: Store, rows: Sequence[_Row], power: float | None, max_side: int, deadline: float
) -> list[Decoded]:
    def choose(logits: Tensor, states: np.ndarray, noise: list) -> tuple[np.ndarray, np.ndarray]:
        """The choice in each of `states` [3, T], and its log-probability."""
        log_p = grammar.log_probabilities(logits.cpu(), _state(states), max_side)
        if power is None:
            own, choice = log_p.max(-1)
        else:
            choice = (log_p / power + torch.from_numpy(np.vstack(noise))).argmax(-1)
            own = log_p.gather(1, choice[:, None])[:, 0]
        return choice.numpy(), own.double().numpy()

    logits, active = store.read(), list(rows)
    states = np.zeros((3, len(rows)), dtype=np.int64)
    best, log_p = choose(logits, states, [row.noise[:1] for row in rows])
    while True:
        # 1. Every row takes its choice; those that have ended leave.
        for row, choice, own in zip(active, best.tolist(), log_p.tolist(), strict=True):
            row.take(choice, own)
        ended = [row.number for row in active if row.finished]
        active = [row for row in active if not row.finished]
        if not active or time.monotonic() >= deadline:
            return [_decoded(np.array(row.choices), row.log_p) for row in rows]
        if ended:
            store.release(ended)
        # 2. The others read it, and what comes next of their drafts.
        fed = [row.feed() for row in active]
        counts = [len(tokens) for tokens, _ in fed]
        numbers = np.repeat([row.number for row in active], counts)
        logits = store.append(
            torch.from_numpy(numbers).to(logits.device),
            torch.from_numpy(np.concatenate([tokens for tokens, _ in fed])).to(logits.device),
            _state(np.hstack([states[:, :-1] for _, states in fed]), logits.device),
        )
        begins = [(row, len(row.choices)) for row in active]
        noise = [row.noise[n : n + c] for (row, n), c in zip(begins, counts, strict=True)]
        best, log_p = choose(logits, np.hstack([states[:, 1:] for _, states in fed]), noise)
        # 3. They keep of their drafts what they would have chosen, and choose what follows.
        begin, chosen = 0, []
        for row, (tokens, _) in zip(active, fed, strict=True):
            own = slice(begin, begin + len(tokens))
            kept = row.keep(tokens[1:], best[own], log_p[own])
            if kept < len(tokens) - 1:
                store.rewind(row.number, len(row.choices))
            chosen.append(begin + kept)
            begin += len(tokens)
        best, log_p = best[chosen], log_p[chosen]


@torch.no_grad()
def _graph_loop(
    store: PackedStore, rows: Sequence[_Row], power: float | None, max_side: int, deadline: float
) -> list[Decoded]:
    num, longest = len(rows), max(row.bound for row in rows)
    choices_TR = torch.full((longest, num + 1), UNWRITTEN, device=store.device)
    log_p_R = torch.zeros(num + 1, dtype=torch.float64, device=store.device)
    if power is not None:
        noise_TR12 = np.zeros((longest, num + 1, NUM_CHOICES), dtype=np.float32)
        for row in rows:
            noise_TR12[: row.bound, row.number] = row.noise
        noise = torch.from_numpy(noise_TR12).to(store.device)
    first = store.rows(store.read())
    step = store.step(first, _step_size(num), power, max_side)
    step.load(first, first.number, nobody=num)
    for count in range(longest):
        if power is not None:
            step.noise.copy_(noise[count].index_select(0, step.rows.number))
        step()
        choices_TR[count].index_copy_(0, step.rows.number, step.choice)
        if (count + 1) % CHECK_EVERY == 0:
            kept = step.rows.active.nonzero()[:, 0]
            if len(kept) == 0 or time.monotonic() >= deadline:
                break
            if 2 * _step_size(len(kept)) <= step.size:
                log_p_R.index_copy_(0, step.rows.number, step.rows.log_p)
                smaller = store.step(step.rows, _step_size(len(kept)), power, max_side)
                smaller.load(step.rows, kept, nobody=num)
                step = smaller
    log_p_R.index_copy_(0, step.rows.number, step.rows.log_p)
    both = zip(choices_TR.T[:num].cpu().numpy(), log_p_R[:num].tolist(), rows, strict=True)
    return [_decoded(choices[: row.bound], log_p) for choices, log_p, row in both]


def _step_size(needed: int) -> int:
    """Rows of the smallest step with room for so many: few different sizes, little left empty."""
    grain = max(FEWEST_ROWS, 2 ** (max(needed, 1) - 1).bit_length() // 8)
    return -(-needed // grain) * grain


def _decoded(choices: np.ndarray, log_probability: float) -> Decoded:
    """The result that choices spell up to their first end."""
    ends = (choices == END).nonzero()[0]
    own = choices[: ends[0] + 1] if len(ends) else choices[choices != UNWRITTEN]
    return Decoded(grammar.decode_choices(own), log_probability, tuple(own.tolist()))


def _state(states: np.ndarray, device: torch.device | str = "cpu") -> GridState:
    y, x, width = torch.from_numpy(states).to(device)
    return GridState(y, x, width, torch.zeros_like(y, dtype=torch.bool))


def _noise(seed: int, stream: int, length: int, power: float | None) -> np.ndarray:
    """Gumbel noise float32 [T, 12] of a random stream; none of it for greedy decoding."""
    generator, length = np.random.default_rng([seed, stream]), 0 if power is None else length
    return generator.gumbel(size=(length, NUM_CHOICES)).astype(np.float32)
