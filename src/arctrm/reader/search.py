"""Threshold search: every grid that a prompt makes at least so probable, breadth first.

All open branches of all prompts of a batch are decoded side by side, one token at a time. A branch
owns a slot: a row of the cache. Where a branch splits, its row is copied to the slot of a branch
that has died; only when none is left does the batch grow. Probabilities of different branches sum
to at most 1, so that at most 1 / min_probability of them are ever open for a prompt.

The bookkeeping (a few numbers per branch) is done on the host: one token more waits for the device
once, for 12 logits per branch.

Legend: R slots, C children (branch and choice), T output tokens, 12 choices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from arctrm.data.task import MAX_SIDE
from arctrm.reader import grammar
from arctrm.reader.decoding import BATCH_SIZE, Decoded, decoded
from arctrm.reader.grammar import END, MAX_OUTPUT_TOKENS, GridState
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.rows import (
    Rows,
    by_length,
    encode_distinct,
    memory_guard,
    output_bounds,
    split,
)

BRANCHES_EXPECTED = 4
"""Slots of a batch per prompt it starts with."""


@dataclass(frozen=True)
class Threshold:
    """What the search looks for."""

    min_probability: float
    max_candidates: int
    max_side: int = MAX_SIDE

    @property
    def min_log_p(self) -> float:
        """The threshold in nats."""
        return math.log(self.min_probability)


def threshold_search(
    reader: GridReader,
    prompts: Sequence[Prompt],
    min_probability: float,
    *,
    max_candidates: int = 16,
    batch_size: int = BATCH_SIZE,
    max_output_tokens: int | Sequence[int] = MAX_OUTPUT_TOKENS,
    max_side: int = MAX_SIDE,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Decoded]]:
    """Every grid of probability >= `min_probability` of each prompt, the most probable first.

    The greedy grid is always among them, however improbable (and with grid None if it reaches its
    bound of tokens). No prompt gets more than `max_candidates`, nor are more of its branches ever
    followed at a time: where 1 / min_probability is larger, the most probable ones are kept, which
    is then a beam search. `batch_size` bounds the branches of a batch.

    Raises:
        ResourceError: out of memory; names `reader.batch_size`.

    """
    if not 0 < min_probability <= 1:
        raise ValueError(f"min_probability = {min_probability} is not in (0, 1]; try 0.1")
    threshold = Threshold(min_probability, max_candidates, max_side)
    bounds = output_bounds(max_output_tokens, len(prompts))
    found: dict[int, list[Decoded]] = {}
    todo = split(by_length(prompts, bounds), batch_size // BRANCHES_EXPECTED)
    while todo:
        batch = todo.pop()
        own_prompts, own_bounds = [prompts[i] for i in batch], [bounds[i] for i in batch]
        with memory_guard(batch_size):
            results = _search_batch(reader, own_prompts, own_bounds, threshold, batch_size)
        done = {index: own for index, own in zip(batch, results, strict=True) if own is not None}
        if len(done) < len(batch):
            todo.append([index for index in batch if index not in done])
        found |= done
        advance(len(done))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def _search_batch(
    reader: GridReader,
    prompts: Sequence[Prompt],
    bounds: Sequence[int],
    threshold: Threshold,
    batch_size: int,
) -> list[list[Decoded] | None]:
    """What is found for each prompt; None for those that had to give up their slots to others."""
    rows, logits = encode_distinct(reader, prompts, room=max(bounds))
    search = _Search(rows, bounds, threshold, batch_size)
    for count in range(max(bounds)):
        search.extend(logits, count)
        if not search.branches.open.any():
            break
        logits = search.feed(count)
    return search.results()


@dataclass(frozen=True, eq=False)
class _Branches:
    """One entry for each slot, on the host; closed ones hold nothing of interest."""

    open: Tensor
    """bool [R]: the slot holds a branch that has not ended."""
    prompt: Tensor
    """int64 [R]: place of its prompt in the batch."""
    total: Tensor
    """float64 [R]: log-probability of its tokens."""
    greedy: Tensor
    """bool [R]: it took the most probable choice every time."""
    choices: Tensor
    """int64 [R, T]."""
    before: GridState
    """State before the last choice: where the token stands that is to be fed."""
    state: GridState

    def index_select(self, index: Tensor) -> "_Branches":
        """The branches at `index`."""
        return _Branches(
            self.open.index_select(0, index),
            self.prompt.index_select(0, index),
            self.total.index_select(0, index),
            self.greedy.index_select(0, index),
            self.choices.index_select(0, index),
            self.before.index_select(index),
            self.state.index_select(index),
        )


@dataclass(frozen=True, eq=False)
class _Children:
    """Branches made longer by one choice."""

    parent: Tensor
    """int64 [C], ascending: slot of the branch."""
    choice: Tensor
    """int64 [C]."""
    total: Tensor
    """float64 [C]: log-probability, the new token's included."""
    greedy: Tensor
    """bool [C]."""
    prompt: Tensor
    """int64 [C]."""

    def __len__(self) -> int:
        return len(self.parent)

    def where(self, kept: Tensor) -> "_Children":
        """The children for which `kept`, bool [C], holds."""
        return _Children(*(getattr(self, field.name)[kept] for field in fields(self)))


