"""Rows: prompts in a reader's cache that are being continued, side by side.

Prompts are encoded once, identical ones only once per batch; after that a row of the cache can be
dropped, repeated or copied onto another, which is all that batching, branching and the scoring of
many candidates need. Nothing a row computes depends on the rows beside it.

Legend: R rows, U prompts that differ, S tokens fed now, K places in the cache, 12 grid tokens.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from arctrm.errors import ResourceError
from arctrm.reader.grammar import choice_ids
from arctrm.reader.interface import GridReader, Prompt, left_padded

LayerT = TypeVar("LayerT")


@dataclass(eq=False)
class Rows:
    """What a reader has read so far, row by row."""

    reader: GridReader
    cache: StaticCache
    mask_RK: Tensor
    """int64: 0 on padding, 1 everywhere else, also where nothing has been fed yet."""
    condition_R3: Tensor
    start_R: Tensor
    """int64: position number of each row's first output token."""
    grid_ids: Tensor
    """int64 [12]: the ids of the grid tokens."""
    seen: int
    """Tokens in the cache, padding included."""

    def __len__(self) -> int:
        return len(self.start_R)

    def feed(self, tokens_RS: Tensor, positions_RS: Tensor, keep: int = 1) -> Tensor:
        """Append tokens; logits float32 [R, keep, 12] of the grid tokens after the last `keep`."""
        self.seen += tokens_RS.shape[1]
        logits = self.reader.logits(
            tokens_RS,
            positions_RS,
            self.condition_R3,
            self.mask_RK[:, : self.seen],
            self.cache,
            keep,
        )
        return logits.index_select(2, self.grid_ids)

    def feed_choices(self, choice_R: Tensor, count: int, y_R: Tensor, x_R: Tensor) -> Tensor:
        """Append output token number `count` of every row; logits [R, 12] of the next one."""
        positions = self.reader.output_positions(self.start_R, count, y_R, x_R)
        tokens = self.grid_ids.index_select(0, choice_R)
        return self.feed(tokens[:, None], positions[:, None])[:, 0]

    def select(self, index: Tensor) -> None:
        """Go on with the rows at `index`, int64 on the device; one may come twice."""
        self.cache.reorder_cache(index)  # type: ignore[arg-type]  # index_select takes any int64
        self._select_columns(index)

    def copy_rows(self, source: Tensor, target: Tensor) -> None:
        """Overwrite the rows at `target` by those at `source` (no row is in both)."""
        held = [_row_tensors(layer) for layer in self.cache.layers]
        if any(tensors is None for tensors in held):
            index = torch.arange(len(self), device=target.device)
            self.select(index.index_copy(0, target, source))
            return
        columns = (self.mask_RK, self.condition_R3, self.start_R)
        for tensor in itertools.chain(columns, *(tensors or () for tensors in held)):
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    def selected(self, index: Tensor) -> "Rows":
        """The rows at `index` with a cache of their own; these rows stay as they are."""
        other = copy.copy(self)
        other.cache = copy.copy(self.cache)
        other.cache.layers = [_own_counters(layer) for layer in self.cache.layers]
        other.select(index)
        return other

    def _select_columns(self, index: Tensor) -> None:
        self.mask_RK = self.mask_RK.index_select(0, index)
        self.condition_R3 = self.condition_R3.index_select(0, index)
        self.start_R = self.start_R.index_select(0, index)


def _row_tensors(layer: object) -> tuple[Tensor, ...] | None:
    """The tensors of a cache layer that have one entry for each row; None if that is not known."""
    simple = type(layer) in (StaticLayer, StaticSlidingWindowLayer)  # a subclass may hold more
    if not (simple and isinstance(layer, StaticLayer)):
        return None
    return tuple(held for held in (layer.keys, layer.values) if held is not None)


def _own_counters(layer: LayerT) -> LayerT:
    """A cache layer that shares its keys and values, but not the counters it changes in place."""
    own = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and value.ndim == 0:
            setattr(own, name, value.clone())
    return own


def encode(reader: GridReader, prompts: Sequence[Prompt], room: int) -> tuple[Rows, Tensor]:
    """One row for each of the prompts that differ, with room for `room` more tokens.

    Returns the rows and the logits float32 [U, 12] of the first output token; `distinct` says
    which row belongs to which prompt.
    """
    tokens, positions, mask = (tensor.to(reader.device) for tensor in left_padded(prompts))
    length = tokens.shape[1]
    rows = Rows(
        reader,
        reader.new_cache(length + room),
        torch.nn.functional.pad(mask, (0, room), value=1),
        torch.tensor([prompt.condition for prompt in prompts], device=reader.device),
        torch.tensor([prompt.output_start for prompt in prompts], device=reader.device),
        torch.tensor(choice_ids(reader.grid_tokens), device=reader.device),
        seen=0,
    )
    return rows, rows.feed(tokens, positions)[:, 0]


def encode_distinct(
    reader: GridReader, prompts: Sequence[Prompt], room: int
) -> tuple[Rows, Tensor]:
    """One row for every prompt, as `encode`, but identical prompts are read only once."""
    different, row_of = distinct(prompts)
    rows, logits = encode(reader, different, room)
    if len(different) < len(prompts):
        index = torch.tensor(row_of, device=reader.device)
        rows.select(index)
        logits = logits.index_select(0, index)
    return rows, logits


def distinct(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """The prompts that differ, in order of appearance, and the place of each prompt among them."""
    places: dict[tuple, int] = {}
    different: list[Prompt] = []
    place_of: list[int] = []
    for prompt in prompts:
        key = _content(prompt)
        if key not in places:
            places[key] = len(different)
            different.append(prompt)
        place_of.append(places[key])
    return different, place_of


def by_length(prompts: Sequence[Prompt], bounds: Sequence[int]) -> list[int]:
    """Indices of prompts by the places they need in a cache; identical prompts are neighbours."""

    def key(index: int) -> tuple:
        prompt = prompts[index]
        return len(prompt.tokens) + bounds[index], *_content(prompt), index

    return sorted(range(len(prompts)), key=key)


def split(order: Sequence[int], size: int) -> list[list[int]]:
    """`order` in batches of at most `size`, one at least."""
    step = max(1, size)
    return [list(order[begin : begin + step]) for begin in range(0, len(order), step)]


def output_bounds(bound: int | Sequence[int], num_prompts: int) -> list[int]:
    """The most output tokens of each prompt, from one number for all or one for each."""
    bounds = [bound] * num_prompts if isinstance(bound, int) else list(bound)
    assert len(bounds) == num_prompts, (len(bounds), num_prompts)
    return bounds


@contextmanager
def memory_guard(batch_size: int) -> Iterator[None]:
    """Turn running out of device memory into a sentence that names `reader.batch_size`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if batch_size == 1:
            cure = "which is the least; use a smaller model, a narrower dtype or a shorter prompt"
        else:
            cure = f"lower it, for example --set reader.batch_size={batch_size // 2}"
        between = ", " if batch_size == 1 else "; "
        raise ResourceError(
            f"out of memory with reader.batch_size = {batch_size}{between}{cure}"
        ) from error


def _content(prompt: Prompt) -> tuple:
    arrays = prompt.tokens.tobytes(), prompt.positions.tobytes()
    return *arrays, prompt.output_start, prompt.condition
