"""`arctrm data build` and `arctrm data show`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from arctrm.cli.options import Config, DryRun, Seed, Set, out_option, read_config

Subsets = Annotated[
    list[str] | None,
    typer.Option(
        "--subsets",
        help="Tasks to train on: training, evaluation (ARC-AGI-1), training2, evaluation2 "
        "(ARC-AGI-2), a file or a folder; repeat it for several.",
        metavar="SOURCE",
    ),
]
TestSet = Annotated[
    str | None,
    typer.Option(
        "--test-set",
        help="The subset that is evaluated: only its demonstrations are trained on; '' for none.",
        metavar="SOURCE",
    ),
]
NumAug = Annotated[
    int | None,
    typer.Option("--num-aug", help="Distinct views of each task that training may draw; 0: all."),
]


def build(
    config: Config = None,
    overrides: Set = None,
    subsets: Subsets = None,
    test_set: TestSet = None,
    num_aug: NumAug = None,
    out: Annotated[Path | None, out_option("Folder to write; data/<subsets> unless given.")] = None,
    seed: Seed = None,
    dry_run: DryRun = False,
) -> None:
    """Collect tasks into one small, memory-mapped training set; refuses leaks of the test set."""
    from arctrm.config import BuildConfig
    from arctrm.console import console
    from arctrm.data import build as data_build

    flags = {
        "data.subsets": subsets or None,
        "data.test_set": test_set,
        "data.num_aug": num_aug,
        "out": out,
        "seed": seed,
    }
    settings = read_config(BuildConfig, config, overrides, flags)
    folder = settings.out or settings.data.path or default_folder(settings.data.subsets)
    _, report = data_build.build(settings.data, None if dry_run else folder)
    console().print(report)


def default_folder(subsets: tuple[str, ...]) -> Path:
    """data/training-evaluation for the bundled sets of those names; a file counts as its stem."""
    from arctrm.data.sources import subset_label

    labels = [subset_label(subset).replace(":", "-") for subset in subsets]
    return Path("data") / "-".join(labels)


def show(
    source: Annotated[
        str,
        typer.Argument(
            help="training, evaluation, training2, evaluation2, arc1:<id>, arc2:<id>, "
            "a task file, a folder, a Kaggle challenges file or a .json.gz map."
        ),
    ],
    task_ids: Annotated[
        list[str] | None, typer.Argument(help="Only these tasks.", metavar="TASK_ID")
    ] = None,
    config: Config = None,
    overrides: Set = None,
    statistics: Annotated[
        bool,
        typer.Option(
            "--statistics", help="Print sizes, canvas histogram and overlaps instead of tasks."
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Tasks to show at most; 5 unless given.")
    ] = None,
    out: Annotated[Path | None, out_option("Text file to write instead of the terminal.")] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Draw the tasks at random, instead of the first by id."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Show tasks in the terminal, in the ARC colours."""
    from arctrm.config import ShowConfig
    from arctrm.console import console

    flags = {"statistics": statistics or None, "limit": limit, "out": out, "seed": seed}
    settings = read_config(ShowConfig, config, overrides, flags)
    ids = tuple(task_ids or ())
    if not ids and (dry_run or settings.seed is not None):
        ids = choose_ids(source, settings.limit, settings.seed)
    if dry_run:
        console().print(f"{source}: would show {', '.join(ids)}")
        return
    from arctrm.data import show as data_show

    def run() -> None:
        data_show.show(source, task_ids=ids, statistics=settings.statistics, limit=settings.limit)

    run() if settings.out is None else write_printed(run, settings.out)


def choose_ids(source: str, limit: int, seed: int | None) -> tuple[str, ...]:
    """The ids of the tasks to show: the first ones, or drawn with `seed`."""
    from random import Random

    from arctrm.data.sources import load_tasks

    ids = [task.id for task in load_tasks(source)]
    if seed is not None:
        ids = sorted(Random(seed).sample(ids, min(limit, len(ids))))
    return tuple(ids[:limit])


def write_printed(run: Callable[[], None], path: Path) -> None:
    """Run `run` and write what it prints on the console to `path`, without colours."""
    from rich.text import Text

    from arctrm.console import console
    from arctrm.training.files import write_text_atomically

    with console().capture() as captured:
        run()
    text = Text.from_ansi(captured.get()).plain + "\n"
    if path.exists() and not path.is_file():  # renaming onto a device or pipe would destroy it
        path.write_text(text, encoding="utf-8")
    else:
        write_text_atomically(path.resolve(), text)  # a link stays a link
