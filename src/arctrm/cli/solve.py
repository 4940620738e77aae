"""`arctrm solve`."""

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
)


def solve(
    target: Annotated[
        str,
        typer.Argument(
            help="A task file, a folder, a Kaggle challenges file, arc1:<id> or arc2:<id>."
        ),
    ],
    config: Config = None,
    overrides: Set = None,
    checkpoint: Checkpoint = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Time per task: 60s, 5m.", metavar="DURATION"),
    ] = None,
    views: Views = None,
    attempts: Annotated[
        int | None,
        typer.Option("--attempts", help="Rounds of reader and TRM, where adapters join the two."),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Show the planner's attempts: text, score, feedback."),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Say at the end whether the answers are right, if known."),
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="In a folder, report a bad task and go on."),
    ] = False,
    out: Annotated[Path | None, out_option("Folder to write submission.json to.")] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Adapt to a task on its own demonstrations and answer it with two grids, within a budget."""
    from arctrm.config import SolveConfig

    flags = {
        "checkpoint": checkpoint,
        "budget": budget,
        "inference.views": views,
        "attempts": attempts,
        "keep_going": keep_going or None,
        "out": out,
        "seed": seed,
    }
    settings = read_config(SolveConfig, config, overrides, flags)
    from arctrm.solving.solve import describe, run

    if dry_run:
        from arctrm.console import console

        console().print(describe(settings, target))
        return
    run(settings, target, settings.out, check, trace)
