"""The Typer app: which commands exist and what `arctrm --help` says."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from arctrm.cli.data import build, show
from arctrm.cli.evaluate import evaluate
from arctrm.cli.pretrain import pretrain
from arctrm.cli.solve import solve
from arctrm.errors import ArctrmError

DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "ARCTRM_DEBUG"


class Interrupted(ArctrmError):
    """Ctrl-C; the message is one that the interrupted command gave, or empty."""

    exit_code = 130


class _Group(TyperGroup):
    """Lists `data` first, helps at once, keeps the message of an interrupt (Typer drops it)."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "data")

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            # Typer coerces an absent --help (None) through pydantic, whose import takes 0.15 s of
            # every `arctrm COMMAND --help`; a plain False is passed through.
            option.default = False
        return option

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error)) from error


def _new_typer(**options: Any) -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        **options,
    )


app = _new_typer(cls=_Group, epilog="Example: [bold]arctrm solve arc1:00d62c1b --check[/]")
data_app = _new_typer(
    cls=_Group,
    help="Build and look at training data.",
    epilog="Example: [bold]arctrm data show training --limit 3[/]",
)


@app.callback()
def root(
    debug: Annotated[
        bool,
        typer.Option(
            DEBUG_FLAG,
            help=f"Show the traceback of an error; may follow the command ({DEBUG_VARIABLE}=1).",
        ),
    ] = False,
) -> None:
    """Solve ARC-AGI tasks with a Tiny Recursive Model (TRM): build data, pretrain, evaluate, solve.

    Exit codes: 0 done, 1 failure, 2 something to change on your side, 130 interrupted.
    """


def _example(text: str) -> str:
    return "Example: " + "\n\n".join(f"[bold]{line}[/]" for line in text.splitlines())


app.add_typer(data_app, name="data")
data_app.command(
    "build",
    epilog=_example(
        "arctrm data build --subsets training --subsets evaluation "
        "--test-set evaluation --out data/arc1"
    ),
)(build)
data_app.command(
    "show",
    epilog=_example("arctrm data show training 00d62c1b\narctrm data show my_tasks/ --statistics"),
)(show)
app.command(
    "pretrain",
    epilog=_example(
        "arctrm pretrain --config configs/pretrain.toml --out runs/first "
        "--set training.schedule.budget=20m\n"
        "arctrm pretrain --config configs/pretrain.toml --out runs/first --resume"
    ),
)(pretrain)
app.command(
    "eval",
    epilog=_example("arctrm eval --config configs/eval.toml --checkpoint runs/first --out scores"),
)(evaluate)
app.command(
    "solve",
    epilog=_example("arctrm solve my_task.json --budget 60s\narctrm solve arc1:00d62c1b --check"),
)(solve)
