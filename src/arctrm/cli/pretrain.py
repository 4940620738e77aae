"""`arctrm pretrain`."""

from pathlib import Path
from typing import Annotated

from arctrm.cli.options import Config, DryRun, Resume, Seed, Set, out_option, read_training_config


def pretrain(
    config: Config = None,
    overrides: Set = None,
    out: Annotated[
        Path | None, out_option("Run folder; runs/pretrain-<time> unless given.")
    ] = None,
    resume: Resume = False,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Train a TRM, or a tiny reader, on the demonstrations of many tasks; Ctrl-C saves, --resume
    goes on exactly.
    """
    from arctrm.config import PretrainConfig

    settings, folder = read_training_config(
        PretrainConfig, "pretrain", config, overrides, out, seed, resume
    )
    from arctrm.training import pretrain as training

    if dry_run:
        from arctrm.console import console

        console().print(training.describe(settings))
        return
    training.run(settings, folder, resume)
