"""The overlap guard: no pair that is trained on may hold test content of the evaluated split.

Content decides, not ids: 376 of ARC-AGI-1's evaluation tasks are ARC-AGI-2 training tasks, and
training task 40853293 holds the test pair of evaluation task 070dd51e. A test pair is also
recognised when it is turned or mirrored (exactly, by its eight dihedral keys); recoloured copies
are not looked for.

What is not refused, because solving a task shows it anyway: a demonstration of a test-set task that
equals that task's own test pair (992798f6, mirrored), and one that has the test input of another
task with another output (8719f442 and 6ea4a07e). Both are reported.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from arctrm.data.dataset import PAIR_COLUMNS, BaseSet, pair_key, training_pairs
from arctrm.data.task import Grid, Pair, Task
from arctrm.data.views import NUM_DIHEDRALS, transform
from arctrm.errors import OverlapError

NUM_NAMED = 10
"""How many offending ids a message names before it only counts."""


@dataclass(frozen=True)
class Overlap:
    """`task_id` of `subset` holds test content of `test_task_id`.

    kind "pair": the same input and output, possibly turned or mirrored; kind "input": the same
    test input with another output, or with any output where the answer is not known.
    """

    task_id: str
    subset: str
    test_task_id: str
    kind: Literal["pair", "input"]


def find_overlaps(
    tasks_by_subset: dict[str, list[Task]], test_tasks: Iterable[Task], test_set: str | None = None
) -> list[Overlap]:
    """Compare everything that would be trained on with the test pairs of `test_tasks`.

    Args:
        tasks_by_subset: label -> tasks, the test set's own tasks among them under `test_set`.
        test_tasks: the evaluated tasks.
        test_set: the label of which only demonstrations are trained on.

    """
    pairs, inputs = _index(test_tasks)
    found: dict[Overlap, None] = {}
    for subset, tasks in tasks_by_subset.items():
        for task in tasks:
            for pair, _ in training_pairs(task, subset == test_set):
                same_pair = pairs.get(pair_key(pair), set())
                same_input = inputs.get(_grid_key(pair.input), set()) - same_pair
                for test_id in sorted(same_pair):
                    found[Overlap(task.id, subset, test_id, "pair")] = None
                for test_id in sorted(same_input):
                    found[Overlap(task.id, subset, test_id, "input")] = None
    return list(found)


def refused(
    overlaps: Iterable[Overlap], test_set: str | None, allow: Iterable[str] = ()
) -> list[Overlap]:
    """The overlaps that may not be trained on: see the module's header for the exceptions."""
    allowed = set(allow)
    return [
        overlap
        for overlap in overlaps
        if overlap.task_id not in allowed
        and (
            overlap.subset != test_set
            or (overlap.kind == "pair" and overlap.task_id != overlap.test_task_id)
        )
    ]


def check(overlaps: Iterable[Overlap], test_set: str | None, allow: Iterable[str] = ()) -> None:
    """Refuse to train on test content.

    Raises:
        OverlapError: some overlap is neither harmless nor allowed.

    """
    bad = refused(overlaps, test_set, allow)
    if not bad:
        return
    subsets = ", ".join(sorted({overlap.subset for overlap in bad}))
    raise OverlapError(
        f"data.subsets: tasks in {subsets} hold test content of data.test_set = {test_set!r} "
        f"({describe(bad)}); set data.drop_overlap = true to leave them out, or name them in "
        "data.exclude or data.allow_overlap"
    )


def check_demonstrations(tasks: list[Task], test_set: str) -> None:
    """Refuse to train on the demonstrations of evaluated tasks that hold another's test pair.

    Raises:
        OverlapError: some do.

    """
    bad = refused(find_overlaps({test_set: tasks}, tasks, test_set), test_set)
    if bad:
        raise OverlapError(
            f"{test_set}: demonstrations that would be trained on hold test pairs of other "
            f"evaluated tasks ({describe(bad)}); leave those tasks out with evaluation.tasks, or "
            "set evaluation.adapt_steps = 0"
        )


def check_inverse(base: BaseSet, test_tasks: Iterable[Task]) -> None:
    """Refuse to train on inverse tasks (output to input) where one shows a test pair.

    Raises:
        OverlapError: some pair of the base set, input and output exchanged, is a test pair.

    """
    pairs, _ = _index(test_tasks)
    found: dict[Overlap, None] = {}
    for index in range(base.num_pairs):
        pair, row = base.pair(index), base.pairs[index]
        assert pair.output is not None
        label = base.meta.subsets[int(row[PAIR_COLUMNS.index("subset")])]
        for test_id in sorted(pairs.get(pair_key(Pair(pair.output, pair.input)), ())):
            found[Overlap(base.meta.task_ids[int(row[0])], label, test_id, "pair")] = None
    if found:
        raise OverlapError(
            f"reader.inverse_share: pairs that would be shown from output to input are test pairs "
            f"of data.test_set = {base.meta.test_set!r} ({describe(found)}); name these tasks in "
            "data.exclude, or set reader.inverse_share = 0"
        )


def describe(overlaps: Iterable[Overlap]) -> str:
    """`40853293 (test pair of 070dd51e), ... and 366 more tasks`, each task once."""
    first = {overlap.task_id: overlap for overlap in reversed(list(overlaps))}
    named = [_name(first[task_id]) for task_id in sorted(first)[:NUM_NAMED]]
    rest = len(first) - len(named)
    return ", ".join(named) + (f" and {rest} more tasks" if rest else "")


def _name(overlap: Overlap) -> str:
    if overlap.task_id == overlap.test_task_id:
        return f"{overlap.task_id} (its own test {overlap.kind})"
    return f"{overlap.task_id} (test {overlap.kind} of {overlap.test_task_id})"


def _index(
    test_tasks: Iterable[Task],
) -> tuple[dict[tuple[Any, ...], set[str]], dict[tuple[Any, ...], set[str]]]:
    """Test task ids by the key of each test pair in every orientation, and of each test input."""
    pairs: dict[tuple[Any, ...], set[str]] = {}
    inputs: dict[tuple[Any, ...], set[str]] = {}
    for task in test_tasks:
        for pair in task.test:
            inputs.setdefault(_grid_key(pair.input), set()).add(task.id)
            if pair.output is None:
                continue
            for dihedral in range(NUM_DIHEDRALS):
                turned = Pair(_turn(pair.input, dihedral), _turn(pair.output, dihedral))
                pairs.setdefault(pair_key(turned), set()).add(task.id)
    return pairs, inputs


def _turn(grid: Grid, dihedral: int) -> Grid:
    return np.ascontiguousarray(transform(grid, dihedral))


def _grid_key(grid: Grid) -> tuple[Any, ...]:
    return grid.shape, grid.tobytes()
