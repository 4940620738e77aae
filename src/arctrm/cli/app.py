"""The commands, their flags, and what `arctrm --help` says.

A command is a list of flags and one call. A flag with a key sets that key of the configuration; a
flag without one is an argument of the call. torch and pydantic are imported when a command runs.
Typer's own way out (a box of several lines, `sys.exit`) is switched off: `run_app` raises.
"""

import inspect
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from importlib import import_module
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from arctrm import __version__
from arctrm.cli import DEBUG_FLAG, DEBUG_VARIABLE, stop_at_once, wait_politely
from arctrm.errors import ConfigError, Interrupted, UserError

if TYPE_CHECKING:
    from arctrm.config import DataBuildConfig, DataShowConfig, SolveConfig

# Typer has its own copy of click since 0.26 and imports the installed one before: the class is
# found through the name that both export.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


# --- The app


class _Group(TyperGroup):
    """Helps at once, and keeps the message of an interrupt (Typer drops it)."""

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


def run_app(words: Sequence[str]) -> int:
    """Run the command line `words` and give its exit code; raises UserError, Interrupted."""
    try:
        code = app(list(words), prog_name="arctrm", standalone_mode=False) or 0
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: help
            return UserError.exit_code
        # Typer leaves out where it was when the value of an option is missing.
        command = " ".join(["arctrm", *words[: 1 + (words[:1] == ["data"])]])
        raise UserError(_usage_sentence(error, command)) from error
    if code == Interrupted.exit_code:
        raise Interrupted
    return int(code)


def _usage_sentence(error: Any, command: str) -> str:
    """The sentence for a usage error in `command`, unless the error knows the command better."""
    text = " ".join(error.format_message().split())
    if hasattr(error.__cause__, "errors"):
        # pydantic checked the value, and its message lacks it: add what was got.
        problem = error.__cause__.errors()[0]
        allowed = problem["msg"].partition(",")[0].removeprefix("Input ")
        text = text.replace(problem["msg"], f"{problem['input']!r} {allowed}")
    # Typer and a recent click may both suggest a command: one suggestion is enough.
    text = text.partition("? Did you mean")[0].replace(". Did you", ", did you").rstrip(".?")
    command = error.ctx.command_path if error.ctx else command
    return f"{text[:1].lower()}{text[1:]}; see {command} --help"


def _verbatim(text: str) -> str:
    """Brackets of a help text are no markup; `rich.markup.escape` takes 20 ms to import."""
    return re.sub(r"(?=\[[a-z#/@])", r"\\", text)


def _example(line: str) -> str:
    return f"Example: [bold]{_verbatim(line)}[/]"


_TYPER: dict[str, Any] = {"cls": _Group, "no_args_is_help": True, "add_completion": False}
_TYPER |= {"pretty_exceptions_enable": False, "rich_markup_mode": "rich"}
app = typer.Typer(epilog=_example("arctrm solve arc1:00d62c1b --check"), **_TYPER)
_DATA = "Build and look at training data."
data_app = typer.Typer(help=_DATA, epilog=_example("arctrm data show training --limit 3"), **_TYPER)
app.add_typer(data_app, name="data")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"arctrm {__version__}")
        raise typer.Exit


_DEBUG = f"Show the traceback of an error; may follow the command ({DEBUG_VARIABLE}=1)."
_VERSION = typer.Option("--version", help="Print it.", callback=_show_version, is_eager=True)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option(DEBUG_FLAG, help=_DEBUG)] = False,
    version: Annotated[bool, _VERSION] = False,
) -> None:
    """Solve ARC-AGI tasks with a reader and a Tiny Recursive Model (TRM).

    Exit codes: 0 done, 1 failure, 2 something to change on your side, 130 interrupted.
    """


# --- From flags to a configuration


class Flag(NamedTuple):
    """An option, or an argument where the name has no dashes."""

    name: str
    kind: Any
    help: str
    key: str | None = None
    """The key of the configuration that it sets; None: it is given to the command's function."""
    metavar: str | None = None

    @property
    def parameter(self) -> inspect.Parameter:
        """As Typer reads it from a function's signature."""
        metavar = self.metavar or METAVARS.get(self.kind)
        if self.name.startswith("-"):
            info: Any = typer.Option(self.name, help=_verbatim(self.help), metavar=metavar)
        else:
            info = typer.Argument(help=_verbatim(self.help), metavar=self.metavar)
        default = {bool: False, str: inspect.Parameter.empty}.get(self.kind)
        name, kind = self.name.strip("-").replace("-", "_"), inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=default, annotation=Annotated[self.kind, info])


