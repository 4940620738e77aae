"""The invariants of a task: what all its demonstrations share.

Of two answers that a model finds likely, the one that breaks what every demonstration keeps (it
loses a colour that none of them loses, say) is seldom right. How much a broken invariant says is a
weight in nats for each name: the logarithm of how much oftener wrong candidates break it than right
answers do, where all demonstrations keep it. `benchmarks/invariant_weights.py` counts them on
ARC-AGI-1 training tasks and writes `weights.json`. (That a program of features shared by all
examples tells hypotheses apart is the idea of version spaces: Mitchell 1982, "Generalization as
search".)
"""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from arctrm.data.task import Grid, Pair
from arctrm.invariants.cells import contradicted, tables
from arctrm.invariants.properties import Side, properties


class Invariants:
    """What all `demonstrations` share; nothing where there are none."""

    def __init__(self, demonstrations: Sequence[Pair]):
        sides = [
            (Side(pair.input), Side(pair.output))
            for pair in demonstrations
            if pair.output is not None
        ]
        found = [properties(*both) for both in sides]
        self._shared = {
            key: value
            for key, value in (found[0] if found else {}).items()
            if value is not False and all(own.get(key) == value for own in found)
        }
        self._tables = tables(sides) if sides else {}
        self.names = frozenset(name for name, _ in self._shared) | frozenset(self._tables)
        """Of the invariants."""

    def broken(self, given: Grid, made: Grid) -> frozenset[str]:
        """Names of those that `made` breaks as the output of the input `given`."""
        before, after = Side(given), Side(made)
        own = properties(before, after)
        gone = {key[0] for key, value in self._shared.items() if own.get(key) != value}
        return frozenset(gone) | frozenset(contradicted(self._tables, before, after))


@cache
def weights() -> dict[str, float]:
    """Nats of each invariant that is worth something, by name."""
    text = files("arctrm.invariants").joinpath("weights.json").read_text(encoding="utf-8")
    return json.loads(text)["weights"]
