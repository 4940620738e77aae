"""Rankings after a look at what each grid breaks of what all demonstrations keep."""

from collections.abc import Mapping, Sequence

from arctrm.data.task import Grid, Task
from arctrm.invariants.shared import Invariants, weights
from arctrm.solving.candidates import Key
from arctrm.solving.vote import Ranked, by_invariants

LOOKED_AT = 10
"""The first grids of each test input; what comes behind them stays there."""


class Checker:
    """Knows the invariants of tasks, and what it has looked at already."""

    def __init__(self) -> None:
        self._invariants: dict[str, Invariants] = {}
        self._broken: dict[tuple[Key, tuple[int, ...], bytes], frozenset[str]] = {}

    def checked(
        self, ranked: Mapping[Key, Sequence[Ranked]], tasks: Sequence[Task], weight: float
    ) -> dict[Key, list[Ranked]]:
        """The rankings of the test inputs of `tasks`; what a grid breaks counts `weight` times its
        nats. As they are where that is 0.
        """
        found = {key: list(own) for key, own in ranked.items()}
        if not weight:
            return found
        for task in tasks:
            for index, pair in enumerate(task.test):
                key = task.id, index
                own = found.get(key, [])
                broken = [self._breaks(task, key, pair.input, r.grid) for r in own[:LOOKED_AT]]
                found[key] = by_invariants(own, broken, weights(), weight)
        return found

    def _breaks(self, task: Task, key: Key, given: Grid, made: Grid) -> frozenset[str]:
        which = key, made.shape, made.tobytes()
        if which not in self._broken:
            if task.id not in self._invariants:
                self._invariants[task.id] = Invariants(task.demonstrations)
            self._broken[which] = self._invariants[task.id].broken(given, made)
        return self._broken[which]
