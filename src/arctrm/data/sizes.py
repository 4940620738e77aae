"""How large the unknown output is: size rules read off the demonstrations alone.

Where TRM answers without a reader's draft, somebody has to say how many cells the answer has. Each
axis is guessed by itself, by the first rule that fits every demonstration and gives 1 to 30 cells.
"""

import itertools
from collections.abc import Iterable, Iterator

from arctrm.data.task import MAX_SIDE, Grid, Task


def output_size(task: Task, test_input: Grid) -> tuple[int, int]:
    """The likeliest (height, width) of the output of `test_input`."""
    return plausible_sides(task, test_input, 0)[0], plausible_sides(task, test_input, 1)[0]


def plausible_sides(task: Task, test_input: Grid, axis: int) -> list[int]:
    """Lengths that the output's side along `axis` (0: height) may have, the likeliest first.

    Rules, in this order: as large as the input, constant, a fixed ratio, a fixed difference; then
    the same with the input's other axis. Where none fits: the largest side seen, that and the
    largest gap between the sides seen, the input's side grown as much as any.
    """
    pairs = [
        (pair.input.shape, pair.output.shape)
        for pair in task.demonstrations
        if pair.output is not None
    ]
    outputs = [output[axis] for _, output in pairs]
    for source in (axis, 1 - axis):
        inputs = [given[source] for given, _ in pairs]
        found = [
            length
            for length in _fitting(inputs, outputs, test_input.shape[source])
            if 1 <= length <= MAX_SIDE
        ]
        if found:
            return found
    if not pairs:
        return [test_input.shape[axis]]
    seen = sorted(set(outputs))
    step = max((high - low for low, high in itertools.pairwise(seen)), default=0)
    scaled = max(
        -(-test_input.shape[axis] * output[axis] // given[axis]) for given, output in pairs
    )
    return [min(MAX_SIDE, length) for length in (seen[-1], seen[-1] + step, scaled)]


def size_rules_right(tasks: Iterable[Task]) -> tuple[int, int]:
    """(known test outputs whose size the rules say, known test outputs)."""
    right = [
        pair.output.shape == output_size(task.without_answers(), pair.input)
        for task in tasks
        for pair in task.test
        if pair.output is not None
    ]
    return sum(right), len(right)


def _fitting(inputs: list[int], outputs: list[int], asked: int) -> Iterator[int]:
    """The length that each rule that explains all demonstrations predicts for the test input."""
    if not outputs:
        return
    if inputs == outputs:
        yield asked
    if len(set(outputs)) == 1:
        yield outputs[0]
    if all(o * inputs[0] == outputs[0] * i for i, o in zip(inputs, outputs, strict=True)):
        yield -(-asked * outputs[0] // inputs[0])
    if len({o - i for i, o in zip(inputs, outputs, strict=True)}) == 1:
        yield asked + outputs[0] - inputs[0]
