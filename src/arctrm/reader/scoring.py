"""Scores of candidate grids: what the reader would have given them, had it decoded them.

A prompt is read once; its place in the cache is then repeated for all its candidates, which go
through the reader whole, in one call, padded on the right. Log-probabilities are counted exactly as
in decoding (`reader.grammar`). The tiny reader scores without padding, on a GPU on packed places
(`reader.packed_scoring`), on a CPU by what candidates have in common (`reader.shared_scoring`).

Legend: R rows (prompt and candidate), S output tokens of the longest candidate, 12 choices.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arctrm.data.task import MAX_SIDE, Grid
from arctrm.reader import grammar
from arctrm.reader.decoding import BATCH_SIZE
from arctrm.reader.grammar import END, GridState, num_tokens
from arctrm.reader.interface import GridReader, Prompt
from arctrm.reader.packed_scoring import PackedScorer, row_size
from arctrm.reader.places import is_packed
from arctrm.reader.rows import Rows, by_length, distinct, encode, memory_guard, split
from arctrm.reader.shared_scoring import SharedScorer
from arctrm.reader.tiny import TinyReader


def product_of_experts(scores: Sequence[Sequence[float]]) -> list[float]:
    """Log-probability of each candidate, summed over views: `scores` is one list for each view."""
    return [math.fsum(views) for views in zip(*scores, strict=True)]


def score(
    reader: GridReader,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[Grid]],
    *,
    batch_size: int = BATCH_SIZE,
    max_side: int = MAX_SIDE,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Log-probability (nats) of each candidate grid after its prompt, in the order given.

    `candidates` holds one list for each prompt, empty ones included. `batch_size` bounds the rows
    (prompt and candidate) of one call; `advance` is told how many prompts are done. `max_side` must
    be the decoder's for the scores to be.

    Raises:
        ResourceError: out of memory; names `reader.batch_size`.

    """
    lengths = [max(map(num_tokens, grids), default=0) for grids in candidates]
    found: list[list[float]] = [[] for _ in prompts]
    with memory_guard(batch_size):
        scores_of = _scorer(reader, prompts, candidates, max_side)
    sizes = [1 if reads_shared_once(reader) else max(1, len(own)) for own in candidates]
    for group in _groups(by_length(prompts, lengths), sizes, batch_size):
        pairs = [(index, grid) for index in group for grid in candidates[index]]
        if pairs:
            with memory_guard(batch_size):
                rows = [(prompts[index], grid) for index, grid in pairs]
                scores = scores_of(rows, batch_size)
            for (index, _), value in zip(pairs, scores, strict=True):
                found[index].append(value)
        advance(len(group))
    return found


def _scorer(
    reader: GridReader,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[Grid]],
    max_side: int,
) -> Callable[[Sequence[tuple[Prompt, Grid]], int], list[float]]:
    """What scores the (prompt, candidate) pairs of a group, `batch_size` of them at a time."""
    if reads_shared_once(reader):
        assert isinstance(reader, TinyReader)
        return SharedScorer(reader, max_side).scores
    if not is_packed(reader):
        return lambda pairs, batch_size: _score_group(reader, pairs, batch_size, max_side)
    assert isinstance(reader, TinyReader)
    pairs = zip(prompts, candidates, strict=True)
    sizes = [row_size(prompt, grid) for prompt, own in pairs for grid in own]
    return PackedScorer(reader, sizes, max_side).scores


def reads_shared_once(reader: GridReader) -> bool:
    """Whether what candidates have in common is read once: by the tiny reader on a CPU."""
    return isinstance(reader, TinyReader) and reader.device.type == "cpu"


def _groups(order: Sequence[int], sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """Prompts in groups of at most `batch_size` in sum of their `sizes`; one prompt at least."""
    groups: list[list[int]] = []
    used = 0
    for index in order:
        if not groups or used + sizes[index] > batch_size:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += sizes[index]
    return groups


@torch.no_grad()
def _score_group(
    reader: GridReader, pairs: Sequence[tuple[Prompt, Grid]], batch_size: int, max_side: int
) -> list[float]:
    """Scores of (prompt, candidate) pairs whose prompts are read together."""
    different, row_of = distinct([prompt for prompt, _ in pairs])
    prefix, first_U12 = encode(reader, different, room=max(num_tokens(grid) for _, grid in pairs))
    scores: list[float] = []
    for chunk in split(range(len(pairs)), batch_size):
        index = torch.tensor([row_of[i] for i in chunk], device=reader.device)
        first_R12 = first_U12.index_select(0, index)
        grids = [pairs[i][1] for i in chunk]
        scores += _score_rows(prefix.selected(index), first_R12, grids, max_side)
    return scores


def _score_rows(rows: Rows, first_R12: Tensor, grids: Sequence[Grid], max_side: int) -> list[float]:
    """Scores of one candidate for each row; `first_R12` are the logits of its first token."""
    choices_RS, states = _padded(grids)
    positions = torch.stack(
        [
            rows.reader.output_positions(rows.start_R.cpu(), count, y_R, x_R)
            for count, (y_R, x_R) in enumerate(zip(states.y.T, states.x.T, strict=True))
        ],
        dim=1,
    )
    device = first_R12.device
    tokens = rows.grid_ids[choices_RS.to(device)]
    fed = choices_RS.shape[1] - 1  # nothing comes after the end
    rest = rows.feed(tokens[:, :fed], positions[:, :fed].to(device), keep=fed)
    logits = torch.cat([first_R12[:, None], rest], dim=1).cpu()
    log_p = grammar.log_probabilities(logits, states, max_side)
    return log_p.gather(2, choices_RS[..., None]).double().sum(dim=(1, 2)).tolist()


def _padded(grids: Sequence[Grid]) -> tuple[Tensor, GridState]:
    """Choices int64 [R, S] and states [R, S]; the padding is finished grids, which cost nothing."""
    paths = [grammar.encode_choices(grid) for grid in grids]

    def padded(columns: Sequence[Tensor], value: float) -> Tensor:
        return pad_sequence(list(columns), batch_first=True, padding_value=value)

    state = GridState(
        y=padded([state.y for _, state in paths], 0),
        x=padded([state.x for _, state in paths], 0),
        width=padded([state.width for _, state in paths], 0),
        finished=padded([state.finished for _, state in paths], True),
    )
    return padded([torch.from_numpy(choices) for choices, _ in paths], END), state
