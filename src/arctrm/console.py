"""The one rich console: progress and prose go to stderr, results to stdout."""

from functools import cache
from unicodedata import category

from rich.console import Console
from rich.markup import escape

_SHADES = "000000 0074d9 ff4136 2ecc40 ffdc00 aaaaaa f012be ff851b 7fdbff 870c25"
ARC_PALETTE = tuple(f"#{shade}" for shade in _SHADES.split())
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


def printable(text: object, limit: int | None = None) -> str:
    """`text` for any terminal: control, format and surrogate characters as escapes (\\x1b), line
    ends kept; of more than `limit` characters the beginning and the last third.
    """
    harmful = ("Cc", "Cf", "Cs", "Zl", "Zp")
    keep = lambda c: c == "\n" or category(c) not in harmful
    shown = "".join(c if keep(c) else ascii(c)[1:-1] for c in str(text))
    if limit is not None and len(shown) > limit:
        last = (limit - 1) // 3
        shown = f"{shown[: limit - 1 - last]}…{shown[len(shown) - last :]}"
    return shown


def plain(text: object, limit: int | None = None) -> str:
    """`text` from outside for a rich console: `printable`, and its brackets are no markup."""
    return escape(printable(text, limit))
