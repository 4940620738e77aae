"""The tiny reader: the trunk's reader voice behind `reader.protocol.Reader`.

It is told a task by vectors and reads one input at a time, whole. On a GPU its rows lie packed on
one axis of places, in memory that the stores of a call share; on a CPU each row has a buffer.
"""

import copy
import sys
from collections.abc import Sequence

import torch

from arctrm.data.task import Grid, Pair
from arctrm.model import layout
from arctrm.model.layout import Condition, Prompt
from arctrm.model.trunk import Trunk
from arctrm.reader.last_token import has_kernel
from arctrm.reader.store import PackedStore, Places, RowStore

CPU_ROWS, PACKED_ROWS, GPU_ROWS = 16, 4096, 512
"""Prompts side by side: on a CPU; packed, where what memory has room for bounds them, too; on a GPU
without a compiler for the packed rows' kernel."""
MEMORY_SHARE, MOST_MEMORY = 1 / 3, 32 * 2**30
"""Of a GPU's free memory, and bytes at most, for keys and values."""


class TinyReader:
    """Reads with a trunk in the trunk's `dtype`; follows `Reader`.

    `asks_inverse`: it was trained on inverse tasks. `packed` and `max_places` are for tests: by
    default rows are packed on a GPU, on as many places as its memory can spare.
    """

    name = "the tiny reader"

    def __init__(
        self,
        trunk: Trunk,
        *,
        asks_inverse: bool = False,
        packed: bool | None = None,
        max_places: int | None = None,
    ):
        self.trunk, self.asks_inverse, self.max_places = trunk, asks_inverse, max_places
        self.packed = has_kernel(trunk.device) if packed is None else packed
        self._places: Places | None = None
        self._frozen: Trunk | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trunk.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.trunk.dtype

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.trunk.width

    @property
    def follows_drafts(self) -> bool:
        """On a CPU, where a token read costs a fraction of a token written."""
        return self.device.type == "cpu" and not self.packed

    @property
    def batch_rows(self) -> int:
        """Prompts side by side where nobody says how many."""
        if self.packed:
            return PACKED_ROWS
        return CPU_ROWS if self.device.type == "cpu" else GPU_ROWS

    @property
    def capacity(self) -> int:
        """Tokens that all rows of one store may have together."""
        return sys.maxsize if self._places is None else self._places.count

    def prompt(
        self, query: Grid, condition: Condition = Condition(), pairs: Sequence[Pair] = ()
    ) -> Prompt:
        """The prompt that asks for the output of `query`; the task is told by its `condition`."""
        return layout.prompt(query, condition)

    def opened(self, sizes: Sequence[int]) -> "TinyReader":
        """See `Reader.opened`: with weights cast once, and places for rows of these `sizes`."""
        other = copy.copy(self)
        other._frozen = self.trunk.cast(self.dtype)
        if self.packed:
            most = self.max_places or affordable_places(self.trunk)
            count = max(max(sizes, default=0), min(sum(sizes), most))
            other._places = Places(other._frozen, count)
        return other

    def store(self, prompts: Sequence[Prompt], room: Sequence[int]) -> RowStore:
        """See `Reader.store`."""
        if self._frozen is None:
            sizes = [len(p.tokens) + own for p, own in zip(prompts, room, strict=True)]
            return self.opened(sizes).store(prompts, room)
        if self._places is None:
            return RowStore(self._frozen, prompts, room)
        return PackedStore(self._places, prompts, room)


def affordable_places(trunk: Trunk) -> int:
    """Places whose keys and values fit into the share of the GPU's memory that they may take."""
    free = torch.cuda.mem_get_info(trunk.device)[0]
    free += torch.cuda.memory_reserved(trunk.device) - torch.cuda.memory_allocated(trunk.device)
    of_place = 2 * trunk.config.depth * trunk.width * trunk.dtype.itemsize
    return int(min(free * MEMORY_SHARE, MOST_MEMORY)) // of_place
