"""Tasks, solutions, an evaluation as one HTML file each: no network, no framework, light and dark.

Here objects become rows of plain values; the templates lay them out and draw the grids. All text
from outside is escaped by the templates. Answers and verdicts are those that the caller hands in.
"""

import base64
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from arctrm import __version__
from arctrm.data.task import Grid, Task
from arctrm.invariants.task import COPY, COPY_NATS, broken_cells, weights
from arctrm.report.pictures import GRID_STYLE, HIDDEN, curve_svg, grid_svg
from arctrm.system import disk_errors, write_bytes_atomically

if TYPE_CHECKING:  # the room above, which calls this one
    from arctrm.solve.rank import Ranked
    from arctrm.solve.scoring import Verdicts
    from arctrm.solve.solution import Solution

# Sources of candidates in the order of the bars, with their names on the page.
VOICES = {"reader": "reader", "trm": "TRM", "joint": "TRM on a draft", "planner": "planner"}
SHOWN, SHOWN_IN_GALLERY = 10, 5  # candidates of a test input
FULL_BAR = 20.0  # nats that a candidate may be less likely than the best, until its bar is empty
NEAR = 0.9  # share of right cells from which a wrong grid of the right size is a near miss
Marks = Callable[[Grid], Mapping[str, np.ndarray]]  # cells of a grid, bool [H, W], by name


