"""JSON -> tasks, with every mistake reported as one sentence that says where it is.

Indices in messages count from 0, as in the JSON path: `tasks/0a.json: train[1].output row 3`.
"""

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from arctrm.data.task import MAX_SIDE, NUM_COLOURS, Grid, Pair, Task
from arctrm.errors import TaskError

MAX_BYTES = 256 * 2**20
"""Of JSON in one file, decompressed: about five times all of RE-ARC at 40 pairs a task."""

_GZIP = b"\x1f\x8b"
_WANTED = "give a readable JSON file, plain (.json) or gzipped (.json.gz)"


def load_json(path: Path) -> Any:
    """Read a JSON file, plain or gzipped, of at most `MAX_BYTES`.

    Raises:
        TaskError: the file cannot be read, is too large, is not valid gzip, or is not JSON.
    """
    try:
        # Reading a named pipe would wait for a writer that may never come.
        if path.exists() and not path.is_file():
            reason = "Is a directory" if path.is_dir() else "Not a regular file"
            raise TaskError(f"{path}: cannot be read ({reason}); {_WANTED}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if data.startswith(_GZIP):
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise TaskError(
                f"{path}: holds more than {MAX_BYTES // 2**20} MiB of JSON; split it into several "
                "files of one folder"
            )
        if not data.strip():
            raise TaskError(f"{path}: is not JSON: the file is empty; {_WANTED}")
        return json.loads(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(
            f"{path}: is not a complete gzip file ({error}); compress or download it again"
        ) from error
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}); {_WANTED}") from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: is not JSON ({error}); {_WANTED}") from error


def parse_task(obj: Any, task_id: str, where: str) -> Task:
    """Check `{"train": [pair, ...], "test": [pair, ...]}`; test outputs may be absent or null.

    Raises:
        TaskError: `obj` is not a valid task.
    """
    if not isinstance(obj, dict) or "train" not in obj:
        raise TaskError(
            f'{where}: is not an ARC task: expected an object with "train" and "test", '
            f"got {_describe(obj)}"
        )
    demonstrations = parse_pairs(obj["train"], where, "train", outputs_required=True)
    test = parse_pairs(obj.get("test", []), where, "test", outputs_required=False)
    return Task(task_id, demonstrations, test)


def parse_pairs(
    obj: Any, where: str, part: str = "train", outputs_required: bool = True
) -> tuple[Pair, ...]:
    """Check a non-empty list of `{"input": grid, "output": grid}`.

    Raises:
        TaskError: `obj` is something else.
    """
    if not isinstance(obj, list):
        raise TaskError(f'{where}: "{part}" must be a list of pairs, got {_kind(obj)}')
    if not obj:
        missing = "a demonstration" if part == "train" else "a test input"
        raise TaskError(f'{where}: "{part}" is empty or missing; a task needs at least {missing}')
    pairs = []
    for index, item in enumerate(obj):
        place = f"{where}: {part}[{index}]"
        if not isinstance(item, dict) or "input" not in item:
            raise TaskError(f'{place}: expected an object with "input", got {_describe(item)}')
        output = item.get("output")
        if output is None and outputs_required:
            raise TaskError(f'{place}: has no "output"; only test pairs may leave it out')
        asked = parse_grid(item["input"], f"{place}.input")
        made = None if output is None else parse_grid(output, f"{place}.output")
        pairs.append(Pair(asked, made))
    return tuple(pairs)


def parse_grid(obj: Any, where: str) -> Grid:
    """Check a list of equally long lists of colours 0..9, 1..30 x 1..30.

    Raises:
        TaskError: `obj` is something else.
    """
    for index, row in enumerate(obj if isinstance(obj, list) else [obj]):
        if not (isinstance(obj, list) and isinstance(row, list)):
            as_row = f" as row {index}" if isinstance(obj, list) else ""
            raise TaskError(f"{where}: a grid must be a list of rows, got {_kind(row)}{as_row}")
    height, width = len(obj), len(obj[0]) if obj else 0
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        size = f"{height}x{width}" if height and width else "an empty grid"
        raise TaskError(f"{where}: a grid must be 1x1 to {MAX_SIDE}x{MAX_SIDE}, got {size}")
    cells = bytearray()  # twice as fast as np.array(obj), which matters for 80,000 grids
    for index, row in enumerate(obj):
        if len(row) != width:
            raise TaskError(
                f"{where} row {index}: has {len(row)} cells where row 0 has {width}; "
                "all rows of a grid must be equally long"
            )
        # type() and not isinstance(): a boolean is an int, and a float may equal a colour.
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= NUM_COLOURS:
            raise _bad_cell(row, f"{where} row {index}")
        cells += bytes(row)
    return np.frombuffer(cells, dtype=np.uint8).reshape(height, width)


def _bad_cell(row: list[Any], where: str) -> TaskError:
    column, cell = next(
        (column, cell)
        for column, cell in enumerate(row)
        if type(cell) is not int or not 0 <= cell < NUM_COLOURS
    )
    got = _clip(json.dumps(cell)) + (f" ({_kind(cell)})" if type(cell) is not int else "")
    return TaskError(f"{where} column {column}: a colour must be a whole number 0..9, got {got}")


def _describe(obj: Any) -> str:
    keys = [json.dumps(_clip(key)) for key in list(obj)[:3]] if isinstance(obj, dict) else []
    return _kind(obj) + (f" with {', '.join(keys)}" if keys else "")


def _kind(obj: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    numbers = {int: "a number", float: "a number with a decimal point", type(None): "null"}
    return (kinds | numbers)[type(obj)]


def _clip(text: str) -> str:
    """A key or a cell as it is shown: it may be a whole nested list or a 400-digit number."""
    return text if len(text) <= 20 else text[:17] + "..."
