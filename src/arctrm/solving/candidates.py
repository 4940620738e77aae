"""Queries in, candidates out: TRM answers test inputs under many views, packed.

A query is one test input under one view on one canvas. Queries are packed by size, run for a fixed
number of supervision steps, decoded, and turned back by the exact inverse of their view.

Legend: T tokens, R rows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arctrm.config import InferenceConfig
from arctrm.data import canvas
from arctrm.data.task import MAX_SIDE, Grid, Task
from arctrm.data.views import DIHEDRALS, View, distinct_views, fixed_colours
from arctrm.errors import ResourceError, TaskError
from arctrm.hybrid import Rows, refine
from arctrm.solving.canvas_rules import query_canvas
from arctrm.solving.guidance import Guide, longest_visible, states
from arctrm.solving.vote import Candidate
from arctrm.solving.weights import Solver
from arctrm.training.stages import TOKENS_PER_ROW
from arctrm.trm.model import TRM
from arctrm.trm.packing import longest_row, sequences, token_map

CPU_TOKENS, GPU_TOKENS = 1024, 32768
HUB_TOKENS = 8192
"""On a GPU with a hub reader, whose states of a whole task belong to every row."""

Key = tuple[str, int]
"""Task id and index of the test input."""


@dataclass(frozen=True, eq=False)
class Query:
    """One test input under one view."""

    key: Key
    view: View
    codes: np.ndarray
    """uint8 [height, width]: the input on its canvas."""
    row: int
    """Task embedding row."""


def require_test_inputs(tasks: Sequence[Task], source: str) -> None:
    """Raise TaskError where a task asks for nothing (a map of pairs, say, is for training only)."""
    empty = next((task for task in tasks if not task.test), None)
    if empty is not None:
        raise TaskError(
            f"{source}: task {empty.id} has no test input, so there is nothing to answer; give "
            "tasks with a test input"
        )


def task_queries(solver: Solver, task: Task, num_views: int, seed: int) -> list[Query]:
    """Queries of every test input, view by view (the identity first).

    A task that the model was not trained on gets the mean embedding; a per-view model then has no
    view to offer and gives no query.
    """
    return [
        _query(solver.trm, task, index, view, row)
        for view, row in task_views(solver, task, num_views, seed)
        for index in range(len(task.test))
    ]


def task_views(solver: Solver, task: Task, num_views: int, seed: int) -> list[tuple[View, int]]:
    """Views to ask under, the identity first, each with its task embedding row."""
    own = solver.views_of(task, num_views)
    if own is not None:
        return own
    rng = np.random.default_rng([seed, *task.id.encode()])
    row = solver.row_of(task)
    views = distinct_views(fixed_colours(task), num_views, rng, solver.identity_colours)
    return [(view, solver.mean_row if row is None else row) for view in views]


def _query(trm: TRM, task: Task, index: int, view: View, row: int) -> Query:
    grid = task.test[index].input
    height, width = query_canvas(task, grid)
    if DIHEDRALS[view.dihedral][0]:
        height, width = width, height
    if trm.config.layout == "reference":
        height = width = MAX_SIDE
    return Query((task.id, index), view, canvas.encode(view.apply(grid), height, width), row)


def batch_tokens(solver: Solver, inference: InferenceConfig) -> int:
    """Tokens of a packed batch; on a CPU small ones, so that time can be kept."""
    on_gpu = GPU_TOKENS if solver.hub is None else HUB_TOKENS
    default = on_gpu if solver.trm.H_init.is_cuda else CPU_TOKENS
    return inference.tokens_per_batch or default


def batches(
    solver: Solver, queries: Sequence[Query], inference: InferenceConfig
) -> Iterator[list[Query]]:
    """The queries in packed batches, in order."""
    slots = solver.trm.config.num_slots
    return pack(queries, batch_tokens(solver, inference), slots)


def pack(queries: Sequence[Query], tokens_per_batch: int, num_slots: int) -> Iterator[list[Query]]:
    """Split into batches of at most `tokens_per_batch` tokens, in order; one query at least."""
    batch: list[Query] = []
    used = 0
    max_rows = tokens_per_batch // TOKENS_PER_ROW
    for query in queries:
        size = num_slots + query.codes.size
        if batch and (used + size > tokens_per_batch or len(batch) == max_rows):
            yield batch
            batch, used = [], 0
        batch.append(query)
        used += size
    if batch:
        yield batch


def answer(
    solver: Solver,
    queries: Sequence[Query],
    inference: InferenceConfig,
    advance: Callable[[int], None] = lambda done: None,
    guides: Sequence[Guide] | None = None,
) -> list[tuple[Key, Candidate]]:
    """Candidates of all queries, in the order of the queries; `advance` is told of each batch.

    `guides` is what the reader tells TRM, one for each query.

    Raises:
        ResourceError: out of memory; says which key to lower.

    """
    order = sorted(range(len(queries)), key=lambda i: queries[i].codes.size)
    ordered = [queries[i] for i in order]
    told = None if guides is None else [guides[i] for i in order]
    found: list[tuple[Key, Candidate]] = []
    for batch in batches(solver, ordered, inference):
        own = None if told is None else told[len(found) : len(found) + len(batch)]
        found += answer_batch(solver, batch, inference, own)
        advance(len(batch))
    back = np.argsort(order)
    return [found[i] for i in back]


@torch.no_grad()
def answer_batch(
    solver: Solver,
    batch: Sequence[Query],
    inference: InferenceConfig,
    guides: Sequence[Guide] | None = None,
) -> list[tuple[Key, Candidate]]:
    """Candidates of one packed batch; a grid that cannot be decoded is None."""
    static = solver.trm.H_init.is_cuda
    try:
        codes, q_halt, lengths = run_batch(solver, batch, inference, static, guides)
    except torch.OutOfMemoryError as error:
        tokens = batch_tokens(solver, inference)
        raise ResourceError(
            f"out of memory with inference.tokens_per_batch = {tokens}; lower it, for example "
            f"--set inference.tokens_per_batch={tokens // 2}"
        ) from error
    source = "trm" if guides is None else "hybrid"
    grids = grids_on(batch, codes, lengths)
    return [
        (query.key, Candidate(grid, float(q), source))
        for query, grid, q in zip(batch, grids, q_halt, strict=True)
    ]


def grids_on(
    batch: Sequence[Query], codes: np.ndarray, lengths: Sequence[int]
) -> list[Grid | None]:
    """The grids on the canvases of packed `codes` [T], turned back; None where there is none."""
    grids: list[Grid | None] = []
    begin = 0
    for query, length in zip(batch, lengths, strict=True):
        begin += length
        cells = codes[begin - query.codes.size : begin]
        grid = canvas.decode(cells.reshape(query.codes.shape))
        grids.append(None if grid is None else query.view.inverse(grid))
    return grids


def run_batch(
    solver: Solver,
    batch: Sequence[Query],
    inference: InferenceConfig,
    static: bool,
    guides: Sequence[Guide] | None = None,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Predicted codes [T], halting logits [R] and row lengths of one batch.

    `static`: shapes that depend on the configuration only, so that one compiled graph serves every
    batch; the room that is not used holds dummies.
    """
    num_tokens = num_rows = 0
    if static:
        num_tokens = batch_tokens(solver, inference)
        num_rows = num_tokens // TOKENS_PER_ROW
    rows, lengths = packed_rows(solver, batch, num_tokens, num_rows)
    trm, tokens, num_rows = solver.trm, rows.tokens, rows.embedding.shape[0]
    start = None
    if guides is not None:
        assert solver.hybrid is not None
        said = states(solver.hybrid, guides, num_rows)
        start = solver.hybrid.start(said, tokens, longest_visible(said))
    num_steps = inference.steps or trm.config.halt_max_steps
    blank = inference.blank_task_embedding
    _, prediction = deque(refine(trm, rows, start, num_steps, blank), maxlen=1).pop()
    predicted = prediction.logits.argmax(-1).to(torch.uint8).cpu().numpy()
    return predicted, prediction.q_halt[: len(batch)].cpu().numpy(), lengths


