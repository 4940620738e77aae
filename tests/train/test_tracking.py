"""Metrics are kept whatever happens; W&B never ends a run; the progress line tells the truth."""

import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from arctrm.config import JointConfig, PretrainConfig, TrackingConfig
from arctrm.train import tracking
from arctrm.train.tracking import Tracker, wandb_mode

QUIET = TrackingConfig()
STAND = {"progress": 0.5, "elapsed": 2.0}


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """No W&B login and no W&B settings in the environment."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log_steps(run, steps, **options):
    with Tracker(run, QUIET, {}, **options) as tracker:
        for step in steps:
            tracker.log(step, {"loss": step / 10, **STAND})


def test_the_projects_have_their_agreed_names():
    assert PretrainConfig().tracking.project == "arc-trm-pretrain"
    assert JointConfig().tracking.project == "arc-hybrid-joint"


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Tracker(tmp_path / "run", QUIET, {}) as tracker:
        tracker.log(1, {"loss": 0.5, **STAND})
        assert records(tmp_path / "run") == [{"step": 1, "loss": 0.5, **STAND}]


def test_resume_drops_later_lines_and_a_line_cut_off_by_a_kill(tmp_path):
    log_steps(tmp_path, [10, 20, 30])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    log_steps(tmp_path, [30, 40], resume_step=20)
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30, 40]
    log_steps(tmp_path, [1])  # a new run starts a new log
    assert len(records(tmp_path)) == 1


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    with Tracker(tmp_path, QUIET, {}) as tracker:
        tracker.log(1, {"loss": float("nan"), "exact_match": float("inf"), **STAND})
    assert records(tmp_path) == [{"step": 1, "loss": None, "exact_match": None, **STAND}]


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    log_steps(tmp_path / "run", [1], is_main=False)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_wandb_is_not_imported_unless_asked_for(tmp_path):
    code = (
        "import sys; from pathlib import Path; from arctrm.config import TrackingConfig\n"
        "from arctrm.train.tracking import Tracker\n"
        f"with Tracker(Path({str(tmp_path)!r}), TrackingConfig(), {{}}) as t:\n"
        "    t.log(1, {'progress': 0.5, 'elapsed': 1.0})\n"
        "print('wandb' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("no_login")
def test_wandb_is_online_only_with_a_login_and_no_wandb_mode(tmp_path, monkeypatch):
    assert wandb_mode() == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


@pytest.mark.slow
@pytest.mark.usefixtures("no_login")
def test_without_a_login_wandb_writes_an_offline_run_and_resume_continues_it(tmp_path, capsys):
    config, run = TrackingConfig(wandb=True), tmp_path / "run"
    for resume_step in (None, 0):
        with Tracker(run, config, {"seed": 0}, resume_step=resume_step) as tracker:
            tracker.log(1, {"loss": 0.5, **STAND})
    names = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert {name.rsplit("-", 1)[1] for name in names} == {(run / "wandb_id").read_text().strip()}
    assert capsys.readouterr().err.count("W&B runs offline") == 2
    assert len(records(run)) == 1


@pytest.mark.usefixtures("no_login")
def test_a_wandb_that_cannot_start_is_a_note_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with Tracker(tmp_path, TrackingConfig(wandb=True), {}) as tracker:
        tracker.log(1, {"loss": 0.5, **STAND})
    assert "W&B could not start" in capsys.readouterr().err
    assert len(records(tmp_path)) == 1


def test_without_a_terminal_a_plain_line_comes_now_and_then_and_at_the_end(tmp_path, capsys):
    with Tracker(tmp_path, QUIET, {}) as tracker:
        for step in (10, 20, 30, 40):
            metrics = {"loss": 1 / step, "exact_match": 0.5, "examples_per_second": 1234.5}
            tracker.log(step, {**metrics, "progress": step / 100, "elapsed": 100.0 + step})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 10  10%  loss 0.1000  exact 50.0%  1,234 examples/s  ? left",
        "step 40  40%  loss 0.0250  exact 50.0%  1,234 examples/s  1:00 left",
    ]


def test_on_a_terminal_the_line_is_live(tmp_path, monkeypatch, capsys):
    terminal = Console(force_terminal=True, width=120, stderr=True)
    monkeypatch.setattr(tracking, "progress_console", lambda: terminal)
    log_steps(tmp_path, [3])
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", capsys.readouterr().err)
    assert re.search(r"50%.*step 3 .*loss 0\.3000", shown)
