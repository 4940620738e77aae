"""The one rich console: progress and prose go to stderr, results to stdout.

Text is printed as it stands: brackets are no markup, colons no emoji, and control characters are
shown as escapes. Style comes from `rich.text.Text` alone, whose text from outside goes through
`printable`.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

_SHADES = "000000 0074d9 ff4136 2ecc40 ffdc00 aaaaaa f012be ff851b 7fdbff 870c25"
ARC_PALETTE = tuple(f"#{shade}" for shade in _SHADES.split())
"""Colours 0..9 as the ARC Prize site shows them."""


class _Console(Console):
    def render_str(self, text: str, **how: Any) -> Text:
        """Every string that is printed, in a table or alone, comes here."""
        return super().render_str(printable(text), **(how | {"markup": False, "emoji": False}))


@cache
def console() -> Console:
    """Console for results (stdout)."""
    return _Console(highlight=False)


@cache
def progress_console() -> Console:
    """Console for progress, notes and errors (stderr)."""
    return _Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """Print one line of prose to stderr."""
    progress_console().print(message.replace("\n", "\\n"))


def dry_run_table(command: str, rows: Mapping[str, object]) -> Table:
    """What a command would do, for `--dry-run`."""
    table = Table(title=f"{command} (dry run)", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


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
