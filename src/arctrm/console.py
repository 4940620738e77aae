"""The one rich console: progress and prose go to stderr, results to stdout."""

from functools import cache

from rich.console import Console

ARC_PALETTE = (
    "#000000",
    "#0074d9",
    "#ff4136",
    "#2ecc40",
    "#ffdc00",
    "#aaaaaa",
    "#f012be",
    "#ff851b",
    "#7fdbff",
    "#870c25",
)
"""Colours 0..9 as the ARC Prize site shows them."""


@cache
def console() -> Console:
    """Console for results (stdout)."""
    return Console(highlight=False)


@cache
def progress_console() -> Console:
    """Console for progress, notes and errors (stderr)."""
    return Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """Print one line of prose to stderr, markup allowed."""
    progress_console().print(message)
