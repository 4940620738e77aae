"""`arctrm eval`."""

from pathlib import Path
from typing import Annotated

import typer

from arctrm.cli.options import (
    Checkpoint,
    Config,
    DryRun,
    Seed,
    Set,
    Views,
    out_option,
    read_config,
    run_folder,
)


def evaluate(
    config: Config = None,
    overrides: Set = None,
    checkpoint: Checkpoint = None,
    views: Views = None,
    blank_task_embedding: Annotated[
        bool,
        typer.Option("--blank-task-embedding", help="Ablation: hide from TRM which task it is."),
    ] = False,
    out: Annotated[
        Path | None, out_option("Folder of the scores; runs/eval-<time> unless given.")
    ] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Answer a test set with one checkpoint and score it: scores.json, submission.json, a table."""
    from arctrm.config import EvalConfig

    flags = {
        "checkpoint": checkpoint,
        "inference.views": views,
        "inference.blank_task_embedding": blank_task_embedding or None,
        "out": out,
        "seed": seed,
    }
    settings = read_config(EvalConfig, config, overrides, flags)
    from arctrm.solving.evaluate import describe, run

    if dry_run:
        from arctrm.console import console

        console().print(describe(settings))
        return
    run(settings, settings.out or run_folder("eval"))
