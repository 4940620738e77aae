"""The TRM voice: the trunk looks at a whole answer at once and refines it, step by step.

In the letters of the TRM paper (arXiv 2510.04871): x is the embedded question; y = z_H is the
current answer, a distribution over colours for every answer cell, embedded; z = z_L are the last
states of the trunk. A supervision step is

    y, z <- net(x, y, z)        every token of question and answer sees every other

and only values pass from one step to the next, no gradient. The size is known before, from a draft
or by rules (`data.sizes`); the first answer is a draft or hidden cells, the first z its states.
Where training has one step, later steps hear the first z again: nothing taught them another.

Legend: T tokens of a packed batch, R rows (questions), D width, V vocabulary, C colours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arctrm.data.task import NUM_COLOURS, Grid, Pair
from arctrm.model.attention import Spans, block_spans, spans
from arctrm.model.layout import (
    OUTPUT_PART,
    SIDE,
    VOCABULARY,
    Prompt,
    groups,
    output_tokens,
    part_of,
)
from arctrm.model.trunk import EPS, Trunk, linear

GPU_TOKENS, CPU_TOKENS = 2**17, 2**12  # Tokens of one packed batch where nobody says how many


class Rows(NamedTuple):
    """Packed questions with their answers; everything that does not change between steps."""

    tokens: Tensor
    """int64 [T]: with the first answer in its cells; HIDDEN where a cell shows nothing."""
    positions: Tensor  # int64 [T]: packed positions
    row: Tensor  # int64 [T]: row of the token; R or more: none
    cells: Tensor  # bool [T]: answer cells, whose colour is asked for
    condition: Tensor  # int64 [R, 5]: see `layout.Condition`
    seen: Spans  # Every token sees its whole sequence


class State(NamedTuple):
    """What passes from one supervision step to the next."""

    y: Tensor  # [T, V] in the trunk's dtype: what each token shows
    z: Tensor  # [T, D] in the trunk's dtype


class Prediction(NamedTuple):
    """What a supervision step says."""

    logits: Tensor  # float32 [T, C]: the colour of each token's cell (meaningful on answer cells)
    q_halt: Tensor  # float32 [R]: logit that the answer is right
    state: State  # For the next step, without gradient


def first_state(trunk: Trunk, rows: Rows, z: Tensor | None = None) -> State:
    """The state before the first step; `z` [T, D] are states to begin with (default: zeros)."""
    y = F.one_hot(rows.tokens, VOCABULARY).to(trunk.dtype)
    if z is None:
        z = torch.zeros(len(y), trunk.width, device=y.device, dtype=trunk.dtype)
    return State(y, z.detach().to(trunk.dtype))


def supervision_step(
    trunk: Trunk, rows: Rows, state: State, added_TD: Tensor | None = None
) -> Prediction:
    """One pass y, z <- net(x, y, z); `added_TD` is what adapters add to the embedding."""
    num_rows = rows.condition.shape[0]
    condition = _of_rows(trunk.own_condition(rows.condition), rows.row)
    if added_TD is not None:
        condition = condition + added_TD
    back = F.rms_norm(state.z, state.z.shape[-1:], eps=EPS)
    x = trunk.embed(state.y, condition) + linear(back, trunk.feedback.layers[0])
    hidden = trunk.hidden(x, rows.positions, rows.seen, own=True)
    logits = linear(hidden, trunk.own_head).float()
    q_halt = _mean_of_cells(linear(hidden, trunk.halt_head)[:, 0].float(), rows, num_rows)
    with torch.no_grad():
        believed = F.pad(logits.softmax(-1), (0, VOCABULARY - NUM_COLOURS)).to(trunk.dtype)
        y = torch.where(rows.cells[:, None], believed, state.y)
    return Prediction(logits, q_halt, State(y, hidden.detach()))


def supervision_steps(
    trunk: Trunk, rows: Rows, state: State, num_steps: int, added_TD: Tensor | None = None
) -> Iterator[Prediction]:
    """Predictions of up to `num_steps` steps; where z does not pass, all hear the first."""
    for _ in range(num_steps):
        prediction = supervision_step(trunk, rows, state, added_TD)
        state = prediction.state if trunk.passes_z else State(prediction.state.y, state.z)
        yield prediction


@torch.no_grad()
def reader_states(trunk: Trunk, rows: Rows, prompt_N: Tensor) -> Tensor:
    """The reader's states [T, D] of the rows' drafts, read as it writes: a first z (aligned path).

    `prompt_N` int [N]: tokens of each sequence before its answer.
    """
    offsets, longest = rows.seen.offsets, rows.seen.max_len
    if (kernel := rows.seen.kernel) is None:
        seen = spans(offsets, longest, trunk.dtype, prompt_N)
    else:  # compiled blocks, in training
        seen = block_spans(offsets, len(rows.tokens), longest, prompt_N, kernel=kernel)
    condition = _of_rows(trunk.condition(rows.condition), rows.row)
    return trunk.hidden(trunk.embed(rows.tokens, condition), rows.positions, seen)


@dataclass(frozen=True, eq=False)
class Asked:
    """A question put to a refiner: one test input under one view."""

    query: Grid  # The input as the view shows it
    prompt: Prompt  # The same as tokens, up to the separator, with its condition
    shape: tuple[int, int]  # Height and width of the answer; a draft has this shape
    draft: Grid | None = None  # First answer; None: hidden cells
    pairs: tuple[Pair, ...] = ()  # Demonstrations as the view shows them, for a hub model to read


@dataclass(frozen=True, eq=False)
class Refined:
    """A refiner's answer."""

    grid: Grid
    q: float  # Halting logit of the last step
    log_p: float  # Sum over the cells of the log-probability (nats) of the answered colour
    steps: int  # Supervision steps behind it
    history: tuple[Grid, ...] = ()  # The answer after each step, where it was asked for


