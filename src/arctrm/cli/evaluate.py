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
    bundled: Annotated[
        bool, typer.Option("--bundled", help="Use the weights that come with the package.")
    ] = False,
    submission: Annotated[
        Path | None,
        typer.Option(
            "--submission",
            help="Score this submission.json (or the one in this folder); no weights are loaded.",
            metavar="PATH",
        ),
    ] = None,
    views: Views = None,
    blank_task_embedding: Annotated[
        bool,
        typer.Option("--blank-task-embedding", help="Ablation: hide from TRM which task it is."),
    ] = False,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            "--ablate",
            help="Score again with one thing left out: no-reader, no-trm, no-coupling, "
            "swap-context, no-draft, no-adaptation. Repeat it, or list them with commas.",
            metavar="NAME",
        ),
    ] = None,
    out: Annotated[
        Path | None, out_option("Folder of the scores; runs/eval-<time> unless given.")
    ] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Answer a test set with one checkpoint and score it: scores.json, submission.json, a table."""
    from arctrm.config import EvalConfig
    from arctrm.errors import ConfigError

    if bundled and checkpoint is not None:
        raise ConfigError(
            f"--bundled contradicts --checkpoint {checkpoint}: one set of weights answers; leave "
            "one of the two out"
        )
    if bundled and submission is not None:
        raise ConfigError(
            f"--bundled contradicts --submission {submission}, which is scored without weights; "
            "leave one of the two out"
        )
    flags = {
        "checkpoint": "" if bundled else checkpoint,  # empty: none, also where a file names one
        "submission": submission,
        "inference.views": views,
        "inference.blank_task_embedding": blank_task_embedding or None,
        "evaluation.ablate": _listed(ablate),
        "out": out,
        "seed": seed,
    }
    settings = read_config(EvalConfig, config, overrides, flags)
    from arctrm.solving import evaluate as answering
    from arctrm.solving import late_scoring

    what = answering if settings.submission is None else late_scoring
    if dry_run:
        from arctrm.console import console

        console().print(what.describe(settings))
        return
    what.run(settings, settings.out or run_folder("eval"))


def _listed(ablate: list[str] | None) -> list[str] | None:
    """The names of a repeated option, each of which may hold several, every one once."""
    if not ablate:
        return None
    return list(dict.fromkeys(name.strip() for text in ablate for name in text.split(",")))
