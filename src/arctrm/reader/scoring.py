"""Scores of candidate grids: what the reader would have given them, had it decoded them.

A prompt is read once for all its candidates. These are divided into lanes, each a row of a store.
In a lane the candidates follow each other in the order of their tokens, and each is read from where
it differs from the one before, whose keys and values it overwrites: the candidates of a test input
are mostly near-copies. Where reading costs time by the token (a CPU) a prompt has one lane; else
candidates go side by side, a lane each as far as there is room. Log-probabilities are counted as in
decoding (`reader.grammar`).

Legend: R lanes of a batch, N tokens of a candidate of each, 12 choices.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from arctrm.data.task import MAX_SIDE, Grid
from arctrm.model.layout import Prompt, groups
from arctrm.reader import grammar
from arctrm.reader.decoding import by_length, memory_guard
from arctrm.reader.grammar import ROW_END, num_tokens
from arctrm.reader.protocol import Reader, Store
from arctrm.reader.store import ranges

Lane = list[tuple[int, Grid]]
"""Candidates of one prompt, read one after another: (its number there, grid)."""


def score(
    reader: Reader,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[Grid]],
    *,
    batch_size: int | None = None,
    max_side: int = MAX_SIDE,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Log-probability (nats) of each candidate grid after its prompt, in the order given.

    `candidates` holds one list for each prompt, empty ones included. `batch_size` bounds the lanes
    side by side (default: `reader.batch_rows`); `advance` is told how many prompts are done.
    `max_side` must be the decoder's for the scores to be.

    Raises:
        ResourceError: out of memory; names `judge.batch_size`.

    """
    batch_size = max(1, batch_size or reader.batch_rows)
    room = [max(map(num_tokens, grids), default=1) - 1 for grids in candidates]
    sizes = [len(prompt.tokens) + own for prompt, own in zip(prompts, room, strict=True)]
    most = 1 if reader.follows_drafts else batch_size
    counts = [min(len(grids), most) for grids in candidates]
    with memory_guard(batch_size):
        opened = reader.opened(np.repeat(sizes, counts).tolist())
    # Lanes of one prompt must fit into one store, for the prompt to be read once.
    fitting = [max(1, opened.capacity // size) for size in sizes]
    counts = [min(own, fit) for own, fit in zip(counts, fitting, strict=True)]
    found = [[0.0] * len(grids) for grids in candidates]
    order = by_length(prompts, room)
    rows, places = [counts[i] for i in order], [counts[i] * sizes[i] for i in order]
    for part in groups(rows, places, batch_size, opened.capacity):
        lanes = [(i, own) for i in order[part] for own in _lanes(candidates[i], counts[i])]
        if lanes:
            with memory_guard(batch_size):
                store = opened.store([prompts[i] for i, _ in lanes], [room[i] for i, _ in lanes])
                scores = _score_lanes(store, [lane for _, lane in lanes], max_side)
            for (index, lane), own in zip(lanes, scores, strict=True):
                for (number, _), value in zip(lane, own, strict=True):
                    found[index][number] = value
        advance(part.stop - part.start)
    return found


def _lanes(grids: Sequence[Grid], count: int) -> list[Lane]:
    """Candidates divided into `count` lanes; those of a lane are neighbours in token order."""
    order = list(range(len(grids)))
    if count < len(grids):
        order.sort(key=lambda number: _tokens(grids[number]).tobytes())
    ends = np.linspace(0, len(grids), count + 1).astype(int)
    return [[(i, grids[i]) for i in order[a:b]] for a, b in itertools.pairwise(ends)]


@torch.no_grad()
def _score_lanes(store: Store, lanes: Sequence[Lane], max_side: int) -> list[list[float]]:
    """The scores of the candidates of each lane, each prompt in a row of its own."""
    first = store.read()
    device = first.device
    scores: list[list[float]] = [[] for _ in lanes]
    longest = max(num_tokens(grid) for lane in lanes for _, grid in lane)
    # Logits of what could stand in each place of the candidate that a lane has read last.
    logits = first.new_zeros(len(lanes) * longest, first.shape[1])
    logits[::longest] = first
    for number in range(max(map(len, lanes))):
        live = [row for row, lane in enumerate(lanes) if number < len(lane)]
        grids = [lanes[row][number][1] for row in live]
        shared = np.array([_shared(lanes[row], number) for row in live])
        if number:
            for row, kept in zip(live, shared.tolist(), strict=True):
                store.rewind(row, kept)
        spelled = grammar.spell(grids, device)
        lane = torch.tensor(live, device=device)[spelled.grid]
        place = torch.arange(len(lane), device=device) - spelled.first[spelled.grid]
        place += lane * longest
        # Nothing is read after the end, nor what is shared again.
        lengths = np.array([num_tokens(grid) for grid in grids])
        new = ranges(lengths.cumsum() - lengths + shared, lengths - 1 - shared)
        if len(new):
            fed = torch.from_numpy(new).to(device)
            given = spelled.choices[fed], spelled.states.index_select(fed)
            logits.index_copy_(0, place[fed] + 1, store.append(lane[fed], *given))
        log_p = grammar.log_probabilities(logits[place], spelled.states, max_side)
        own = log_p.gather(1, spelled.choices[:, None])[:, 0].double()
        sums = own.new_zeros(len(live)).index_add(0, spelled.grid, own)
        for row, value in zip(live, sums.tolist(), strict=True):
            scores[row].append(value)
    return scores


def _shared(lane: Lane, number: int) -> int:
    """Tokens that a candidate has in common with the one before, the end not counted."""
    if number == 0:
        return 0
    before, now = (_tokens(grid) for _, grid in lane[number - 1 : number + 1])
    length = min(len(before), len(now))
    differ = (before[:length] != now[:length]).nonzero()[0]
    return int(differ[0]) if len(differ) else length


def _tokens(grid: Grid) -> np.ndarray:
    """Choices uint8 that spell a grid, without the end."""
    return np.pad(grid, ((0, 0), (0, 1)), constant_values=ROW_END).ravel()