class Refiner(Protocol):
    """Who answers as a TRM: the trunk, a hybrid, or a published checkpoint."""

    halt_max_steps: int  # Supervision steps of an answer

    def refine(
        self,
        asked: Sequence[Asked],
        num_steps: int | None = None,
        *,
        tokens_per_batch: int | None = None,
        keep_history: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Refined]:
        """An answer to each question after `num_steps` steps (default: `halt_max_steps`)."""


class TrunkRefiner:
    """Answers with a trunk alone.

    Where `aligned`, the reader's states of a draft are the first z. No row halts early: as in the
    TRM paper, halting counts in training only, where it says how many steps a row would take.
    """

    def __init__(self, trunk: Trunk, halt_max_steps: int, *, aligned: bool = True):
        self.trunk, self.halt_max_steps, self.aligned = trunk, halt_max_steps, aligned

    @torch.no_grad()
    def refine(
        self,
        asked: Sequence[Asked],
        num_steps: int | None = None,
        *,
        tokens_per_batch: int | None = None,
        keep_history: bool = False,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Refined]:
        """See `Refiner.refine`; questions with and without drafts go in separate batches."""
        found: dict[int, Refined] = {}
        for batch in batches(asked, tokens_per_batch or usual_tokens(self.trunk.device)):
            chosen = [asked[index] for index in batch]
            steps, rows = self.steps(chosen, num_steps or self.halt_max_steps)
            answers = read_off(rows, steps, chosen, history=keep_history)
            found |= zip(batch, answers, strict=True)
            advance(len(batch))
        return [found[index] for index in range(len(asked))]

    def steps(self, asked: Sequence[Asked], num_steps: int) -> tuple[Iterator[Prediction], Rows]:
        """Predictions of up to `num_steps` steps for a batch, and its rows."""
        rows, prompts = lay_out(asked, self.trunk.device, self.trunk.dtype)
        drafted = self.aligned and asked[0].draft is not None
        z = reader_states(self.trunk, rows, prompts) if drafted else None
        state = first_state(self.trunk, rows, z)
        return supervision_steps(self.trunk, rows, state, num_steps), rows


def usual_tokens(device: torch.device) -> int:
    """Tokens of one packed batch where nobody says how many."""
    return GPU_TOKENS if device.type == "cuda" else CPU_TOKENS


