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
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")]
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


def earlier_record(path: Path | None, resume: bool, config: Sequence[Path] | None) -> Path | None:
    """The record of the run that is resumed, where no file says otherwise and there is one."""
    if path is None or not resume or config or not path.is_file():
        return None  # where there is nothing to resume, the run will say so
    return path


def run_folder(command: str) -> Path:
    """A fresh folder for a run that was not given one."""
    return Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"


def read_training_config(
    model_class: "type[Model]",
    command: str,
    config: Sequence[Path] | None,
    overrides: Sequence[str] | None,
    out: Path | None,
    seed: int | None,
    resume: bool,
) -> "tuple[Model, Path]":
    """Configuration and run folder of a training command.

    With `resume` and no file, the configuration is the one that the run folder holds.
    """
    from arctrm.errors import ConfigError

    record = earlier_record(out and out / "config.json", resume, config)
    settings = read_config(model_class, config, overrides, {"out": out, "seed": seed}, record)
    folder: Path | None = getattr(settings, "out", None)
    if resume and folder is None:
        raise ConfigError("--resume: no run folder was given; name it with --out runs/<name>")
    return settings, folder or run_folder(command)
