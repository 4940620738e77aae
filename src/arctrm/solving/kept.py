"""candidates.json.gz: all that `eval` ranked, so that rankings can be compared without a model.

    {task id: [for each test input: [{"grid": [[int]], "q": float, "views": {source: [int]},
               "reader_scores": [float], "inverse_scores": [float], "broken": [str]}, ...]]}

Grids are in their order. `views` are the numbers of the views under which each source proposed the
grid; `reader_scores` its log-probabilities (nats) by the reader, one for each scoring view (null:
it cannot be written so), none where it was not judged; `inverse_scores` those of the input, given
the grid; `broken` names what all demonstrations keep and it breaks (both absent in older files).
Answers are not in it.
"""

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arctrm.data.task import Task
from arctrm.errors import DataError
from arctrm.solving.candidates import Key
from arctrm.solving.vote import Ranked
from arctrm.training.files import write_bytes_atomically

KEPT = "candidates.json.gz"


def write_candidates(
    path: Path, tasks: Iterable[Task], ranked: Mapping[Key, Sequence[Ranked]]
) -> None:
    """Write the ranked grids of every test input of `tasks`."""
    content = {
        task.id: [[as_entry(one) for one in ranked[task.id, i]] for i in range(len(task.test))]
        for task in tasks
    }
    text = json.dumps(content, separators=(",", ":"))
    write_bytes_atomically(path, gzip.compress(text.encode(), mtime=0))


def read_candidates(path: Path) -> dict[str, list[list[Ranked]]]:
    """What `write_candidates` wrote, by task id and test input.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        return {
            task: [[from_entry(one) for one in own] for own in inputs]
            for task, inputs in content.items()
        }
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read as the candidates of an evaluation ({error}); write it with "
            "arctrm eval --set evaluation.keep_candidates=true"
        ) from error


def as_entry(one: Ranked) -> dict[str, Any]:
    """A ranked grid as JSON can hold it."""
    return {
        "grid": one.grid.tolist(),
        "q": one.mean_q,
        "views": {source: list(views) for source, views in one.views_by.items()},
        "reader_scores": [s if math.isfinite(s) else None for s in one.reader_scores],
        "inverse_scores": [s if math.isfinite(s) else None for s in one.inverse_scores],
        "broken": list(one.broken),
    }


def from_entry(one: dict[str, Any]) -> Ranked:
    """What `as_entry` wrote."""
    views = {source: tuple(own) for source, own in one["views"].items()}
    votes = {source: len(own) for source, own in views.items()}
    return Ranked(
        np.array(one["grid"], dtype=np.uint8),
        sum(votes.values()),
        one["q"],
        tuple(sorted(views)),
        _scores(one["reader_scores"]),
        views,
        votes,
        inverse_scores=_scores(one.get("inverse_scores", [])),
        broken=tuple(one.get("broken", [])),
    )


def _scores(written: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(-math.inf if one is None else one for one in written)