TEXT, NUMBER, PATH, LIST = str | None, int | None, Path | None, list[str] | None
METAVARS = {TEXT: "NAME", PATH: "PATH", LIST: "NAME"}
_FILE = "TOML file, or name of a shipped one; repeatable."
_PATHS = "task file, folder, Kaggle challenges file, .json.gz map, arc1:<id> or arc2:<id>"
CONFIG = Flag("--config", list[Path] | None, _FILE, None, "FILE")
SET = Flag(
    "--set", LIST, "Set one key: a.b=1 is b = 1 under [a] of a file; repeatable.", None, "KEY=VALUE"
)
OUT = Flag("--out", PATH, "Where to write; runs/<command>-<time> for a run.", "out")
SEED = Flag("--seed", NUMBER, "Seed of everything random.", "seed")
DRY_RUN = Flag("--dry-run", bool, "Print what would run, then stop; writes nothing.")
REPORT = Flag("--report", PATH, "HTML file to write: a page to look at.", None, "FILE")
RESUME = Flag("--resume", bool, "Go on where the run in --out stopped.")
_WEIGHTS = "Folder, file or org/name on the hub; the bundled weights unless given."
WEIGHTS = Flag("--checkpoint", PATH, _WEIGHTS, "checkpoint")
TEST_SET = Flag("--test-set", TEXT, "Bundled set or path of the tasks.", "evaluation.test_set")
MAX_TASKS = Flag("--max-tasks", NUMBER, "Only the first tasks by id.", "evaluation.max_tasks")
VIEWS = Flag("--views", NUMBER, "Views of each test input that are voted on.", "inference.views")


def _command(name: str, call: str, flags: Sequence[Flag], says: str, example: str) -> None:
    """Add a command: its configuration is filled from all layers and given to the function `call`
    with the values of the flags that have no key.
    """
    flags = (CONFIG, SET, *flags, OUT, SEED, DRY_RUN)

    def command(**given: Any) -> None:
        from arctrm.config.commands import COMMANDS
        from arctrm.config.load import load_config

        keys = {flag.name: (flag.key, given.pop(flag.parameter.name)) for flag in flags if flag.key}
        # A switch or list that is not given is false or empty.
        keys = {k: (key, None if v is False or v == [] else v) for k, (key, v) in keys.items()}
        files, overrides, out = given.pop("config") or (), given.pop("set") or (), keys["--out"][1]
        # Where the folder holds no record, the run says so.
        found = [out, out / "config.json", out / "results.json"] if out and not files else []
        record = next((path for path in found if given.get("resume") and path.is_file()), None)
        settings: Any = load_config(COMMANDS[name], files, overrides, keys, record)
        if given.get("resume") and settings.out is None:
            raise ConfigError("--resume: no run folder was given; add --out runs/<name>")
        if "resume" in given and settings.out is None and name != "solve":  # which may only print
            folder = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
            settings = settings.model_copy(update={"out": folder})
        if given.get("resume") and (submission := getattr(settings, "submission", None)):
            raise ConfigError(f"--resume contradicts submission = '{submission}'; leave one out")
        if (page := given.get("report")) and page.is_dir():
            raise ConfigError(
                f"--report: {page} is a folder; name a file, {page / 'page.html'} say"
            )
        wait_politely()
        module, _, function = call.rpartition(".")
        work = getattr(import_module(f"arctrm.{module}"), function)
        stop_at_once()
        work(settings, **given)

    parameters = [flag.parameter for flag in flags]
    setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    group, _, word = name.rpartition(" ")
    add = (data_app if group else app).command
    add(word, help=_verbatim(says), epilog=_example(example))(command)


# --- The commands


def build(
    settings: "DataBuildConfig",
    public: list[str] | None,
    dry_run: bool,
    archive: Path | None = None,
) -> None:
    """`arctrm data build`."""
    from arctrm.console import console
    from arctrm.data import base_set
    from arctrm.data.sources import subset_label

    if archive and len(public or ()) != 1:
        raise ConfigError("--archive: is of one public set; name that set before it")
    if public:
        from arctrm.data.public import make

        for name in public:
            console().print(f"{name}: would be made" if dry_run else make(name, archive))
        return
    labels = "-".join(subset_label(name).replace(":", "-") for name in settings.data.subsets)
    folder = settings.out or settings.data.path or Path("data") / labels
    console().print(base_set.build(settings.data, None if dry_run else folder)[1])


def show(
    settings: "DataShowConfig",
    source: str,
    task_ids: list[str] | None,
    dry_run: bool,
    report: Path | None = None,
) -> None:
    """`arctrm data show`."""
    from rich.text import Text

    from arctrm.console import console
    from arctrm.data import render
    from arctrm.data.sources import load_tasks

    ids = list(task_ids or ())
    if report is not None and settings.statistics and not ids:
        raise ConfigError("--report contradicts --statistics, which shows no task; leave one out")
    if not ids and (dry_run or settings.seed is not None):
        ids = [task.id for task in load_tasks(source)]
        if settings.seed is not None:
            ids = sorted(Random(settings.seed).sample(ids, min(settings.limit, len(ids))))
        ids = ids[: settings.limit]
    if dry_run:
        console().print(f"{source}: would show {', '.join(ids)}")
        return
    with nullcontext() if settings.out is None else console().capture() as captured:
        shown = render.show(source, ids, settings.statistics, settings.limit)
    if report is not None:
        from arctrm.report.pages import tasks_page, write_page

        write_page(report, tasks_page(source, shown))
    if settings.out and captured:
        settings.out.write_text(f"{Text.from_ansi(captured.get()).plain}\n", encoding="utf-8")


