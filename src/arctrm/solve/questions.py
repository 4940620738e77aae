"""What models are asked: one test input under one view.

A question has all that either voice needs; answers come back through the exact inverse of the
view. Views are drawn from a random stream of their own for each task, so neither the order of tasks
nor the number of processes changes what is asked. No test output is read here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arctrm.config import TaskChoiceConfig
from arctrm.data.sizes import output_size, plausible_sides
from arctrm.data.sources import load_tasks
from arctrm.data.task import MAX_SIDE, Grid, Pair, Task, held_out_ids
from arctrm.data.views import DIHEDRALS, NUM_DIHEDRALS, View, distinct_views, fixed_colours
from arctrm.errors import DataError, TaskError
from arctrm.model.layout import Condition, Prompt, grid_length
from arctrm.solve import scoring
from arctrm.solve.weights import Solver

CONTEXT_STREAM = 1  # ends the seed of the order of demonstrations in a hub model's prompt


class Key(NamedTuple):
    """A test input: task id, and number of the input, from 0."""

    task: str
    index: int  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Question:
    """A test input under a view."""

    key: Key
    number: int  # of the view among those of the task, from 0
    view: View
    query: Grid  # the input as the view shows it
    condition: Condition
    """Task embedding row and view, for the trunk; `inverse` = 1: `query` is what is asked for."""
    prompt: Prompt | None
    """Of the reader; None without one, and of an inverse question, whose prompt shows a candidate.
    """
    shape: tuple[int, int]  # likeliest size of the answer under the view
    room: int  # output tokens that spell every plausible answer
    pairs: tuple[Pair, ...] = ()
    """Demonstrations as the view shows them, for a reader that is told a task by them."""

    def shown(self, grid: Grid) -> Grid:
        """A grid of the task as the view shows it."""
        return self.view.apply(grid)

    def turned_back(self, grid: Grid | None) -> Grid | None:
        """An answer in the task's own colours and orientation."""
        return None if grid is None else self.view.inverse(grid)


def questions(solver: Solver, task: Task, num_views: int, seed: int) -> list[Question]:
    """Questions about every test input of a task, view by view (the identity first)."""
    order = np.random.default_rng([seed, *task.id.encode(), CONTEXT_STREAM])
    likely = [output_size(task, pair.input) for pair in task.test]
    largest = [_largest_size(task, pair.input) for pair in task.test]
    found, reader = [], solver.reader
    for number, (view, row) in enumerate(views_of(solver, task, num_views, seed)):
        condition = Condition(row, view.dihedral, int(view.identity_colours))
        for index, pair in enumerate(task.test):
            query, size, bound = view.apply(pair.input), likely[index], largest[index]
            if DIHEDRALS[view.dihedral][0]:
                size, bound = size[::-1], bound[::-1]
            pairs: tuple[Pair, ...] = ()
            if solver.reads_pairs:
                shuffled = order.permutation(len(task.demonstrations))
                pairs = tuple(view.apply_pair(task.demonstrations[i]) for i in shuffled)
            prompt = None if reader is None else reader.prompt(query, condition, pairs)
            key, room = Key(task.id, index), grid_length(*bound) + 1
            found.append(Question(key, number, view, query, condition, prompt, size, room, pairs))
    return found


def _largest_size(task: Task, given: Grid) -> tuple[int, int]:
    """A (height, width) that the answer does not exceed by any rule; above the input's."""
    height, width = (
        min(MAX_SIDE, 1 + max(given.shape[axis], *plausible_sides(task, given, axis)))
        for axis in (0, 1)
    )
    return height, width


def all_questions(
    solver: Solver, tasks: Iterable[Task], num_views: int, seed: int
) -> list[Question]:
    """Questions about every test input of every task."""
    return [one for task in tasks for one in questions(solver, task, num_views, seed)]


def views_of(solver: Solver, task: Task, num_views: int, seed: int) -> list[tuple[View, int]]:
    """Views of a task, the identity first, each with its task embedding row."""
    if solver.views:
        return solver.views.get(task.id, [])[:num_views]
    rng = np.random.default_rng([seed, *task.id.encode()])
    views = distinct_views(fixed_colours(task), num_views, rng, solver.identity_colours)
    known = solver.row_of(task)
    return [(view, solver.mean_row if known is None else known) for view in views]


def inverse_questions(solver: Solver, tasks: Iterable[Task], num_views: int) -> list[Question]:
    """Questions the other way round, dihedral by dihedral: how likely is the input, given a
    candidate? Only of tasks that the weights know, as the inverse vectors are learned in training.
    """
    rows = [(task, solver.row_of(task)) for task in tasks]
    known = [
        (Key(t.id, i), row, p) for t, row in rows if row is not None for i, p in enumerate(t.test)
    ]
    found = []
    for view in map(View, range(min(num_views, NUM_DIHEDRALS))):
        for key, row, pair in known:
            query = view.apply(pair.input)
            condition = Condition(row, view.dihedral, keeps_colours=1, inverse=1)
            more = (None, query.shape, grid_length(*query.shape) + 1)
            found.append(Question(key, view.dihedral, view, query, condition, *more))
    return found


def load_test_set(chosen: TaskChoiceConfig) -> tuple[list[Task], dict[str, list[Grid | None]]]:
    """The tasks of a test set without answers, and the answers apart."""
    solutions = Path(chosen.solutions) if chosen.solutions else None
    tasks = load_tasks(chosen.test_set, solutions=solutions)
    unknown = set(chosen.tasks) - {task.id for task in tasks}
    if unknown:
        raise DataError(f"evaluation.tasks names {min(unknown)!r}, not in {chosen.test_set}")
    if chosen.tasks:
        tasks = [task for task in tasks if task.id in chosen.tasks]
    if chosen.held_out:
        ids = held_out_ids((task.id for task in tasks), chosen.held_out)
        tasks = [task for task in tasks if task.id in ids]
    tasks = tasks[: chosen.max_tasks]
    require_test_inputs(tasks, chosen.test_set)
    return [task.without_answers() for task in tasks], scoring.answers(tasks)


def require_test_inputs(tasks: Sequence[Task], source: str) -> None:
    """Raise TaskError where a task asks for nothing (a map of pairs, say, is for training only)."""
    empty = next((task for task in tasks if not task.test), None)
    if empty is not None:
        raise TaskError(f"{source}: task {empty.id} has no test input to answer")


def keys_of(tasks: Iterable[Task]) -> list[Key]:
    """Every test input of the tasks, in order."""
    return [Key(task.id, index) for task in tasks for index in range(len(task.test))]
