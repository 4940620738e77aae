"""Where a grid breaks an invariant: the cells, for those that are about cells."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from arctrm.invariants.properties import Key, Side, enclosed

Cells = np.ndarray  # bool [H, W], of the output


def cells_against(which: Key, shared: Hashable, given: Side, made: Side) -> Cells | None:
    """The cells of `made` that speak against a property, whose value in the demonstrations is
    `shared`; None where it is about no single cells.
    """
    (name, colour), before, after = which, given.grid, made.grid
    is_in = lambda grid, colours: np.isin(grid, sorted(colours))
    anywhere: dict[str, Callable[[], Cells]] = {
        "mirrored left to right": lambda: after != after[:, ::-1],
        "mirrored top to bottom": lambda: after != after[::-1],
        "turned by half": lambda: after != after[::-1, ::-1],
        "mirrored diagonally": lambda: after != after.T,
        "rows alike": lambda: after != after[:1],
        "columns alike": lambda: after != after[:, :1],
        "no new colour": lambda: ~is_in(after, given.colours),
        "colours of the output": lambda: ~is_in(after, shared),  # type: ignore[call-overload]
    }
    if name == "mirrored diagonally" and len(set(after.shape)) > 1:
        return None
    if name in anywhere:
        return anywhere[name]()
    of_colour = name.replace("black", "a colour")
    if of_colour == "a colour is missing":
        return after == colour
    if before.shape != after.shape:
        return None
    changed, was, becomes = before != after, before == colour, after == colour
    at_edge = np.ones(after.shape, bool)
    at_edge[1:-1, 1:-1] = False
    inside, full = enclosed(before, given.empty), given.full
    rows, columns = full.any(1, keepdims=True), full.any(0, keepdims=True)
    in_place: dict[str, Any] = {
        "a colour stays": was & ~becomes,
        "a colour goes": was & becomes,
        "a colour does not come": becomes & ~was,
        "changes to colours of the input": changed & ~is_in(after, given.colours),
        "what is filled stays": changed & full,
        "what is empty stays": ~full & (after != given.empty),
        "filled where it was": full != made.full,
        "the edge stays": changed & at_edge,
        "changes are enclosed": changed & ~inside,
        "what is enclosed changes": inside & ~changed,
        "changes in rows of something": changed & ~rows,
        "changes in columns of something": changed & ~columns,
        "changes in line with something": changed & ~rows & ~columns,
    }
    if name == "colours that change":
        return changed & ~is_in(before, shared)
    if name == "colours they change to":
        return changed & ~is_in(after, shared)
    return in_place.get(of_colour)
