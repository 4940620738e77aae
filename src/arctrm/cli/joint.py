"""`arctrm joint`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from arctrm.cli.options import Config, DryRun, Resume, Seed, Set, out_option, read_training_config

if TYPE_CHECKING:
    from rich.console import RenderableType

    from arctrm.config import JointConfig


def joint(
    config: Config = None,
    overrides: Set = None,
    out: Annotated[Path | None, out_option("Run folder; runs/joint-<time> unless given.")] = None,
    resume: Resume = False,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Train reader, adapters and TRM together, with a [recipe] each alone before and scored after;
    Ctrl-C saves, --resume goes on exactly.
    """
    from arctrm.config import JointConfig

    settings, folder = read_training_config(
        JointConfig, "joint", config, overrides, out, seed, resume
    )
    if dry_run:
        from arctrm.console import console

        console().print(_described(settings, folder))
        return
    if settings.recipe.is_given:
        from arctrm.recipe.run import run as run_recipe

        run_recipe(settings, folder, resume)
        return
    from arctrm.training.joint import run

    run(settings, folder, resume)


def _described(settings: "JointConfig", folder: Path) -> "RenderableType":
    from arctrm.training.starting import starting_points

    starting_points(settings)  # refused now what the run would refuse
    if settings.recipe.is_given:
        from arctrm.recipe.stages import describe as describe_recipe

        return describe_recipe(settings, folder)
    from arctrm.training.joint import describe

    return describe(settings)
