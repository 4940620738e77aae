"""The overlap guard: no pair that is trained on may hold test content of the evaluated split.

Content decides, not ids: training task 40853293 holds the test pair of evaluation task 070dd51e. A
test pair is also recognised when it is turned or mirrored, but not recoloured. Reported and not
refused, as solving a task shows it anyway: a demonstration of a test-set task that equals that
task's own test pair (992798f6, mirrored) or has another's test input (8719f442 and 6ea4a07e).
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from arctrm.data.task import Pair, Task, grid_key, pair_key, training_pairs
from arctrm.data.views import NUM_DIHEDRALS, View
from arctrm.errors import OverlapError

if TYPE_CHECKING:  # this module guards the building of the base set
    from arctrm.data.base_set import BaseSet

NUM_NAMED = 10  # offending ids that a message names before it only counts
_TaskIds = dict[Hashable, set[str]]


@dataclass(frozen=True)
class Overlap:
    """`task_id` of `subset` holds test content of `test_task_id`: a "pair" (possibly turned or
    mirrored), or a test "input" with another output, or with any where the answer is not known; or
    it is a test "task" by its id and adds pairs to its demonstrations, as a generator would.
    """

    task_id: str
    subset: str
    test_task_id: str
    kind: Literal["pair", "input", "task"]


def find_overlaps(
    tasks_by_subset: dict[str, list[Task]], test_tasks: Iterable[Task], test_set: str | None = None
) -> list[Overlap]:
    """Compare all that would be trained on (of `test_set`: demonstrations) with the test pairs."""
    test_tasks = list(test_tasks)
    pairs, inputs = _index(test_tasks)
    shown = {task.id: set(map(pair_key, task.demonstrations)) for task in test_tasks}
    found: dict[Overlap, None] = {}
    for subset, tasks in tasks_by_subset.items():
        for task in tasks:
            for pair, _ in training_pairs(task, subset == test_set):
                key = pair_key(pair)
                same_pair = pairs.get(key, set())
                same_input = inputs.get(grid_key(pair.input), set()) - same_pair
                found |= {Overlap(task.id, subset, i, "pair"): None for i in sorted(same_pair)}
                found |= {Overlap(task.id, subset, i, "input"): None for i in sorted(same_input)}
                is_known = subset == test_set or bool(same_pair | same_input)
                if not is_known and key not in shown.get(task.id, {key}):
                    found[Overlap(task.id, subset, task.id, "task")] = None
    return list(found)


def refused(
    overlaps: Iterable[Overlap], test_set: str | None, allow: Collection[str] = ()
) -> list[Overlap]:
    """The overlaps that may not be trained on: see the module's header for the exceptions."""

    of_another = lambda found: found.kind == "pair" and found.task_id != found.test_task_id
    leaks = (found for found in overlaps if found.subset != test_set or of_another(found))
    return [found for found in leaks if found.task_id not in allow]


def check(overlaps: Iterable[Overlap], test_set: str | None, allow: Collection[str] = ()) -> None:
    """Raise OverlapError where an overlap is neither harmless nor allowed."""
    if bad := refused(overlaps, test_set, allow):
        subsets = ", ".join(sorted({overlap.subset for overlap in bad}))
        raise OverlapError(
            f"data.subsets: tasks in {subsets} hold test content of data.test_set = {test_set!r} "
            f"({describe(bad)}); set data.drop_overlap = true to leave them out, or name them in "
            "data.exclude or data.allow_overlap"
        )


def check_inverse(base: "BaseSet", test_tasks: Iterable[Task]) -> None:
    """Raise OverlapError where an inverse task (output to input) would show a test pair."""
    test_pairs, _ = _index(test_tasks)
    found = [
        Overlap(task_id, label, test_id, "pair")
        for task_id, label, pair in base.labelled_pairs()
        if pair.output is not None
        for test_id in sorted(test_pairs.get(pair_key(Pair(pair.output, pair.input)), ()))
    ]
    if found:
        raise OverlapError(
            "reader.inverse_share: shown from output to input these are test pairs of "
            f"{base.meta.test_set!r}: {describe(found)}; name them in data.exclude, or set it to 0"
        )


def describe(overlaps: Iterable[Overlap]) -> str:
    """`40853293 (test pair of 070dd51e), ... and 366 more tasks`, each task once."""
    first = {overlap.task_id: overlap for overlap in reversed(list(overlaps))}
    named = []
    for task_id in sorted(first)[:NUM_NAMED]:
        kind, test_id = first[task_id].kind, first[task_id].test_task_id
        own = f"its own test {kind}" if task_id == test_id else f"test {kind} of {test_id}"
        own = "further pairs of a test task" if kind == "task" else own
        named.append(f"{task_id} ({own})")
    rest = len(first) - len(named)
    return ", ".join(named) + (f" and {rest} more tasks" if rest else "")


def _index(test_tasks: Iterable[Task]) -> tuple[_TaskIds, _TaskIds]:
    """Test task ids by the key of each test pair in every orientation, and of each test input."""
    pairs: _TaskIds = defaultdict(set)
    inputs: _TaskIds = defaultdict(set)
    for name, pair in ((task.id, pair) for task in test_tasks for pair in task.test):
        inputs[grid_key(pair.input)].add(name)
        for view in map(View, range(NUM_DIHEDRALS) if pair.output is not None else ()):
            pairs[pair_key(view.apply_pair(pair))].add(name)
    return pairs, inputs
