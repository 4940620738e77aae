"""`arctrm eval`."""

from pathlib import Path
from typing import Annotated

import typer

from arctrm.cli.options import (
    Checkpoint,
    Config,
    DryRun,
    Resume,
    Seed,
    Set,
    Views,
    earlier_record,
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
            "no-ensemble, swap-context, no-draft, no-adaptation. Repeat it, or list them with "
            "commas.",
            metavar="NAME",
        ),
    ] = None,
    out: Annotated[
        Path | None, out_option("Folder of the scores; runs/eval-<time> unless given.")
    ] = None,
    resume: Resume = False,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Answer a test set with one checkpoint and score it: scores.json, submission.json, a table.
    Ctrl-C keeps what is answered, --resume goes on.
    """
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
    if resume and submission is not None:
        raise ConfigError(
            f"--resume contradicts --submission {submission}, which is scored at once; leave one "
            "of the two out"
        )
    record = earlier_record(out and out / "config.json", resume, config)
    settings = read_config(EvalConfig, config, overrides, flags, record)
    if resume and settings.out is None:
        raise ConfigError("--resume: no evaluation was given; name its folder with --out")
    from arctrm.solving import evaluate as answering
    from arctrm.solving import late_scoring

    folder = settings.out or run_folder("eval")
    if dry_run:
        from arctrm.console import console

        if settings.submission is None:
            console().print(answering.describe(settings, folder, resume))
        else:
            console().print(late_scoring.describe(settings))
    elif settings.submission is not None:
        late_scoring.run(settings, folder)
    else:
        answering.run(settings, folder, resume)


def _listed(ablate: list[str] | None) -> list[str] | None:
    """The names of a repeated option, each of which may hold several, every one once."""
    if not ablate:
        return None
    return list(dict.fromkeys(name.strip() for text in ablate for name in text.split(",")))
