"""Queries in, candidates out: TRM answers test inputs under many views, packed.

A query is one test input under one view on one canvas. Queries are packed by size, refined by TRM
(`arctrm.solving.refining`), decoded, and turned back by the exact inverse of their view.

Legend: T tokens, R rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arctrm.config import InferenceConfig
from arctrm.data import canvas
from arctrm.data.task import MAX_SIDE, Grid, Task
from arctrm.data.views import DIHEDRALS, View, distinct_views, fixed_colours
from arctrm.errors import ResourceError, TaskError
from arctrm.hybrid import Rows, begin
from arctrm.solving.canvas_rules import query_canvas
from arctrm.solving.guidance import Guide, longest_visible, states
from arctrm.solving.refining import Begun, Refined, Refiner, Size, fitting
from arctrm.solving.vote import Candidate
from arctrm.solving.weights import Solver
from arctrm.training.stages import TOKENS_PER_ROW
from arctrm.trm.model import TRM
from arctrm.trm.packing import longest_row, sequences, token_map

CPU_TOKENS, GPU_TOKENS = 1024, 131072
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
    number: int = 0
    """Of the view among those asked under."""


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
        _query(solver.trm, task, index, view, row, number)
        for number, (view, row) in enumerate(task_views(solver, task, num_views, seed))
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


def _query(trm: TRM, task: Task, index: int, view: View, row: int, number: int) -> Query:
    grid = task.test[index].input
    height, width = query_canvas(task, grid)
    if DIHEDRALS[view.dihedral][0]:
        height, width = width, height
    if trm.config.layout == "reference":
        height = width = MAX_SIDE
    codes = canvas.encode(view.apply(grid), height, width)
    return Query((task.id, index), view, codes, row, number)


def batch_tokens(solver: Solver, inference: InferenceConfig) -> int:
    """Tokens of a packed batch; on a CPU small ones, so that time can be kept."""
    on_gpu = GPU_TOKENS if solver.hub is None else HUB_TOKENS
    default = on_gpu if solver.trm.H_init.is_cuda else CPU_TOKENS
    return inference.tokens_per_batch or default


def batch_of(solver: Solver, queries: Sequence[Query], inference: InferenceConfig) -> int:
    """How many of the queries, in order, one packed batch holds; one at least."""
    num_tokens = batch_tokens(solver, inference)
    lengths = (size.length for size in _sizes(solver, queries))
    return max(1, fitting(lengths, num_tokens, num_tokens // TOKENS_PER_ROW))


def answer(
    solver: Solver,
    queries: Sequence[Query],
    inference: InferenceConfig,
    advance: Callable[[int], None] = lambda done: None,
    guides: Sequence[Guide] | None = None,
) -> list[tuple[Key, Candidate]]:
    """Candidates of all queries, in the order of the queries; `advance` is told of each.

    `guides` is what the reader tells TRM, one for each query. A grid that cannot be decoded is
    None.

    Raises:
        ResourceError: out of memory; says which key to lower.

    """
    source = "trm" if guides is None else "hybrid"
    said = refined(solver, queries, inference, advance, guides)
    return [
        (
            query.key,
            Candidate(
                grid_on(query, own.codes), own.q_halt, source, steps=own.steps, view=query.number
            ),
        )
        for query, own in zip(queries, said, strict=True)
    ]


def refined(
    solver: Solver,
    queries: Sequence[Query],
    inference: InferenceConfig,
    advance: Callable[[int], None] = lambda done: None,
    guides: Sequence[Guide] | None = None,
    static: bool | None = None,
) -> list[Refined]:
    """What TRM says of each query, in their order.

    `static`: shapes that depend on the configuration only; by default on a GPU.

    Raises:
        ResourceError: out of memory; says which key to lower.
    """
    order = sorted(range(len(queries)), key=lambda i: queries[i].codes.size)
    ordered = [queries[i] for i in order]
    num_tokens = batch_tokens(solver, inference)
    refiner = Refiner(
        solver.trm,
        inference.steps or solver.trm.config.halt_max_steps,
        inference.halt,
        num_tokens,
        num_tokens // TOKENS_PER_ROW,
        solver.trm.H_init.is_cuda if static is None else static,
    )

    def begun(numbers: Sequence[int]) -> Begun:
        told = None if guides is None else [guides[order[n]] for n in numbers]
        return _begun(solver, [ordered[n] for n in numbers], inference, told)

    found: dict[int, Refined] = {}
    try:
        for number, own in refiner.run(_sizes(solver, ordered), begun):
            found[order[number]] = own
            advance(1)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of memory with inference.tokens_per_batch = {num_tokens}; lower it, for example "
            f"--set inference.tokens_per_batch={num_tokens // 2}"
        ) from error
    return [found[index] for index in range(len(queries))]


def _sizes(solver: Solver, queries: Iterable[Query]) -> list[Size]:
    slots = solver.trm.config.num_slots
    return [Size(slots + query.codes.size, query.codes.shape[1]) for query in queries]


def _begun(
    solver: Solver,
    queries: Sequence[Query],
    inference: InferenceConfig,
    guides: Sequence[Guide] | None,
) -> Begun:
    """The queries before their first step, with what the reader tells them."""
    rows, _ = packed_rows(solver, queries)
    start = None
    if guides is not None:
        assert solver.hybrid is not None
        said = states(solver.hybrid, guides, len(guides))
        start = solver.hybrid.start(said, rows.tokens, longest_visible(said))
    x, latents = begin(solver.trm, rows, start, inference.blank_task_embedding)
    return Begun(x, *latents)


def grids_on(
    batch: Sequence[Query], codes: np.ndarray, lengths: Sequence[int]
) -> list[Grid | None]:
    """The grids on the canvases of packed `codes` [T], turned back; None where there is none."""
    ends = np.cumsum(lengths)
    return [
        grid_on(query, codes[end - query.codes.size : end])
        for query, end in zip(batch, ends, strict=True)
    ]


def grid_on(query: Query, codes: np.ndarray) -> Grid | None:
    """The grid on a canvas of `codes` [cells], turned back; None where there is none."""
    grid = canvas.decode(codes.reshape(query.codes.shape))
    return None if grid is None else query.view.inverse(grid)


def packed_rows(solver: Solver, batch: Sequence[Query]) -> tuple[Rows, list[int]]:
    """The queries as TRM's rows, and their lengths in tokens."""
    trm, device = solver.trm, solver.trm.H_init.device
    slots = trm.config.num_slots
    lengths = [length for length, _ in _sizes(solver, batch)]
    columns = _columns(batch, lengths).to(device)
    length_R, width_R, row_R, dihedral_R, flag_R = columns.unbind(1)
    tokens = token_map(length_R, width_R, sum(lengths), longest_row(trm.config), slots)
    codes = torch.from_numpy(
        np.concatenate([np.pad(query.codes.ravel(), (slots, 0)) for query in batch])
    ).long()
    seq = sequences(tokens, trm.config, trm.dtype)
    return Rows(row_R, dihedral_R, flag_R, codes.to(device), tokens, seq), lengths


def _columns(batch: Sequence[Query], lengths: Sequence[int]) -> Tensor:
    """int64 [R, 5]: length, width, embedding row, dihedral, colour flag."""
    columns = [
        (length, query.codes.shape[1], query.row, query.view.dihedral, query.view.identity_colours)
        for query, length in zip(batch, lengths, strict=True)
    ]
    return torch.tensor(columns, dtype=torch.long)


def by_key(found: Iterable[tuple[Key, Candidate]]) -> dict[Key, list[Candidate]]:
    """Candidates of each test input."""
    grouped: dict[Key, list[Candidate]] = {}
    for key, candidate in found:
        grouped.setdefault(key, []).append(candidate)
    return grouped
