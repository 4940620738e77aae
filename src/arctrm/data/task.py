"""What a task is: grids, pairs, tasks. Parsing and checking live in `arctrm.data.parse`."""

import hashlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

Grid = np.ndarray  # 2-D, uint8, 1..30 x 1..30, colours 0..9
MAX_SIDE = 30
NUM_COLOURS = 10


@dataclass(frozen=True)
class Pair:
    """An input grid and its output grid; `output` is None where the answer is not known."""

    input: Grid
    output: Grid | None = None


@dataclass(frozen=True)
class Task:
    """An ARC task: demonstrations (with outputs) and test pairs (outputs possibly absent)."""

    id: str
    demonstrations: tuple[Pair, ...]
    test: tuple[Pair, ...] = ()

    def without_answers(self) -> "Task":
        """The same task with every test output dropped: what solvers may see."""
        return replace(self, test=tuple(Pair(pair.input) for pair in self.test))

    @property
    def has_answers(self) -> bool:
        """Whether every test pair has its output."""
        return bool(self.test) and all(pair.output is not None for pair in self.test)

    def fingerprint(self) -> str:
        """12 hex digits over the content of the demonstrations, whatever their order or the id."""
        grids = ((p.input, p.output) for p in self.demonstrations)
        texts = (" ".join(str(g if g is None else g.tolist()) for g in pair) for pair in grids)
        return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:12]


def grid_key(grid: Grid | None) -> Hashable:
    """A hashable value that is equal exactly where two grids are."""
    return None if grid is None else (grid.shape, grid.tobytes())


def pair_key(pair: Pair) -> Hashable:
    """A hashable value that is equal exactly where two pairs have the same content."""
    return grid_key(pair.input), grid_key(pair.output)


def training_pairs(task: Task, in_test_set: bool) -> Iterator[tuple[Pair, bool]]:
    """The (pair, is_test) of a task that may be trained on: the one place that decides it."""
    for pair in task.demonstrations:
        yield pair, False
    for pair in () if in_test_set else task.test:
        if pair.output is not None:
            yield pair, True


def in_hash_order(ids: Iterable[str]) -> list[str]:
    """The ids, each once, in the order of their hashes, which says nothing about their tasks."""
    return sorted(set(ids), key=lambda i: hashlib.sha256(i.encode()).hexdigest())


def held_out_ids(ids: Iterable[str], count: int) -> set[str]:
    """`count` of the ids, the same whatever their order: those whose hashes come first."""
    return set(in_hash_order(ids)[:count])
