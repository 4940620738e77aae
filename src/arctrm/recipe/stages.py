"""What a recipe means: the configurations of `pretrain`, `joint` and `eval` that it stands for.

Nothing here trains: a stage of the recipe is the run that the single command would make.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from rich.console import Group
from rich.table import Table

from arctrm.config import DataConfig, EvalConfig, JointConfig, PretrainConfig, TrainingConfig
from arctrm.config.recipe import RecipeConfig, StageDataConfig
from arctrm.errors import ConfigError
from arctrm.hybrid import reader_name
from arctrm.training import joint
from arctrm.training.checkpoints import RECIPE_RESULT
from arctrm.training.joint_data import with_data_path

EVALUATION = "eval"
SEED_OF_NEXT = 10_000
"""Between the seeds of two readers of an ensemble: far from those of two recipes."""


@dataclass(frozen=True)
class RecipeStage:
    """One training run inside the recipe's folder."""

    name: str
    share: float
    """Of the recipe's length."""
    folder: Path
    config: PretrainConfig | JointConfig


@dataclass(frozen=True)
class Plan:
    """The runs in their order, and the evaluation of the last."""

    stages: tuple[RecipeStage, ...]
    evaluation: EvalConfig | None


def plan(config: JointConfig, out: Path) -> Plan:
    """The stages of `config.recipe` in the folder `out`; a stage of share 0 is left out.

    Raises:
        ConfigError: a stage's configuration, or the evaluation, contradicts the rest.
    """
    config = with_data_path(config)
    recipe = config.recipe
    readers = [
        _alone(config, "reader", reader_name(n), recipe.reader / recipe.readers, out, n)
        for n in range(recipe.readers if recipe.reader else 0)
    ]
    stages = [*readers, _alone(config, "trm", "trm", recipe.trm, out)] if recipe.trm else readers
    final = _joined(config, stages, out)
    joined = RecipeStage(RECIPE_RESULT, recipe.joint, out / RECIPE_RESULT, final)
    return Plan((*stages, joined), _evaluation(config, out) if recipe.evaluate else None)


def _alone(
    config: JointConfig,
    kind: Literal["reader", "trm"],
    name: str,
    share: float,
    out: Path,
    index: int = 0,
) -> RecipeStage:
    """The stage that trains a reader, number `index` of an ensemble, or TRM alone."""
    recipe = config.recipe
    data, training = getattr(recipe, f"{kind}_data"), getattr(recipe, f"{kind}_training")
    try:
        alone = PretrainConfig(
            seed=config.seed + index * SEED_OF_NEXT,
            model=kind,
            data=_drawn(config.data, data),
            trm=config.trm,
            reader=config.reader,
            training=_of_share(training, recipe, share),
            tracking=config.tracking.model_copy(update={"run_name": _run_name(config, name, out)}),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
        raise ConfigError(f"recipe.{kind}_training: {reason}") from None
    return RecipeStage(name, share, out / name, alone)


def _joined(config: JointConfig, before: list[RecipeStage], out: Path) -> JointConfig:
    """The configuration of `arctrm joint` that starts from the stages before it."""
    recipe = config.recipe
    folders = {stage.name: stage.folder for stage in before}
    checkpoints: dict[str, object] = {
        f"{name}_checkpoint": folders.pop(name) for name in ("reader", "trm") if name in folders
    }
    if folders:
        checkpoints["ensemble_checkpoints"] = tuple(folders.values())
    run_name = _run_name(config, RECIPE_RESULT, out)
    changes = {
        "out": None,
        "recipe": RecipeConfig(),
        "training": _of_share(config.training, recipe, recipe.joint),
        "tracking": config.tracking.model_copy(update={"run_name": run_name}),
    }
    return config.model_copy(update=changes | checkpoints)


def _evaluation(config: JointConfig, out: Path) -> EvalConfig:
    """The configuration of `arctrm eval` for the joint run."""
    answering = config.recipe.evaluation
    _check_not_trained_on(config, answering.evaluation.test_set, answering.evaluation.held_out)
    return EvalConfig(**dict(answering), seed=config.seed, checkpoint=out / RECIPE_RESULT)


def _check_not_trained_on(config: JointConfig, test_set: str, held_out: int) -> None:
    data = config.data
    if held_out and held_out == data.held_out and test_set in data.subsets:
        return
    if test_set != data.test_set:
        cure = "data.test_set" if data.test_set is None else f"the former to {data.test_set!r}"
        raise ConfigError(
            f"recipe.evaluation.evaluation.test_set = {test_set!r}, but data.test_set = "
            f"{data.test_set!r} is what training keeps the answers of apart; set {cure}, or "
            "recipe.evaluate = false"
        )


def _of_share(training: TrainingConfig, recipe: RecipeConfig, share: float) -> TrainingConfig:
    """`training` for a share of the recipe's length."""
    length: dict[str, float | int | None] = {"budget": None, "max_steps": None}
    if recipe.budget is not None:
        length["budget"] = recipe.budget * share
    elif recipe.max_steps is not None:
        length["max_steps"] = max(round(recipe.max_steps * share), 1)
    schedule = training.schedule.model_copy(update=length)
    return training.model_copy(update={"schedule": schedule})


def _drawn(data: DataConfig, stage: StageDataConfig) -> DataConfig:
    return data.model_copy(update=stage.model_dump(exclude_none=True))


def _run_name(config: JointConfig, name: str, out: Path) -> str:
    return f"{config.tracking.run_name or out.name}-{name}"


def describe(config: JointConfig, out: Path) -> Group:
    """What the recipe would run: its stages, and the data and parameters of all; writes nothing."""
    planned = plan(config, out)
    table = Table(title="recipe (dry run)", title_justify="left")
    for column in ("stage", "share", "length", "folder"):
        table.add_column(column, justify="left" if column in ("stage", "folder") else "right")
    for stage in planned.stages:
        table.add_row(stage.name, f"{stage.share:.0%}", length(stage), str(stage.folder))
    if planned.evaluation is not None:
        table.add_row(EVALUATION, "", "", str(out / EVALUATION))
    return Group(table, joint.describe(_last(planned)))


def length(stage: RecipeStage) -> str:
    """The length of a stage in words."""
    schedule = stage.config.training.schedule
    return f"{schedule.budget:.0f} s" if schedule.budget else f"{schedule.max_steps:,} steps"


def _last(planned: Plan) -> JointConfig:
    config = planned.stages[-1].config
    assert isinstance(config, JointConfig)
    return config
