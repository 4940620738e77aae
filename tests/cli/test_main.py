import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arctrm.cli import describe_error, main
from arctrm.cli.data import default_folder
from arctrm.errors import ArctrmError, TaskError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """An empty working folder and no variables of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ARCTRM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return stop.value.code, printed.out, printed.err

    return call


# -- errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["pretrain", "--config", "nope.toml"],
            "error: nope.toml: there is no such file; --config wants a TOML file that exists\n",
        ),
        (
            ["pretrain", "--set", "trm.hiden_size=4"],
            "error: --set: unknown key trm.hiden_size; did you mean trm.hidden_size?\n",
        ),
        (
            ["data", "build", "--num-aug", "-1"],
            "error: --num-aug: data.num_aug = -1, allowed is a number of at least 0; "
            "the default is 1000\n",
        ),
        (
            ["solve", "x.json", "--budget", "soon"],
            "error: --budget: budget = 'soon' is not a duration; write for example '90s', '10m' "
            "or '1.5h'\n",
        ),
        (
            ["pretrain", "--resume"],
            "error: --resume: no run folder was given; name it with --out runs/<name>\n",
        ),
    ],
)
def test_a_user_error_is_one_sentence_on_stderr_and_exit_2(run, arguments, expected):
    assert run(*arguments) == (2, "", expected)


@pytest.mark.parametrize(
    ("arguments", "named", "command"),
    [
        (["nope"], ["'nope'"], "arctrm"),
        (["--nope"], ["--nope"], "arctrm"),
        (["slove"], ["'slove'", "did you mean 'solve'"], "arctrm"),
        (["data", "shw"], ["'shw'", "did you mean 'show'"], "arctrm data"),
        (["eval", "--nope"], ["--nope"], "arctrm eval"),
        (["eval", "more"], ["more"], "arctrm eval"),
        (["eval", "--views"], ["'--views'"], "arctrm eval"),
        (["eval", "--views", "many"], ["'--views'", "'many'", "valid integer"], "arctrm eval"),
        (["data", "show", "x", "--limit", "1.5"], ["'1.5'", "valid integer"], "arctrm data show"),
        (["data", "build", "--out"], ["'--out'"], "arctrm data build"),
        (["solve"], ["missing argument"], "arctrm solve"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_sentence_and_exit_2(run, arguments, named, command):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith(f"; see {command} --help\n")
    assert err.count("\n") == 1
    assert err.lower().count("did you mean") <= 1
    for part in named:
        assert part in err


@pytest.mark.parametrize("group", [[], ["data"]])
def test_a_group_without_a_command_prints_its_help_and_exits_2(run, group):
    code, out, err = run(*group)
    assert (code, err) == (2, "")
    assert "Commands" in out


@pytest.mark.parametrize("place", ["before", "after", "variable"])
def test_a_traceback_appears_only_when_debugging(run, monkeypatch, place):
    command = ["pretrain", "--resume"]
    if place == "variable":
        monkeypatch.setenv("ARCTRM_DEBUG", "1")
    else:
        command = ["--debug", *command] if place == "before" else [*command, "--debug"]
    code, _, err = run(*command)
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: --resume:")


def test_every_kind_of_failure_has_its_line_and_exit_code():
    def full(name=None):
        return OSError(errno.ENOSPC, "No space left on device", name)

    assert describe_error(TaskError("a.json: not\nJSON")) == ("error: a.json: not JSON", 2)
    assert describe_error(ArctrmError("diverged")) == ("error: diverged", 1)
    assert describe_error(KeyboardInterrupt()) == ("interrupted", 130)
    assert describe_error(KeyboardInterrupt("saved in runs/a")) == ("saved in runs/a", 130)
    assert describe_error(full()) == (
        "error: no space left on the disk; free some or give another --out",
        2,
    )
    assert "on the disk for runs/a;" in describe_error(full("runs/a"))[0]
    assert describe_error(PermissionError(errno.EACCES, "Permission denied", "a.json")) == (
        "error: a.json: permission denied; check the path and its permissions",
        2,
    )
    assert describe_error(KeyError("x")) == (
        "internal error: KeyError: 'x'; run again with --debug",
        1,
    )
    assert describe_error(RuntimeError()) == (
        "internal error: RuntimeError; run again with --debug",
        1,
    )


HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
"""A shell starts what runs in the background deaf to interrupts, and its children with it."""


def test_an_interrupt_is_one_line_and_exit_130():
    """A real signal in a real process, sent in the middle of the command."""
    code = (
        f"{HEARD}; import os, sys; from arctrm.cli import main\n"
        "import arctrm.data.build as b\n"
        "b.build = lambda *given: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(['data', 'build'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_while_typer_is_imported_is_one_line_and_exit_130(tmp_path):
    """A real signal, sent by a module that takes Typer's place on the path."""
    (tmp_path / "typer.py").write_text(f"{HEARD}; import os; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "arctrm", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# -- commands


def test_data_build_writes_a_set_and_reports_it(run):
    Path("a.toml").write_text("[data]\nmax_tasks = 15\nnum_aug = 3")
    code, out, _ = run("data", "build", "--config", "a.toml", "--num-aug", 7, "--out", "set")
    assert code == 0
    assert "30 tasks" in out
    assert json.loads(Path("set/meta.json").read_text())["num_aug"] == 7


def test_the_default_folder_of_data_build_is_named_after_its_subsets(run):
    code, _, _ = run(
        "data", "build", "--subsets", "training", "--test-set", "", "--set", "data.max_tasks=2"
    )
    assert code == 0
    assert Path("data/training/meta.json").is_file()
    assert default_folder(("training", "more/tasks.json.gz")) == Path("data/training-tasks")


def test_a_dry_run_of_data_build_counts_and_writes_nothing(run):
    code, out, _ = run("data", "build", "--set", "data.max_tasks=2", "--dry-run", "--out", "set")
    assert code == 0
    assert "4 tasks" in out
    assert list(Path().iterdir()) == []


def test_data_show_prints_the_named_tasks(run):
    code, out, _ = run("data", "show", "training", "00d62c1b")
    assert code == 0
    assert "00d62c1b" in out
    assert "007bbfb7" not in out


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_data_show_escapes_what_an_ascii_terminal_cannot_print(variables):
    done = subprocess.run(
        [sys.executable, "-m", "arctrm", "data", "show", "training", "00d62c1b"],
        capture_output=True,
        env=os.environ | variables,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2192" in done.stdout
    assert done.stdout.isascii()


def test_data_show_writes_plain_text_with_out(run):
    code, out, _ = run("data", "show", "training", "--limit", 2, "--out", "tasks.txt")
    assert (code, out) == (0, "")
    written = Path("tasks.txt").read_text()
    assert "007bbfb7" in written
    assert "\x1b" not in written


def test_data_show_draws_tasks_by_seed(run):
    shown = {
        run("data", "show", "training", "--limit", 3, "--dry-run", "--seed", seed)[1]
        for seed in (1, 1, 2)
    }
    assert len(shown) == 2


def test_data_show_reports_an_unknown_source(run):
    code, out, err = run("data", "show", "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("error: nowhere: no such file or folder")
    assert err.count("\n") == 1


def test_a_dry_run_of_pretrain_counts_and_writes_nothing(run):
    code, out, _ = run("pretrain", "--config", CONFIGS / "debug.toml", "--dry-run")
    assert code == 0
    assert "parameters" in out
    assert list(Path().iterdir()) == []
