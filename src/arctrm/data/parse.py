"""JSON -> tasks, with every mistake reported as one sentence that says where it is.

Indices in messages count from 0, as in the JSON path: `tasks/0a.json: train[1].output row 3`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid, Pair, Task
from arctrm.errors import TaskError
from arctrm.system import read_json


def load_json(path: Path) -> Any:
    """Read a JSON file, plain or gzipped, within the limits of `read_limited`; raises TaskError."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        what = "is not JSON" if isinstance(error, ValueError) else "cannot be read"
        raise TaskError(
            f"{path}: {what} ({reason}); give a JSON file, plain (.json) or gzipped (.json.gz)"
        ) from error


def parse_task(obj: Any, task_id: str, where: str) -> Task:
    """Check `{"train": [pair, ...], "test": [pair, ...]}`; test outputs may be absent or null."""
    if not isinstance(obj, dict) or "train" not in obj:
        wanted = 'expected an object with "train" and "test"'
        raise TaskError(f"{where}: is not an ARC task: {wanted}, got {_shown(obj)}")
    demonstrations = parse_pairs(obj["train"], where, "train", outputs_required=True)
    test = parse_pairs(obj.get("test", []), where, "test", outputs_required=False)
    return Task(task_id, demonstrations, test)


def parse_pairs(
    obj: Any, where: str, part: str = "train", outputs_required: bool = True
) -> tuple[Pair, ...]:
    """Check a non-empty list of `{"input": grid, "output": grid}`; raises TaskError."""
    if not isinstance(obj, list) or not obj:
        raise TaskError(f'{where}: "{part}" must be a list of pairs, at least one')
    pairs = []
    for index, item in enumerate(obj):
        place = f"{where}: {part}[{index}]"
        if not isinstance(item, dict) or "input" not in item:
            raise TaskError(f'{place}: expected an object with "input", got {_shown(item)}')
        output = item.get("output")
        if output is None and outputs_required:
            raise TaskError(f'{place}: has no "output"; only test pairs may leave it out')
        asked = parse_grid(item["input"], f"{place}.input")
        made = None if output is None else parse_grid(output, f"{place}.output")
        pairs.append(Pair(asked, made))
    return tuple(pairs)


def parse_grid(obj: Any, where: str) -> Grid:
    """Check a list of equally long lists of colours 0..9, 1..30 x 1..30; raises TaskError."""
    if not isinstance(obj, list) or not all(isinstance(row, list) for row in obj):
        raise TaskError(f"{where}: a grid must be a list of rows, got {_shown(obj)}")
    height, width = len(obj), len(obj[0]) if obj else 0
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        size = f"{height}x{width}" if height and width else "an empty grid"
        raise TaskError(f"{where}: a grid must be 1x1 to {MAX_SIDE}x{MAX_SIDE}, got {size}")
    cells = bytearray()  # twice as fast as np.array(obj), which matters for 80,000 grids
    for index, row in enumerate(obj):
        if len(row) != width:
            raise TaskError(f"{where} row {index}: has {len(row)} cells where row 0 has {width}")
        # type() and not isinstance(): a boolean is an int, and a float may equal a colour.
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= NUM_COLOURS:
            bad = [type(c) is not int or not 0 <= c < NUM_COLOURS for c in row].index(True)
            what = f"a colour must be a whole number 0..9, got {_shown(row[bad])}"
            raise TaskError(f"{where} row {index} column {bad}: {what}")
        cells += bytes(row)
    return np.frombuffer(cells, dtype=np.uint8).reshape(height, width)


def _shown(obj: Any) -> str:
    """The beginning of a JSON value, which may be a nested list or a 400-digit number."""
    try:
        text = json.dumps(obj, default=str)
    except RecursionError:
        text = "a value nested too deep"
    return text if len(text) <= 40 else text[:37] + "..."