def write_page(path: Path, html: str) -> None:
    """Write a page in one step."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, html.encode())


def tasks_page(source: str, tasks: Sequence[Task]) -> str:
    """The tasks of a source, with the answers that they have."""
    return _page("tasks.html", source, tasks=tasks)


def solution_page(
    solution: "Solution", correct: "Verdicts | None" = None, checkpoint: str = ""
) -> str:
    """A solved task with all that speaks for its answers, and what `scoring.verdicts` says of them,
    where that is wanted; `checkpoint` is the name of the weights.
    """
    task, rows = solution.task, []
    right = correct or [(None, None)] * len(solution.answers)
    told = zip(solution.answers, solution.certainties, right, strict=True)
    for answer, certainty, verdicts in told:

        def marks(grid: Grid, given: Grid = answer.test_input) -> Mapping[str, np.ndarray]:
            cells = broken_cells(task, given, grid)
            return {name: own for name, own in cells.items() if name in weights()}

        candidates = _candidates(answer.ranked, SHOWN, verdicts, marks)
        rows.append((answer, certainty, verdicts, candidates))
    content = {"solution": solution, "rows": rows, "checkpoint": checkpoint}
    return _page("solved.html", task.id, **content)


def evaluation_page(
    told: Mapping[str, Any],
    by_row: Mapping[str, Mapping[str, Any]],
    tasks: Sequence[Task],
    ranked: Mapping[str, Sequence[Sequence["Ranked"]]],
    known: Mapping[str, Sequence[Grid | None]],
    right: Mapping[str, "Verdicts"],
    curves: Mapping[str, Mapping[int, float]],
) -> str:
    """An evaluation: `by_row` as in ablations.json, the first for everything, nothing where no
    answer is known; by task id the ranked grids of every test input, the answers, and which grids
    are right; task_fraction against the number of views, by name.
    """
    scores = next(iter(by_row.values()), {})
    cards = []
    for task in tasks:
        both = (ranked[task.id], known[task.id], right[task.id])
        cards.append(_card(task, scores.get("tasks", {}).get(task.id), *both))
    return _page(
        "evaluation.html",
        f"evaluation of {len(tasks)} tasks",
        told=told,
        by_row=by_row,
        scores=scores,
        cards=cards,
        counts=Counter(card[kind] for card in cards for kind in ("status", "voice")),
        curves=curves if any(len(own) > 1 for own in curves.values()) else {},
    )


def _page(template: str, title: str, **content: Any) -> str:
    read = lambda name: files("arctrm.report").joinpath("templates", name).read_text("utf-8")
    script = read("page.js")
    content |= {"title": title, "version": __version__, "script": Markup(script)}
    content["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content["style"] = Markup(read("page.css") + GRID_STYLE)
    return _templates().get_template(template).render(content)


@cache
def _templates() -> Environment:
    loader = PackageLoader("arctrm.report")
    found = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"grid": grid_svg, "curve": curve_svg, "voices": VOICES, "steps_of": _steps}
    # HTML that the page unpacks when it is wanted: a tenth of the size, and not yet elements.
    packed = lambda html: base64.b64encode(zlib.compress(html.encode(), 9)).decode()
    found.filters["packed"] = packed
    return found


def _candidates(
    ranked: Sequence["Ranked"], most: int, verdicts: Sequence[bool | None], marks: Marks
) -> list[dict[str, Any]]:
    """The first candidates: their evidence, and their places by votes and for the reader."""
    all_votes = sum(one.votes for one in ranked)
    by_votes = sorted(ranked, key=lambda one: (-one.votes, -(one.probe or 0.0), -one.mean_q))
    judged = [one for one in by_votes if one.reader_scores]
    by_reader = sorted(judged, key=lambda one: -(one.reader_score or 0.0))
    place = lambda order, one: next((i for i, own in enumerate(order, 1) if own is one), None)
    finite = [s for one in judged if (s := one.reader_score) is not None and isfinite(s)]
    rows = []
    for number, one in enumerate(ranked[:most], 1):
        score, best = one.reader_score, max(finite, default=0.0)
        nats = {name: COPY_NATS if name == COPY else weights().get(name) for name in one.broken}
        rows.append(
            {
                "number": number,
                "grid": one.grid,
                "right": verdicts[number - 1] if number <= len(verdicts) else None,
                "proposals": one.num_proposals,
                "votes": one.votes,
                "all_votes": all_votes,
                "by": [(name, one.votes_by[name]) for name in VOICES if name in one.votes_by],
                "places": (place(by_votes, one), place(by_reader, one)),
                "score": score,
                "bar": None if score is None else max(0.0, 1 + (score - best) / FULL_BAR),
                "inverse": one.inverse_score,
                "probe": one.probe,
                "broken": [(name, worth) for name, worth in nats.items() if worth],
                "marks": marks(one.grid),
            }
        )
    return rows


def _steps(history: Sequence[Grid | None]) -> list[tuple[Grid, np.ndarray | None]]:
    """The first grid (None: hidden cells) and that after each supervision step, with the cells,
    bool [H, W], that the step changed.
    """
    after = [grid for grid in history if grid is not None]
    if history[0] is not None:
        changed = [None, *(one != last for last, one in pairwise(after))]
        return list(zip(after, changed, strict=True))
    hidden = np.full_like(after[0], HIDDEN)
    return [(hidden, None), *_steps(after)]


def _card(
    task: Task,
    score: Mapping[str, Any] | None,
    ranked: Sequence[Sequence["Ranked"]],
    known: Sequence[Grid | None],
    right: "Verdicts",
) -> dict[str, Any]:
    """A task in the gallery; `voice` says who proposed the right grid of every test input."""
    if score is None or score["solved"] == score["total"]:
        status = "unknown" if score is None else "solved"
    else:
        near = "near" if score["cells"] >= NEAR else "wrong"
        status = near if score["shape"] == 1 else "size"
    heard, rows = {"reader", "trm"}, []
    for pair, own, answer, verdicts in zip(task.test, ranked, known, right, strict=True):
        both = zip(own, verdicts, strict=True)
        sources = {name for one, is_right in both if is_right for name in one.views_by}
        heard &= {"reader" if name == "reader" else "trm" for name in sources}

        def marks(grid: Grid, answer: Grid | None = answer) -> Mapping[str, np.ndarray]:
            return {} if answer is None or answer.shape != grid.shape else {"wrong": grid != answer}

        place = next((i for i, one in enumerate(verdicts, 1) if one), None)
        candidates = _candidates(own, SHOWN_IN_GALLERY, verdicts, marks)
        rows.append((pair.input, answer, place, len(own), candidates))
    voice = "nobody" if not heard else "both" if len(heard) > 1 else heard.pop()
    return {"task": task, "status": status, "voice": voice, "inputs": rows, "score": score}