def batches(asked: Sequence[Asked], num_tokens: int) -> Iterator[list[int]]:
    """Indices of questions of about one length, `num_tokens` at most together; one at least."""
    lengths = [_length(one) for one in asked]
    for has_draft in (False, True):
        own = [i for i, one in enumerate(asked) if (one.draft is not None) == has_draft]
        order = sorted(own, key=lengths.__getitem__)
        sizes = [lengths[index] for index in order]
        for part in groups([1] * len(order), sizes, len(order), num_tokens):
            yield order[part]


def lay_out(
    asked: Sequence[Asked], device: torch.device, dtype: torch.dtype
) -> tuple[Rows, Tensor]:
    """Rows of questions, and the number of tokens [R] of each before its answer."""
    parts = [output_tokens(one.shape, one.draft) for one in asked]
    tokens = [np.append(one.prompt.tokens, own) for one, (own, _) in zip(asked, parts, strict=True)]
    places = [
        np.append(one.prompt.positions, own) for one, (_, own) in zip(asked, parts, strict=True)
    ]
    lengths = np.array([len(own) for own in tokens])
    offsets = torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)).to(device)
    positions = torch.from_numpy(np.concatenate(places)).to(device)
    all_tokens = torch.from_numpy(np.concatenate(tokens)).to(device)
    is_answer = part_of(positions) == OUTPUT_PART
    x, y = positions % SIDE, positions // SIDE % SIDE
    heights, widths = torch.tensor([one.shape for one in asked], device=device).unbind(1)
    row = torch.from_numpy(np.arange(len(asked)).repeat(lengths)).to(device)
    cells = is_answer & (x < widths[row]) & (y < heights[row])
    prompts = torch.tensor([len(one.prompt.tokens) for one in asked], device=device)
    condition = torch.tensor([one.prompt.condition for one in asked], device=device)
    seen = spans(offsets, int(lengths.max()), dtype)
    return Rows(all_tokens, positions, row, cells, condition, seen), prompts


def read_off(
    rows: Rows,
    predictions: Iterator[Prediction],
    asked: Sequence[Asked],
    *,
    history: bool = False,
) -> list[Refined]:
    """The answer of each row after the last step; with `history` after every one, too."""
    sizes, each = [one.shape[0] * one.shape[1] for one in asked], []
    steps = 0
    for prediction in predictions:
        steps += 1
        if history:
            each.append(_grids(prediction.logits[rows.cells].argmax(-1).cpu(), sizes, asked))
    best = prediction.logits.log_softmax(-1).max(-1)
    log_p = torch.zeros(len(asked), device=rows.tokens.device)
    log_p = log_p.index_add(0, rows.row, torch.where(rows.cells, best.values, 0.0))
    grids = _grids(best.indices[rows.cells].cpu(), sizes, asked)
    told = zip(grids, prediction.q_halt.tolist(), log_p.tolist(), strict=True)
    return [
        Refined(grid, q, own, steps, tuple(after[i] for after in each))
        for i, (grid, q, own) in enumerate(told)
    ]


def _grids(cells: Tensor, sizes: Sequence[int], asked: Sequence[Asked]) -> list[Grid]:
    parts = cells.to(torch.uint8).split(list(sizes))
    return [own.view(one.shape).numpy() for own, one in zip(parts, asked, strict=True)]


def _length(one: Asked) -> int:
    height, width = one.shape
    return len(one.prompt.tokens) + height * (width + 1) + 1


def _of_rows(vectors_RD: Tensor, row_T: Tensor) -> Tensor:
    """The vector of each token's row; tokens of no row get that of the last."""
    return vectors_RD.index_select(0, row_T.clamp(max=vectors_RD.shape[0] - 1))


def _mean_of_cells(values_T: Tensor, rows: Rows, num_rows: int) -> Tensor:
    """Mean [R] over the answer cells of each row; 0 where there is none."""
    row = torch.where(rows.cells, rows.row, num_rows).clamp(max=num_rows)
    count = torch.zeros(num_rows + 1, device=row.device).index_add(0, row, rows.cells.float())
    total = torch.zeros(num_rows + 1, device=row.device).index_add(0, row, values_T)
    return (total / count.clamp(min=1))[:num_rows]
