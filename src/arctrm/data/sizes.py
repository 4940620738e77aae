"""How large the unknown output is: size rules read off the demonstrations alone.

Each axis is guessed by itself, by the first rule that fits every demonstration and gives 1 to 30
cells: rules of the input's sides first, then rules of what the input shows (the box around a
colour, the sections between lines, numbers of colours and cells).
"""

import itertools
from collections.abc import Iterator

import numpy as np

from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid, Task


def output_size(task: Task, test_input: Grid) -> tuple[int, int]:
    """The likeliest (height, width) of the output of `test_input`."""
    return plausible_sides(task, test_input, 0)[0], plausible_sides(task, test_input, 1)[0]


def plausible_sides(task: Task, test_input: Grid, axis: int) -> list[int]:
    """Lengths that the output's side along `axis` (0: height) may have, the likeliest first.

    Rules: as large as the input, constant, a fixed ratio or difference; the same of the other axis;
    of something that the input shows; the largest side seen, also with a gap; the most grown.
    """
    shown = [pair for pair in task.demonstrations if pair.output is not None]
    pairs = [(pair.input.shape, pair.output.shape) for pair in shown if pair.output is not None]
    outputs = [output[axis] for _, output in pairs]
    for source in (axis, 1 - axis):
        inputs = [given[source] for given, _ in pairs]
        sides = _fitting(inputs, outputs, test_input.shape[source])
        if found := [side for side in sides if 1 <= side <= MAX_SIDE]:
            return found
    if not pairs:
        return [test_input.shape[axis]]
    found = _by_contents([pair.input for pair in shown], outputs, test_input, axis)
    seen = sorted(set(outputs))
    step = max((high - low for low, high in itertools.pairwise(seen)), default=0)
    side = test_input.shape[axis]
    scaled = max(-(-side * output[axis] // given[axis]) for given, output in pairs)
    return found + [min(MAX_SIDE, length) for length in (seen[-1], seen[-1] + step, scaled)]


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


def _by_contents(inputs: list[Grid], outputs: list[int], asked: Grid, axis: int) -> list[int]:
    """The length by the first measure of inputs that explains all demonstrations; or none."""
    known = [_measures(grid) for grid in inputs]
    candidates = [
        ([own[name][axis] for own in known], sides[axis])
        for name, sides in _measures(asked).items()
        if all(name in own for own in known)
    ]
    rules = [[now] if sides == outputs else [] for sides, now in candidates]
    rules += [_scaled(sides, outputs, now) for sides, now in candidates if len(set(sides)) > 1]
    return next(([n] for found in rules for n in found if 1 <= n <= MAX_SIDE), [])


def _scaled(sides: list[int], outputs: list[int], now: int) -> list[int]:
    """`now` in the fixed ratio, or with the fixed difference, that all demonstrations show."""
    ratio_fits = all(o * sides[0] == outputs[0] * s for s, o in zip(sides, outputs, strict=True))
    if 0 not in sides and ratio_fits:
        return [now * outputs[0] // sides[0]] if now * outputs[0] % sides[0] == 0 else []
    fits = len({o - s for s, o in zip(sides, outputs, strict=True)}) == 1
    return [now + outputs[0] - sides[0]] if fits else []


def _measures(grid: Grid) -> dict[str, tuple[int, int]]:
    """Numbers for (height, width) that a grid shows, the plainest first."""
    counts = np.bincount(grid.ravel(), minlength=NUM_COLOURS)
    back = int(counts.argmax())
    colours = [colour for colour in range(NUM_COLOURS) if counts[colour] and colour != back]
    boxes = {colour: _box(grid == colour) for colour in colours}
    found = {"not background": _box(grid != back)} if colours else {}
    if grid.any():
        found["not 0"] = _box(grid != 0)
    if colours:
        by_area = sorted(boxes.values(), key=lambda box: box[0] * box[1])
        found["rarest colour"] = boxes[min(colours, key=lambda colour: counts[colour])]
        found["commonest colour"] = boxes[max(colours, key=lambda colour: counts[colour])]
        found["largest box"], found["smallest box"] = by_area[-1], by_area[0]
        found["inside of the largest box"] = by_area[-1][0] - 2, by_area[-1][1] - 2
    one_each = {
        "colours but 0": int((counts[1:] > 0).sum()),
        "colours": len(colours) + 1,
        "cells but 0": int(counts[1:].sum()),
        "cells of the commonest colour": max((int(counts[c]) for c in colours), default=0),
    }
    found |= {name: (number, number) for name, number in one_each.items()}
    rows, columns = (_sections(turned, back) for turned in (grid, grid.T))
    if rows and columns:
        found["largest section"] = max(rows), max(columns)
        found["number of sections"] = len(rows), len(columns)
    found |= {f"colour {colour}": box for colour, box in boxes.items()}
    return found


def _box(mask: np.ndarray) -> tuple[int, int]:
    """Sides of the smallest box around the cells of a mask, some of which are set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


def _sections(grid: Grid, background: int) -> list[int]:
    """Heights of the sections between rows of one colour that is not the background."""
    is_line = (grid == grid[:, :1]).all(1) & (grid[:, 0] != background)
    return [len(list(rows)) for line, rows in itertools.groupby(is_line.tolist()) if not line]