class _Search:
    """The search through one batch of prompts."""

    def __init__(self, rows: Rows, bounds: Sequence[int], threshold: Threshold, batch_size: int):
        num = len(rows)
        self.rows, self.threshold, self.batch_size = rows, threshold, batch_size
        self.bounds = torch.tensor(bounds)
        self.found: list[list[tuple[Decoded, bool]] | None] = [[] for _ in bounds]
        self.ids = rows.grid_ids.tolist()
        self.branches = _Branches(
            open=torch.ones(num, dtype=torch.bool),
            prompt=torch.arange(num),
            total=torch.zeros(num, dtype=torch.float64),
            greedy=torch.ones(num, dtype=torch.bool),
            choices=torch.full((num, max(bounds)), END),
            before=grammar.start(num),
            state=grammar.start(num),
        )

    def extend(self, logits_R12: Tensor, count: int) -> None:
        """Make every branch longer by each choice that stays above the threshold."""
        children = self._within_batch(self._likely_children(logits_R12))
        slot, source = self._slots(children.parent)
        if len(source) != len(self.branches.open):
            self._select(source)
        else:
            self._copy(source)
        self._write(children, slot, count)
        self._collect(count + 1)
        num_open = int(self.branches.open.sum())
        if 0 < num_open < len(self.branches.open) / 2:
            self._select(self.branches.open.nonzero()[:, 0])

    def feed(self, count: int) -> Tensor:
        """Feed token number `count` of every branch; the next logits [R, 12]."""
        branches = self.branches
        columns = torch.stack([branches.choices[:, count], branches.before.y, branches.before.x])
        choice, y, x = columns.to(self.rows.start_R.device).unbind()
        return self.rows.feed_choices(choice, count, y, x)

    def results(self) -> list[list[Decoded] | None]:
        """The candidates of each prompt, the most probable first; None for a postponed prompt."""
        return [None if own is None else self._best(own) for own in self.found]

    def _best(self, found: Sequence[tuple[Decoded, bool]]) -> list[Decoded]:
        ranked = sorted(found, key=lambda entry: -entry[0].log_probability)
        best, rest = (
            ranked[: self.threshold.max_candidates],
            ranked[self.threshold.max_candidates :],
        )
        best[-1:] = [entry for entry in rest if entry[1]] or best[-1:]
        return [entry for entry, _ in best]

    def _likely_children(self, logits_R12: Tensor) -> _Children:
        branches, limit = self.branches, self.threshold
        log_p = grammar.log_probabilities(logits_R12.cpu(), branches.state, limit.max_side)
        total = branches.total[:, None] + log_p.double()
        total[~branches.open] = -math.inf
        greedy = torch.zeros_like(log_p, dtype=torch.bool)
        followed = branches.greedy & branches.open
        greedy[followed, log_p[followed].argmax(dim=-1)] = True
        parent, choice = ((total >= limit.min_log_p) | greedy).nonzero(as_tuple=True)
        at = parent, choice
        children = _Children(*at, total[at], greedy[at], branches.prompt[parent])
        return children.where((_rank(children) < limit.max_candidates) | children.greedy)

    def _within_batch(self, children: _Children) -> _Children:
        """Postpone the prompts of most branches where there are more than a batch may have."""
        if len(children) <= self.batch_size:
            return children
        sizes = torch.bincount(children.prompt, minlength=len(self.found))
        order = sizes.argsort(stable=True)
        fits = torch.zeros(len(sizes), dtype=torch.bool)
        fits[order] = sizes[order].cumsum(0) <= self.batch_size
        fits[order[sizes[order] > 0][0]] = True  # one prompt alone must be possible
        for prompt in (~fits).nonzero()[:, 0].tolist():
            self.found[prompt] = None
        return children.where(fits[children.prompt])

    def _slots(self, parent_C: Tensor) -> tuple[Tensor, Tensor]:
        """A slot for every child, and for every slot then needed the slot whose row it takes over.

        A parent's first child stays in its slot.
        """
        num = len(self.branches.open)
        first = torch.ones_like(parent_C, dtype=torch.bool)
        first[1:] = parent_C[1:] != parent_C[:-1]
        others = parent_C[~first]
        free = torch.ones(num, dtype=torch.bool)
        free[parent_C] = False
        places = free.nonzero()[:, 0]
        if len(others) > len(places):
            most = max(len(parent_C), self.batch_size)
            grown = max(len(parent_C), min(num * 3 // 2, most))
            places = torch.cat([places, torch.arange(num, grown)])
            num = grown
        places = places[: len(others)]
        slot = parent_C.clone()
        slot[~first] = places
        source = torch.arange(num)
        source[len(self.branches.open) :] = 0  # a new slot that stays free may hold anything
        source[places] = others
        return slot, source

    def _select(self, source: Tensor) -> None:
        self.rows.select(source.to(self.rows.start_R.device))
        self.branches = self.branches.index_select(source)

    def _copy(self, source: Tensor) -> None:
        target = (source != torch.arange(len(source))).nonzero()[:, 0]
        if len(target):
            pair = torch.stack([source[target], target]).to(self.rows.start_R.device)
            self.rows.copy_rows(*pair.unbind())
            self.branches = self.branches.index_select(source)

    def _write(self, children: _Children, slot: Tensor, count: int) -> None:
        """Put the children into their slots and close all others."""
        branches = self.branches
        choice = torch.full_like(branches.prompt, END).index_copy(0, slot, children.choice)
        branches.choices[:, count] = choice
        self.branches = replace(
            branches,
            open=torch.zeros_like(branches.open).index_fill(0, slot, True),
            total=branches.total.index_copy(0, slot, children.total),
            greedy=branches.greedy.index_copy(0, slot, children.greedy),
            before=branches.state,
            state=grammar.advance(branches.state, choice),
        )

    def _collect(self, num_tokens: int) -> None:
        """Close branches that have ended, and those at their bound, and note what they spell."""
        branches = self.branches
        ended = branches.open & branches.state.finished
        bounded = branches.open & (self.bounds[branches.prompt] <= num_tokens)
        for slot in (ended | (bounded & branches.greedy)).nonzero()[:, 0].tolist():
            own = branches.choices[slot, :num_tokens].numpy()
            entry = decoded(own, float(branches.total[slot]), self.ids)
            found = self.found[int(branches.prompt[slot])]
            assert found is not None
            found.append((entry, bool(branches.greedy[slot])))
        self.branches = replace(branches, open=branches.open & ~ended & ~bounded)


def _rank(children: _Children) -> Tensor:
    """int64 [C]: how many children of the same prompt are more probable."""
    order = np.lexsort((-children.total.numpy(), children.prompt.numpy()))
    prompts = children.prompt.numpy()[order]
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(prompts, prompts)
    return torch.from_numpy(rank)
