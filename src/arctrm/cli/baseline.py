"""`arctrm baseline`."""

from pathlib import Path
from typing import Annotated

import typer

from arctrm.cli.options import (
    Config,
    DryRun,
    Seed,
    Set,
    Views,
    earlier_record,
    out_option,
    read_config,
    run_folder,
)

RESULTS = "results.json"


def baseline(
    config: Config = None,
    overrides: Set = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Checkpoint folder of a tiny reader.", metavar="PATH"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Hugging Face id or folder of a model, instead of a checkpoint.",
            metavar="NAME",
        ),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option("--subset", help="Bundled set or path of the tasks.", metavar="NAME"),
    ] = None,
    views: Views = None,
    attempts: Annotated[
        int | None, typer.Option("--attempts", help="Grids kept of each test input.")
    ] = None,
    out: Annotated[
        Path | None,
        out_option(f"File (*.json) or folder; runs/baseline-<time>/{RESULTS} unless given."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in --out stopped.")
    ] = False,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Answer tasks with a language model alone: results.json, submission.json, a score table."""
    from arctrm.config import BaselineConfig
    from arctrm.errors import ConfigError

    record = earlier_record(out and results_file(out), resume, config)
    flags = {
        "checkpoint": checkpoint,
        "hub.name": model,
        "evaluation.test_set": subset,
        "views": views,
        "attempts": attempts,
        "out": out,
        "seed": seed,
    }
    settings = read_config(BaselineConfig, config, overrides, flags, record)
    if resume and settings.out is None:
        raise ConfigError("--resume: no results were given; name them with --out results.json")
    from arctrm.solving.baseline import describe, run

    path = results_file(settings.out or run_folder("baseline"))
    if dry_run:
        from arctrm.console import console

        console().print(describe(settings, path, resume))
        return
    run(settings, path, resume)


def results_file(out: Path) -> Path:
    """The results file that `--out` means: itself if called *.json, else one in that folder."""
    return out if out.suffix == ".json" and not out.is_dir() else out / RESULTS
