"""How large the unknown output may be: size rules read off the demonstrations alone.

The compact layout crops the canvas, so it has to be fixed before the answer is known. A canvas
that is too large costs time; one that is too small makes the task unsolvable. Hence two
questions with two answers: `output_size` is the likeliest size, `query_canvas` holds every
plausible one.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from arctrm.data.task import MAX_SIDE, Grid, Task


class SizeGuess(NamedTuple):
    """The likeliest size of an output, in cells, and the rule that said so.

    `rule` is one rule name when both axes agree ("same"), else "height rule x width rule".
    """

    height: int
    width: int
    rule: str


class Side(NamedTuple):
    """A plausible length of one side of the output, in cells, by one rule."""

    rule: str
    length: int


def output_size(task: Task, query: Grid) -> SizeGuess:
    """Guess the size of the output of `query`: the likeliest rule of each axis.

    Rules, in this order: same (as the input), constant, ratio, offset; the same with the input's
    other axis ("transposed ..."); and, where none fits all demonstrations, maximum: the longest
    output side among them.
    """
    height, width = (plausible_sides(task, query, axis)[0] for axis in (0, 1))
    rule = height.rule if height.rule == width.rule else f"{height.rule} x {width.rule}"
    return SizeGuess(height.length, width.length, rule)


def query_canvas(task: Task, query: Grid) -> tuple[int, int]:
    """Canvas (height, width) that holds `query`, every plausible output, and their EOS border."""
    height, width = (
        max(query.shape[axis], *(side.length for side in plausible_sides(task, query, axis)))
        for axis in (0, 1)
    )
    return min(MAX_SIDE, height + 1), min(MAX_SIDE, width + 1)


def plausible_sides(task: Task, query: Grid, axis: int) -> list[Side]:
    """All lengths of the output's side along `axis` (0 height, 1 width), the likeliest first.

    Rules that fit every demonstration and predict 1..30 cells; if there are none, the rules with
    the input's other axis; if none of those fit either, what bounds an irregular output.
    """
    outputs = [pair.output.shape[axis] for pair in task.demonstrations if pair.output is not None]
    for source in (axis, 1 - axis):
        inputs = [pair.input.shape[source] for pair in task.demonstrations]
        prefix = "" if source == axis else "transposed "
        rules = _fitting_rules(inputs, outputs, query.shape[source])
        sides = [Side(prefix + rule, length) for rule, length in rules if 1 <= length <= MAX_SIDE]
        if sides:
            return sides
    inputs = [pair.input.shape[axis] for pair in task.demonstrations]
    return _irregular_sides(inputs, outputs, query.shape[axis])


def _fitting_rules(inputs: list[int], outputs: list[int], query: int) -> Iterator[Side]:
    """Every rule that explains all demonstrations, with the length it predicts for the query."""
    if inputs == outputs:
        yield Side("same", query)
    if len(set(outputs)) == 1:
        yield Side("constant", outputs[0])
    if all(o * inputs[0] == outputs[0] * i for i, o in zip(inputs, outputs, strict=True)):
        yield Side("ratio", -(-query * outputs[0] // inputs[0]))
    if len({o - i for i, o in zip(inputs, outputs, strict=True)}) == 1:
        yield Side("offset", query + outputs[0] - inputs[0])


def _irregular_sides(inputs: list[int], outputs: list[int], query: int) -> list[Side]:
    """Bounds where the content decides the size: the longest seen, and what continues it.

    "step" goes on by the largest gap between the observed lengths (outputs of 3k cells for k
    objects: the query may hold one object more); "scaled" applies the largest observed growth
    to the query.
    """
    seen = sorted(set(outputs))
    step = max((high - low for low, high in itertools.pairwise(seen)), default=0)
    scaled = max(-(-query * o // i) for i, o in zip(inputs, outputs, strict=True))
    bounds = [("maximum", seen[-1]), ("step", seen[-1] + step), ("scaled", scaled)]
    return [Side(rule, min(MAX_SIDE, length)) for rule, length in bounds]
