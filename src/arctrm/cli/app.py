"""The Typer app: which commands exist, what `arctrm --help` says, and its usage errors in one line.

Typer's own way out (a box of several lines, `sys.exit`) is switched off: `run_app` raises.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from arctrm.cli.baseline import baseline
from arctrm.cli.data import build, show
from arctrm.cli.evaluate import evaluate
from arctrm.cli.exits import DEBUG_FLAG, DEBUG_VARIABLE, CommandLineError, Interrupted
from arctrm.cli.joint import joint
from arctrm.cli.pretrain import pretrain
from arctrm.cli.solve import solve

# Typer has its own copy of click since 0.26 and imports the installed one before: the class is
# found through the name that both export.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


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
        except _UsageError as error:
            if _help_was_printed(error):
                raise
            # Typer leaves out where it was when the value of an option is missing.
            command = f"{ctx.command_path} {ctx.invoked_subcommand}"
            raise CommandLineError(_usage_sentence(error, command)) from error


def run_app(words: Sequence[str]) -> int:
    """Run the command line `words` and give its exit code.

    Raises:
        CommandLineError: `words` are not a command line of arctrm.
        Interrupted: Ctrl-C.
    """
    try:
        code = app(list(words), prog_name="arctrm", standalone_mode=False) or 0
    except _UsageError as error:
        if _help_was_printed(error):
            return CommandLineError.exit_code
        raise CommandLineError(_usage_sentence(error, "arctrm")) from error
    if code == Interrupted.exit_code:
        raise Interrupted
    return int(code)


def _help_was_printed(error: Exception) -> bool:
    """Whether the error only says that a group was called without a command."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _usage_sentence(error: Any, command: str) -> str:
    """The sentence for a usage error in `command`, unless the error knows the command better."""
    text = " ".join(error.format_message().split())
    if hasattr(error.__cause__, "errors"):
        # pydantic checked the value, and its message lacks it: add what was got.
        problem = error.__cause__.errors()[0]
        allowed = problem["msg"].partition(",")[0]
        got = f"got {problem['input']!r}, {allowed[:1].lower()}{allowed[1:]}"
        text = text.replace(problem["msg"], got)
    # Typer and a recent click may both suggest a command: one suggestion is enough.
    text = text.partition("? Did you mean")[0].replace(". Did you mean", ", did you mean")
    text = text.rstrip(".?")
    if error.ctx is not None:
        command = error.ctx.command_path
    return f"{text[:1].lower()}{text[1:]}; see {command} --help"


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
    "joint",
    epilog=_example(
        "arctrm joint --config configs/joint.toml --out runs/joint\n"
        "arctrm joint --config configs/joint.toml --out runs/joint --resume"
    ),
)(joint)
app.command(
    "eval",
    epilog=_example("arctrm eval --config configs/eval.toml --checkpoint runs/first --out scores"),
)(evaluate)
app.command(
    "baseline",
    epilog=_example(
        "arctrm baseline --checkpoint runs/reader --subset evaluation --out baseline/results.json\n"
        "arctrm baseline --model Qwen/Qwen2.5-0.5B --views 2 --out qwen --resume"
    ),
)(baseline)
app.command(
    "solve",
    epilog=_example("arctrm solve my_task.json --budget 60s\narctrm solve arc1:00d62c1b --check"),
)(solve)
