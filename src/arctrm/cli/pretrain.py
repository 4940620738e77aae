"""`arctrm pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from arctrm.cli.options import Config, DryRun, Seed, Set, out_option, read_config, run_folder


def pretrain(
    config: Config = None,
    overrides: Set = None,
    out: Annotated[
        Path | None, out_option("Run folder; runs/pretrain-<time> unless given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in --out stopped.")
    ] = False,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Train a TRM on the demonstrations of many tasks; Ctrl-C saves, --resume goes on exactly."""
    from arctrm.config import PretrainConfig
    from arctrm.errors import ConfigError

    record = out / "config.json" if resume and out and not config else None
    if record is not None and not record.is_file():
        record = None  # nothing to resume from: the run will say so
    flags = {"out": out, "seed": seed}
    settings = read_config(PretrainConfig, config, overrides, flags, record)
    if resume and settings.out is None:
        raise ConfigError("--resume: no run folder was given; name it with --out runs/<name>")
    from arctrm.training import pretrain as training

    if dry_run:
        from arctrm.console import console

        console().print(training.describe(settings))
        return
    training.run(settings, settings.out or run_folder("pretrain"), resume)
