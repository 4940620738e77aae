"""Keys and values of prompts side by side, and of the outputs written after them so far.

A row is a prompt and its output. Nothing is padded: the tokens of all rows go through the layers
together (`Trunk.hidden`), only attention is a row's own. A row that is made shorter forgets its
end, which is then overwritten. Keys and values lie in one of two forms behind the same methods.

- `RowStore`: a buffer for each row (CPUs).
- `PackedStore`: ranges on one axis of places (GPUs). Ranges lie in the order of the rows, so the
  packed kernel, which knows sequences by where they begin and end, reads of every row exactly the
  places that are filled. One output token of all rows is one CUDA graph (`Step`).

Legend: R rows, U prompts that differ, T tokens of one pass, P places, D width, A heads, K head
width, 12 choices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.model.attention import Pieces, ragged_attention
from arctrm.model.layout import CHOICES, SIDE, Prompt, groups
from arctrm.model.trunk import Trunk
from arctrm.reader import grammar
from arctrm.reader.grammar import END, NUM_CHOICES, GridState
from arctrm.reader.last_token import last_token_attention

TOKENS_AT_ONCE = 2**17  # Tokens of one pass through the layers, unless a single row has more

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values), each [T, A, K] -> [T, A, K]."""


class RowStore:
    """Keys and values of each row apart, as long as the row may become; follows `Store`."""

    def __init__(self, trunk: Trunk, prompts: Sequence[Prompt], room: Sequence[int]):
        self.trunk, self.device, self.prompts = trunk, trunk.device, prompts
        self.lengths = np.array([len(prompt.tokens) for prompt in prompts], dtype=np.int64)
        """Tokens of each prompt."""
        self.sizes = self.lengths + np.array(room, dtype=np.int64)
        self.used = np.zeros_like(self.lengths)
        """Places that are filled."""
        self.held: list[Tensor] = []
        """[depth, 2, A, P, K] of each row."""
        self.ids = torch.tensor(CHOICES, device=self.device)
        self.start_R = torch.tensor([p.output_start for p in prompts], device=self.device)
        conditions = torch.tensor([p.condition for p in prompts], device=self.device)
        self.condition_RD = trunk.condition(conditions)

    @torch.no_grad()
    def read(self) -> Tensor:
        """See `Store.read`."""
        self._make_room()
        self.used[:] = 0
        first, place_of = distinct(self.prompts)
        found = []
        for part in groups(np.ones_like(first), self.lengths[first], len(first), TOKENS_AT_ONCE):
            rows, counts = first[part], self.lengths[first[part]]
            told = [(self.prompts[row].tokens, self.prompts[row].positions) for row in rows]
            tokens = np.vstack((np.repeat(rows, counts), np.concatenate(told, axis=1)))
            hidden = self._pass(rows, counts, self.sent(tokens), True)
            last = self.sent(counts.cumsum() - 1)
            found.append(self.trunk.grid_logits(hidden.index_select(0, last)))
        others = np.setdiff1d(np.arange(len(self.prompts)), first)
        self._copy(first[place_of[others]], others)
        self.used = self.lengths.copy()
        return torch.cat(found).index_select(0, self.sent(place_of))

    @torch.no_grad()
    def append(self, rows: Tensor, choices: Tensor, states: GridState) -> Tensor:
        """See `Store.append`."""
        numbers, counts = np.unique(rows.cpu().numpy(), return_counts=True)
        tokens = self.ids.index_select(0, choices)
        positions = self.start_R.index_select(0, rows) + states.y * SIDE + states.x
        new_3T, ends, found = torch.stack((rows, tokens, positions)), offsets(counts), []
        for part in groups(np.ones_like(counts), counts, len(counts), TOKENS_AT_ONCE):
            own = slice(int(ends[part.start]), int(ends[part.stop]))
            hidden = self._pass(numbers[part], counts[part], new_3T[:, own], False)
            found.append(self.trunk.grid_logits(hidden))
        return torch.cat(found)

    def rewind(self, row: int, length: int) -> None:
        """See `Store.rewind`."""
        self.used[row] = self.lengths[row] + length

    def release(self, rows: Sequence[int]) -> None:
        """See `Store.release`."""
        for row in rows:
            self.held[row] = torch.empty(0)

    def sent(self, numbers: np.ndarray) -> Tensor:
        """Numbers of the host on the device."""
        return torch.from_numpy(numbers).to(self.device)

    def _pass(self, rows: np.ndarray, counts: np.ndarray, new_3T: Tensor, whole: bool) -> Tensor:
        """Hidden states [T, D] of new tokens (row, token, position), `counts` of each row, which
        see each other `whole` or those before them.
        """
        row_T, token_T, position_T = new_3T
        x = self.trunk.embed(token_T, self.condition_RD.index_select(0, row_T))
        hidden = self.trunk.hidden(x, position_T, self._attention(rows, counts, whole))
        self.used[rows] += counts
        return hidden

    def _make_room(self) -> None:
        config = self.trunk.config
        heads, width = config.num_heads, config.hidden_size // config.num_heads
        shapes = ((config.depth, 2, heads, size, width) for size in self.sizes.tolist())
        none = torch.empty(0, dtype=self.trunk.dtype, device=self.device)
        self.held = [none.new_empty(shape) for shape in shapes]

    def _copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy the keys and values of prompts."""
        for old, new in zip(source.tolist(), target.tolist(), strict=True):
            read = slice(self.lengths[new])
            self.held[new][:, :, :, read] = self.held[old][:, :, :, read]

    def _attention(self, rows: np.ndarray, counts: np.ndarray, whole: bool) -> Attend:
        begins, lengths = self.used[rows].tolist(), counts.tolist()
        own = [self.held[row] for row in rows.tolist()]
        ones = functools.partial(torch.ones, dtype=torch.bool, device=self.device)
        masks = [
            None if whole or new == 1 else ones(new, begin + new).tril(begin)
            for begin, new in zip(begins, lengths, strict=True)
        ]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = (x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value))
            done = []
            for held, begin, mask, q, k, v in zip(own, begins, masks, *parts, strict=True):
                end = begin + q.shape[1]
                keys, values = held[layer]
                keys[:, begin:end], values[:, begin:end] = k, v
                seen = keys[None, :, :end], values[None, :, :end]
                done.append(F.scaled_dot_product_attention(q[None], *seen, attn_mask=mask)[0])
            return torch.cat(done, dim=1).transpose(0, 1)

        return attend


class Places:
    """Keys and values [depth, P + 1, A, K] of all stores of a call, one store at a time.

    Whatever is written to place P is lost. A step is captured once for a number of rows.
    """

    def __init__(self, trunk: Trunk, count: int):
        self.trunk, self.count, self.device = trunk, count, trunk.device
        config = trunk.config
        heads, width = config.num_heads, config.hidden_size // config.num_heads
        shape = config.depth, count + 1, heads, width
        self.keys = torch.zeros(shape, dtype=trunk.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.ids = torch.tensor(CHOICES, device=self.device)
        self.steps: dict[tuple, Step] = {}

    def write(
        self, layer: int, place_T: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put the keys and values of tokens into their places; all those of the layer."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(0, place_T, key), values.index_copy_(0, place_T, value)


class PackedStore(RowStore):
    """Rows on ranges of `places`; follows `Store`."""

    def __init__(self, places: Places, prompts: Sequence[Prompt], room: Sequence[int]):
        super().__init__(places.trunk, prompts, room)
        self.places, self.begin = places, offsets(self.sizes)[:-1]

    def release(self, rows: Sequence[int]) -> None:
        """See `Store.release`; all places are free for the next store."""

    def _make_room(self) -> None:
        assert self.sizes.sum() <= self.places.count

    def _copy(self, source: np.ndarray, target: np.ndarray) -> None:
        lengths = self.lengths[target]
        for part in groups(np.ones_like(target), lengths, len(target), TOKENS_AT_ONCE):
            both = (self.begin[rows[part]] for rows in (source, target))
            old, new = (self.sent(ranges(begin, lengths[part])) for begin in both)
            for held in (*self.places.keys, *self.places.values):
                held.index_copy_(0, new, held.index_select(0, old))

    def _attention(self, rows: np.ndarray, counts: np.ndarray, whole: bool) -> Attend:
        begin, used = self.begin[rows], self.used[rows]
        place, ends = self.sent(ranges(begin + used, counts)), self.sent(offsets(counts)).int()
        # Pieces follow each other without a gap: what a row does not fill has keys, but no queries.
        filled = np.stack((begin, begin + used + counts), 1).ravel()
        pieces = Pieces(ends.repeat_interleave(2)[1:-1], self.sent(filled).int())
        longest, most_seen = int(counts.max()), int(np.diff(filled).max())

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            held = self.places.write(layer, place, key, value)
            if whole:
                alone = Pieces(ends, ends)
                return ragged_attention(query, key, value, alone, longest, longest, causal=False)
            return ragged_attention(query, *held, pieces, longest, most_seen)

        return attend

    def rows(self, logits_R12: Tensor) -> "StepRows":
        """The rows as a step takes them, their prompts read."""
        number = torch.arange(len(self.prompts), device=self.device)
        state = grammar.start(len(number), self.device)
        return StepRows(
            number=number,
            begin=self.sent(self.begin),
            used=self.sent(self.used),
            left=self.sent(self.sizes - self.lengths),
            output_start=self.start_R,
            condition=self.condition_RD,
            logits=logits_R12,
            active=~state.finished,
            log_p=torch.zeros_like(number, dtype=torch.float64),
            **vars(state),
        )

    def step(self, like: "StepRows", size: int, power: float | None, max_side: int) -> "Step":
        """The step with room for so many rows; captured once in a call."""
        key = size, power, max_side
        if key not in self.places.steps:
            self.places.steps[key] = Step(self.places, like, *key)
        return self.places.steps[key]


class StepRows(NamedTuple):
    """What a step knows of each row, [R] each."""

    number: Tensor  # of the row in its store
    begin: Tensor  # its first place
    used: Tensor  # places that are filled
    left: Tensor  # output tokens that it may still have
    output_start: Tensor  # position number of its first output token
    condition: Tensor  # [R, D]
    logits: Tensor  # float32 [R, 12]: of its next token
    active: Tensor  # whether it has a next token
    log_p: Tensor  # float64: sum over its output tokens
    y: Tensor
    x: Tensor
    width: Tensor
    finished: Tensor


class Step:
    """One output token of all rows: choose it by the grammar, and feed it.

    `rows`, `noise` and `choice` stay where they are, so that a CUDA graph, captured once, serves
    every batch of a call. Rows that have ended write to a place that nobody reads, and see none. On
    a CPU (tests) the same runs uncaptured. `power` is the temperature, None for greedy decoding.
    """

    def __init__(self, places: Places, like: StepRows, size: int, power: float | None, most: int):
        self.places, self.size, self.power, self.max_side = places, size, power, most
        self.rows = StepRows(*(own.new_zeros(size, *own.shape[1:]) for own in like))
        self.noise = torch.zeros(size, NUM_CHOICES, device=places.device)
        self.choice = torch.full((size,), END, device=places.device)
        self.graph = self._captured() if places.device.type == "cuda" else None

    def load(self, source: StepRows, kept: Tensor, nobody: int) -> None:
        """Take over the rows at `kept`; all others get the number `nobody`."""
        for target, own in zip(self.rows, source, strict=True):
            target[: len(kept)].copy_(own.index_select(0, kept))
        self.rows.active[len(kept) :] = False
        self.rows.number[len(kept) :] = nobody

    def __call__(self) -> None:
        """Choose a token in every row and feed it."""
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of a step. It is warmed up on rows that have ended, which has no effect."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may touch CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()
        return graph

    def _run(self) -> None:
        rows, places, trunk = self.rows, self.places, self.places.trunk
        state = GridState(rows.y, rows.x, rows.width, rows.finished)
        log_p = grammar.log_probabilities(rows.logits, state, self.max_side)
        scores = log_p if self.power is None else log_p / self.power + self.noise
        self.choice.copy_(torch.where(rows.active, scores.argmax(dim=-1), END))
        own = log_p.gather(1, self.choice[:, None])[:, 0]
        rows.log_p.add_(torch.where(rows.active, own, 0))
        positions = rows.output_start + rows.y * SIDE + rows.x
        after = grammar.advance(state, self.choice)
        rows.left.sub_(1)
        rows.active.logical_and_(~after.finished & (rows.left > 0))
        for name, value in vars(after).items():
            getattr(rows, name).copy_(value)
        place = torch.where(rows.active, rows.begin + rows.used, places.count)
        filled = torch.where(rows.active, rows.used + 1, 0)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            held = places.write(layer, place, key, value)
            return last_token_attention(query, *held, rows.begin, filled)

        x = trunk.embed(places.ids.index_select(0, self.choice), rows.condition)
        rows.logits.copy_(trunk.grid_logits(trunk.hidden(x, positions, attend)))
        rows.used.add_(rows.active)


def distinct(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """The first row [U] of each prompt that differs, and the place [R] of each row among them."""
    places: dict[tuple, int] = {}
    place_of = [places.setdefault(content(prompt), len(places)) for prompt in prompts]
    return np.unique(place_of, return_index=True)[1], np.array(place_of)


def content(prompt: Prompt) -> tuple:
    """Equal where prompts are."""
    arrays = prompt.tokens.tobytes(), prompt.positions.tobytes()
    return *arrays, prompt.output_start, prompt.condition


def ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers begin .. begin + length - 1 of each range, one after another, int64."""
    ends = lengths.cumsum()
    return np.repeat(begins - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where sequences of these lengths begin, and where the last one ends: int64 [n + 1]."""
    return np.append(0, lengths.cumsum())
