"""The options that commands share, and the one way from options to a configuration.

Only the standard library and Typer at import: pydantic is loaded when a command runs.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

Config = Annotated[
    list[Path] | None,
    typer.Option("--config", help="TOML file; repeat it to lay one over another.", metavar="FILE"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set one key of the configuration.", metavar="KEY=VALUE"),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would run, then stop; writes nothing.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Checkpoint folder or file; the bundled weights unless given.",
        metavar="PATH",
    ),
]
Views = Annotated[
    int | None, typer.Option("--views", help="Views of each test input that are voted on.")
]


def out_option(help_text: str) -> Any:
    """The option `--out`, whose meaning differs by command."""
    return typer.Option("--out", help=help_text, metavar="PATH")


def read_config(
    model_class: "type[Model]",
    config: Sequence[Path] | None,
    overrides: Sequence[str] | None,
    flags: dict[str, Any],
    record: Path | None = None,
) -> "Model":
    """Defaults (or an earlier run's record), files, environment, `--set`, flags."""
    from arctrm.config.load import load_config

    return load_config(model_class, config or (), overrides or (), flags, record=record)


def run_folder(command: str) -> Path:
    """A fresh folder for a run that was not given one."""
    return Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