def packed_rows(
    solver: Solver, batch: Sequence[Query], num_tokens: int = 0, num_rows: int = 0
) -> tuple[Rows, list[int]]:
    """The queries as TRM's rows, with room for `num_tokens` and `num_rows`, and their lengths."""
    trm, device = solver.trm, solver.trm.H_init.device
    slots = trm.config.num_slots
    lengths = [slots + query.codes.size for query in batch]
    num_tokens, num_rows = max(num_tokens, sum(lengths)), max(num_rows, len(batch))
    columns = _columns(batch, lengths, num_rows).to(device)
    length_R, width_R, row_R, dihedral_R, flag_R = columns.unbind(1)
    tokens = token_map(length_R, width_R, num_tokens, longest_row(trm.config), slots)
    codes = torch.zeros(num_tokens, dtype=torch.long)
    codes[: sum(lengths)] = torch.from_numpy(
        np.concatenate([np.pad(query.codes.ravel(), (slots, 0)) for query in batch])
    ).long()
    seq = sequences(tokens, trm.config, trm.dtype)
    return Rows(row_R, dihedral_R, flag_R, codes.to(device), tokens, seq), lengths


def _columns(batch: Sequence[Query], lengths: list[int], num_rows: int) -> Tensor:
    """int64 [num_rows, 5]: length, width, embedding row, dihedral, colour flag."""
    columns = torch.zeros(num_rows, 5, dtype=torch.long)
    for index, (query, length) in enumerate(zip(batch, lengths, strict=True)):
        view, width = query.view, query.codes.shape[1]
        columns[index] = torch.tensor(
            (length, width, query.row, view.dihedral, view.identity_colours)
        )
    return columns


def by_key(found: Iterable[tuple[Key, Candidate]]) -> dict[Key, list[Candidate]]:
    """Candidates of each test input."""
    grouped: dict[Key, list[Candidate]] = {}
    for key, candidate in found:
        grouped.setdefault(key, []).append(candidate)
    return grouped
