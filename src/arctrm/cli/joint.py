"""`arctrm joint`."""

from pathlib import Path
from typing import Annotated

from arctrm.cli.options import Config, DryRun, Resume, Seed, Set, out_option, read_training_config


def joint(
    config: Config = None,
    overrides: Set = None,
    out: Annotated[Path | None, out_option("Run folder; runs/joint-<time> unless given.")] = None,
    resume: Resume = False,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Train reader, adapters and TRM together; Ctrl-C saves, --resume goes on exactly."""
    from arctrm.config import JointConfig

    settings, folder = read_training_config(
        JointConfig, "joint", config, overrides, out, seed, resume
    )
    from arctrm.training import joint as training

    if dry_run:
        from arctrm.console import console

        console().print(training.describe(settings))
        return
    training.run(settings, folder, resume)