def solve(settings: "SolveConfig", **given: Any) -> None:
    """`arctrm solve`, whose clock starts with the process: its imports take seconds, too."""
    from psutil import Process

    began = time.monotonic() - (time.time() - Process().create_time())
    from arctrm.solve import many

    many.solve(settings, **given, began=began)


_command(
    "data build",
    "cli.app.build",
    (
        Flag("public", LIST, "Only make concept_arc, re_arc, re_arc_40 or arc_gen.", None, "SET"),
        Flag("--archive", PATH, "Zip file of that set's repository, instead of a download."),
        Flag("--subsets", LIST, "Bundled sets or paths to train on; repeatable.", "data.subsets"),
        Flag("--test-set", TEXT, "Of these, only the demonstrations.", "data.test_set"),
        Flag("--num-aug", NUMBER, "Distinct views of each task; 0: all.", "data.num_aug"),
    ),
    "Collect tasks into one small training set; refuses leaks of the test set.",
    "arctrm data build --subsets training --subsets evaluation --test-set evaluation",
)
_command(
    "data show",
    "cli.app.show",
    (
        Flag("source", str, f"training, evaluation, training2, evaluation2, {_PATHS}."),
        Flag("task_ids", LIST, "Only these tasks.", None, "TASK_ID"),
        Flag("--statistics", bool, "Print sizes and overlaps instead of tasks.", "statistics"),
        Flag("--limit", NUMBER, "Tasks to show at most; 5 unless given.", "limit"),
        REPORT,
    ),
    "Show tasks in the terminal, in the ARC colours: the first by id, or by --seed.",
    "arctrm data show training 00d62c1b",
)
_command(
    "pretrain",
    "train.run.pretrain",
    (RESUME,),
    "Train the reader, TRM or both on the demonstrations of many tasks; Ctrl-C saves.",
    "arctrm pretrain --config pretrain --out runs/first --set training.schedule.budget=20m",
)
_command(
    "joint",
    "train.run.joint",
    (RESUME,),
    "Train a reader and TRM together, and score them where evaluate = true; Ctrl-C saves.",
    "arctrm joint --config arc1_1h --out runs/arc1",
)
_EVAL = (
    Flag("--bundled", bool, "Use the weights that come with the package.", "bundled"),
    Flag("--submission", PATH, "Score this submission.json, without weights.", "submission"),
    Flag("--ablate", LIST, "no-reader, no-trm, no-coupling or other-context.", "evaluation.ablate"),
)
_command(
    "eval",
    "solve.evaluate.evaluate",
    (WEIGHTS, *_EVAL, TEST_SET, MAX_TASKS, VIEWS, RESUME, REPORT),
    "Answer a test set with one checkpoint and score it: scores.json, submission.json, a table.",
    "arctrm eval --checkpoint runs/first --out scores",
)
_BASELINE = (
    Flag("--model", TEXT, "Hugging Face id or folder of a model.", "hub.name"),
    Flag(
        "--server", TEXT, "Address of a server that has the model: http://host:8000/v1.", "server"
    ),
    Flag("--attempts", NUMBER, "Grids kept of each test input.", "attempts"),
    VIEWS._replace(key="views"),
)
_command(
    "baseline",
    "solve.baseline.baseline",
    (WEIGHTS, *_BASELINE, TEST_SET, MAX_TASKS, RESUME),
    "Answer tasks with a language model alone: results.json, submission.json, a score table.",
    "arctrm baseline --model Qwen/Qwen2.5-0.5B --views 2 --out qwen",
)
_command(
    "solve",
    "cli.app.solve",
    (
        Flag("target", str, f"{_PATHS[0].upper()}{_PATHS[1:]}."),
        WEIGHTS,
        Flag("--budget", TEXT, "Time per task: 60s, 5m.", "budget", "DURATION"),
        Flag("--total-budget", TEXT, "Time for all tasks: 11h.", "total_budget", "DURATION"),
        VIEWS,
        Flag("--attempts", NUMBER, "Rounds of reader and TRM of the planner.", "max_attempts"),
        Flag("--verbose", bool, "Show numbers, demonstrations and the planner's attempts, too."),
        Flag("--json", bool, "Print a line of JSON for each task, and all else to stderr."),
        Flag("--check", bool, "Say at the end whether the answers are right, if known."),
        Flag("--keep-going", bool, "Report a bad task and leave it out.", "keep_going"),
        RESUME,
        REPORT,
    ),
    "Adapt to a task on its own demonstrations and answer it with two grids, within a budget.",
    "arctrm solve arc1:00d62c1b --check",
)
