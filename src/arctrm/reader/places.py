"""Keys and values of many rows on one axis of places, without padding.

A row (a prompt and what follows it) owns a range of places as long as it may become. Ranges lie in
the order of the rows, so the packed attention kernel, which knows sequences by where they begin and
end, reads of every row exactly the places that are filled.

Legend: R rows, U prompts that differ, T tokens fed now, P places, A heads, K head width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arctrm.reader.attention import ragged_attention
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.last_attention import has_kernel, last_attention
from arctrm.reader.lean import Lean
from arctrm.reader.rows import distinct
from arctrm.reader.tiny import TinyReader
from arctrm.trm.packing import has_packed_kernel

TOKENS_AT_ONCE = 2**17
"""Tokens of one pass through the layers, unless a single row has more."""
MEMORY_SHARE, MOST_MEMORY = 1 / 3, 32 * 2**30
"""Of the device's free memory, and bytes at most, for keys and values."""


def is_packed(reader: GridReader) -> bool:
    """Whether grids are decoded and scored on packed places: by a tiny reader on a GPU in 16 bits.

    All others (hub models, CPUs, float32, torch without Triton) go through transformers' cache, see
    `reader.rows`.
    """
    return (
        isinstance(reader, TinyReader)
        and has_kernel()
        and has_packed_kernel(reader.device, reader.dtype)
    )


def affordable_places(reader: TinyReader) -> int:
    """Places whose keys and values fit into the share of the device's memory that they may take."""
    free = torch.cuda.mem_get_info(reader.device)[0]
    free += torch.cuda.memory_reserved(reader.device) - torch.cuda.memory_allocated(reader.device)
    of_place = 2 * reader.config.depth * reader.hidden_size * reader.dtype.itemsize
    return int(min(free * MEMORY_SHARE, MOST_MEMORY)) // of_place


def groups(sizes: Sequence[int], most: int, most_together: int) -> Iterator[slice]:
    """Consecutive items, at most `most`, of at most `most_together` in sum; one item at least."""
    begin, together = 0, 0
    for index, size in enumerate(sizes):
        if index > begin and (index - begin == most or together + size > most_together):
            yield slice(begin, index)
            begin, together = index, 0
        together += size
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers begin .. begin + length - 1 of each range, one after another, int64."""
    ends = lengths.cumsum()
    return np.repeat(begins - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where sequences of these lengths begin, and where the last one ends: int64 [n + 1]."""
    return np.append(0, lengths.cumsum())


class Places:
    """Keys and values, [layer, P + 1, A, K] each; whatever is written to place P is lost."""

    def __init__(self, lean: Lean, count: int):
        self.lean, self.count, self.device = lean, count, lean.grid_ids.device
        shape = lean.num_layers, count + 1, lean.num_heads, lean.head_width
        self.keys = torch.zeros(shape, dtype=lean.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)

    def to_device(self, numbers: np.ndarray | Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Numbers of the host on the device."""
        return torch.as_tensor(np.asarray(numbers)).to(self.device, dtype)

    def read(self, prompts: Sequence[Prompt], begin_R: np.ndarray) -> Tensor:
        """Put prompts into the rows that begin there; logits [R, 12] of each first output token.

        Identical prompts go through the layers once.
        """
        different, place_of = distinct(prompts)
        own = np.unique(place_of, return_index=True)[1]  # the first row of each prompt
        lengths = np.array([len(prompt.tokens) for prompt in different])
        parts = groups(lengths.tolist(), len(different), TOKENS_AT_ONCE)
        logits_U12 = torch.cat([self._read(different[s], begin_R[own[s]]) for s in parts])
        others = np.setdiff1d(np.arange(len(prompts)), own)
        if len(others):
            of_other = np.array(place_of)[others]
            self._copy(begin_R[own[of_other]], begin_R[others], lengths[of_other])
        return logits_U12.index_select(0, self.to_device(place_of, torch.long))

    def _read(self, prompts: Sequence[Prompt], begins: np.ndarray) -> Tensor:
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        places = self.to_device(ranges(begins, lengths), torch.long)
        ends, longest = self.to_device(offsets(lengths), torch.int32), int(lengths.max())
        condition = self.lean.condition(self.to_device([p.condition for p in prompts], torch.long))
        counts = self.to_device(lengths, torch.long)
        seen_whole = self.lean.reader.config.sees_inputs_whole

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.write(layer, places, key, value)
            return ragged_attention(
                query, key, value, ends, ends, longest, longest, causal=not seen_whole
            )

        hidden = self.lean.hidden(
            self.to_device(np.concatenate([p.tokens for p in prompts]), torch.long),
            self.to_device(np.concatenate([p.positions for p in prompts]), torch.long),
            condition.repeat_interleave(counts, 0, output_size=int(lengths.sum())),
            attend,
        )
        return self.lean.logits(hidden.index_select(0, ends[1:].long() - 1))

    def write(
        self, layer: int, places_T: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put the keys and values of tokens into their places; all those of the layer."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(0, places_T, key), values.index_copy_(0, places_T, value)

    def _copy(self, source: np.ndarray, target: np.ndarray, lengths: np.ndarray) -> None:
        """Copy ranges of places, a layer at a time, a bounded number of places at once."""
        for part in groups(lengths.tolist(), len(lengths), TOKENS_AT_ONCE):
            old, new = (
                self.to_device(ranges(begins[part], lengths[part]), torch.long)
                for begins in (source, target)
            )
            for layer in range(self.lean.num_layers):
                key, value = (held[layer].index_select(0, old) for held in (self.keys, self.values))
                self.write(layer, new, key, value)


@dataclass(frozen=True, eq=False)
class Appended:
    """Attention of new tokens, each row's last ones, over all its tokens (they are written first).

    Sequence n is queries begin_q[n] : begin_q[n + 1] over places begin_k[n] : begin_k[n + 1].
    """

    places: Places
    place_T: Tensor
    begin_q: Tensor
    begin_k: Tensor
    max_q: int
    max_k: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write keys and values, then attend; an `Attend`."""
        keys, values = self.places.write(layer, self.place_T, key, value)
        return ragged_attention(
            query, keys, values, self.begin_q, self.begin_k, self.max_q, self.max_k
        )


@dataclass(frozen=True, eq=False)
class Continued:
    """Attention of one new token in each row, which is written first, over what the row then holds.

    All int64 [R]: its place, the row's first place, the places that the row fills.
    """

    places: Places
    place_R: Tensor
    begin_R: Tensor
    filled_R: Tensor

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write keys and values, then attend; an `Attend`."""
        keys, values = self.places.write(layer, self.place_R, key, value)
        return last_attention(query, keys, values, self.begin_R, self.filled_R)
