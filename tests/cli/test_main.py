import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.table import Table

import arctrm
from arctrm.cli import cpu_quota, describe_error
from arctrm.config import PretrainConfig
from arctrm.console import console, printable
from arctrm.data.base_set import open_base_set
from arctrm.errors import ArctrmError, TaskError

# -- errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["pretrain", "--config", "nope.toml"],
            "error: nope.toml: there is no such file; shipped are arc1_1h, arc2_1h, baseline, "
            "debug, eval, joint, joint_llama, pretrain, pretrain_reader, pretrain_trm, smoke, "
            "solve\n",
        ),
        (
            ["data", "build", "--num-aug", "-1"],
            "error: --num-aug: data.num_aug = -1 should be greater than or equal to 0; "
            "the default is 1000\n",
        ),
        (
            ["pretrain", "--resume"],
            "error: --resume: no run folder was given; add --out runs/<name>\n",
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
    full = [errno.ENOSPC, "No space left on device"]
    for error, line, code in (
        (TaskError("a.json: not\nJSON"), "error: a.json: not JSON", 2),
        (ArctrmError("diverged"), "error: diverged", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (KeyboardInterrupt("saved in runs/a"), "saved in runs/a", 130),
        (OSError(*full), "error: no space left on the disk; free some or give another --out", 1),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.json"),
            "error: a.json: permission denied; check the path and its permissions",
            2,
        ),
        (KeyError("x"), "internal error: KeyError: 'x'; run again with --debug", 1),
        (RuntimeError(), "internal error: RuntimeError; run again with --debug", 1),
    ):
        assert describe_error(error) == (line, code)
    assert "on the disk for runs/a;" in describe_error(OSError(*full, "runs/a"))[0]


HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
"""A shell starts what runs in the background deaf to interrupts, and its children with it."""


def test_an_interrupt_is_one_line_and_exit_130():
    """A real signal in a real process, sent in the middle of the command."""
    code = (
        f"{HEARD}; import os, sys; from arctrm.cli import main\n"
        "import arctrm.data.base_set as b\n"
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
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# -- commands


def test_data_build_writes_a_set_and_reports_it(run):
    Path("a.toml").write_text("[data]\nmax_tasks = 15\nnum_aug = 3")
    code, out, _ = run("data", "build", "--config", "a.toml", "--num-aug", 7, "--out", "set")
    assert code == 0
    assert "30 tasks" in out
    assert open_base_set(Path("set")).meta.num_aug == 7


def test_the_default_folder_of_data_build_is_named_after_its_subsets(run):
    code, _, _ = run(
        "data", "build", "--subsets", "training", "--test-set", "", "--set", "data.max_tasks=2"
    )
    assert code == 0
    assert open_base_set(Path("data/training")).num_tasks == 2


def test_a_dry_run_of_data_build_counts_and_writes_nothing(run):
    code, out, _ = run("data", "build", "--set", "data.max_tasks=2", "--dry-run", "--out", "set")
    assert code == 0
    assert "4 tasks" in out
    assert list(Path().iterdir()) == []


def test_data_show_escapes_what_an_ascii_terminal_cannot_print():
    done = subprocess.run(
        [sys.executable, "-m", "arctrm", "data", "show", "training", "00d62c1b"],
        capture_output=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
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


# -- from flags to the configuration of the one function that a command calls


def taken(monkeypatch, path):
    """What the function at `path` is given instead of running."""
    calls = []
    monkeypatch.setattr(path, lambda *given, **named: calls.append((*given, named)))
    return calls


def test_a_training_command_gives_its_run_a_folder_and_says_how_it_runs(run, monkeypatch):
    for command in ("pretrain", "joint"):
        calls = taken(monkeypatch, f"arctrm.train.run.{command}")
        assert run(command, "--seed", 0, "--set", "seed=3", "--dry-run")[0] == 0
        ((config, named),) = calls
        assert config.seed == 0
        assert str(config.out).startswith(f"runs/{command}-")
        assert named == {"resume": False, "dry_run": True}


def test_a_run_is_resumed_with_the_configuration_that_its_folder_holds(run, monkeypatch):
    calls = taken(monkeypatch, "arctrm.train.run.pretrain")
    config = PretrainConfig(seed=5, trunk={"hidden_size": 64})
    Path("a").mkdir()
    Path("a/config.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    assert run("pretrain", "--out", "a", "--resume")[0] == 0
    config, named = calls[0]
    assert (config.seed, config.trunk.hidden_size, config.out) == (5, 64, Path("a"))
    assert named == {"resume": True, "dry_run": False}


def test_the_flags_of_eval_reach_their_keys(run, monkeypatch):
    calls = taken(monkeypatch, "arctrm.solve.evaluate.evaluate")
    Path("a.toml").write_text('checkpoint = "x"\n[evaluation]\nheld_out = 3')
    arguments = ("--bundled", "--views", 4, "--test-set", "training", "--max-tasks", 2)
    ablations = ("--ablate", "no-trm,no-reader", "--ablate", "no-trm")
    assert run("eval", "--config", "a.toml", *arguments, *ablations, "--out", "o")[0] == 0
    config, _ = calls[0]
    assert (config.bundled, config.checkpoint, config.out) == (True, None, Path("o"))
    assert (config.inference.views, config.evaluation.test_set) == (4, "training")
    assert (config.evaluation.max_tasks, config.evaluation.held_out) == (2, 3)
    assert config.evaluation.ablate == ("no-trm", "no-reader")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bundled", "--checkpoint", "x"], "checkpoint = 'x' contradicts bundled = true"),
        (["--submission", "s.json", "--bundled"], "submission = 's.json' contradicts bundled"),
        (["--submission", "s.json", "--ablate", "no-trm"], "contradicts evaluation.ablate"),
        (["--submission", "s.json", "--resume", "--out", "o"], "--resume contradicts submission"),
        (["--ablate", "no-x"], "'no-coupling' or 'other-context'"),
    ],
)
def test_eval_refuses_flags_that_contradict_each_other(run, arguments, said):
    code, out, err = run("eval", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_the_flags_of_baseline_reach_their_keys(run, monkeypatch):
    calls = taken(monkeypatch, "arctrm.solve.baseline.baseline")
    arguments = ("--model", "a/b", "--views", 3, "--attempts", 4, "--test-set", "training")
    assert run("baseline", *arguments, "--out", "r.json")[0] == 0
    config, _ = calls[0]
    assert (config.hub.name, config.views, config.attempts) == ("a/b", 3, 4)
    assert (config.evaluation.test_set, config.out) == ("training", Path("r.json"))
    Path("r.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    assert run("baseline", "--out", "r.json", "--resume")[0] == 0
    assert calls[1][0] == config
    assert run("baseline", "--model", "a/b", "--checkpoint", "x")[0] == 2


def test_the_flags_of_solve_reach_their_keys(run, monkeypatch):
    calls = taken(monkeypatch, "arctrm.solve.many.solve")
    arguments = ("--budget", "2m", "--views", 3, "--attempts", 4, "--keep-going", "--check")
    assert run("solve", "x.json", *arguments)[0] == 0
    config, named = calls[0]
    assert (config.budget, config.inference.views, config.max_attempts) == (120, 3, 4)
    assert (config.keep_going, config.out) == (True, None)
    assert named.pop("target") == "x.json"
    age = time.time() - psutil.Process().create_time()
    assert time.monotonic() - named.pop("began") == pytest.approx(age, abs=1)
    quiet = dict.fromkeys(("verbose", "json", "resume", "dry_run"), False)
    assert named == {"check": True, "report": None} | quiet
    assert run("solve", "x.json", "--total-budget", "11h", "--out", "x", "--resume")[0] == 0
    config, named = calls[1]
    assert (config.total_budget, config.out, named["resume"]) == (39600, Path("x"), True)
    assert run("solve", "x.json", "--total-budget", "11h")[0] == 2  # nothing would be kept
    assert run("solve", "x.json", "--total-budget", "11h", "--budget", "5m", "--out", "x")[0] == 2


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"arctrm {arctrm.__version__}\n", "")


# -- what reaches the terminal, and how threads wait


def test_text_from_outside_is_neither_markup_nor_control():
    text = "[red]a\x1b[2J\x07\u202eb\ud800\nc"
    assert printable(text) == "[red]a\\x1b[2J\\x07\\u202eb\\ud800\nc"
    table = Table(text, title=text)
    table.add_row(f"[/]:smile: {text}")
    with console().capture() as captured:
        console().print(text, table)
    assert captured.get().startswith(printable(text) + "\n")
    assert captured.get().count("[red]a\\x1b[2J") == 4
    assert "[/]:smile: [red]" in captured.get()
    assert set(captured.get()) <= {"\n", *filter(str.isprintable, captured.get())}
    assert printable("abcdefghi", limit=7) == "abcd…hi"


def test_an_error_about_a_strange_name_is_one_line(run):
    code, _, err = run("data", "show", "no\x1b[2J[red]\nwhere")
    assert code == 2
    assert err.startswith("error: no\\x1b[2J[red] where: no such file")


WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_spin_shortly_unless_the_user_says_otherwise(given, then):
    environ = {key: value for key, value in os.environ.items() if key not in WAITING}
    code = (
        "import json, os, sys\n"
        "import arctrm.train, types\n"
        "def said(*given, **named):\n"
        f"    print(json.dumps({{k: os.environ[k] for k in {WAITING} if k in os.environ}}))\n"
        "arctrm.train.run = types.SimpleNamespace(pretrain=said)\n"
        "sys.modules['arctrm.train.run'] = arctrm.train.run\n"
        "from arctrm.cli import main; main(['pretrain'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ | given
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)
    settings.pop("OMP_NUM_THREADS", None)  # under the quota of this machine
    assert settings == then


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1)]
)
def test_a_quota_is_read_as_cores(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert cpu_quota(tmp_path) == cores
    (tmp_path / "cpu.max").unlink()
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    quota, period = text.replace("max", "-1").split()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text(period)
    assert cpu_quota(tmp_path) == cores


def test_a_page_is_written_for_the_tasks_shown_and_not_over_a_folder(run, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = run("data", "show", "training", "00d62c1b", "--report", page)
    assert code == 0
    assert "00d62c1b" in out
    assert page.read_text(encoding="utf-8").count('<svg class="grid"') == 2 * 5 + 2
    code, _, err = run("data", "show", "training", "--statistics", "--report", page)
    assert code == 2
    assert "--report contradicts --statistics" in err
    code, _, err = run("data", "show", "training", "00d62c1b", "--report", tmp_path)
    assert code == 2
    assert err == f"error: --report: {tmp_path} is a folder; name a file, {page} say\n"
