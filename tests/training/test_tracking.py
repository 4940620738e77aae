"""Metrics are kept whatever happens; W&B never ends a run; the progress line tells the truth."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from arctrm.config import ScheduleConfig, TrackingConfig
from arctrm.errors import CheckpointError, ResourceError
from arctrm.training import progress as progress_module
from arctrm.training.schedule import Schedule
from arctrm.training.tracking import METRICS, Tracker, TrainingProgress, wandb_mode

QUIET = TrackingConfig()
WANDB_VARIABLES = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC")


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """No W&B login and no W&B settings in the environment."""
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log_steps(run, steps, **options):
    with Tracker(run, QUIET, {}, **options) as tracker:
        for step in steps:
            tracker.log(step, {"loss": step / 10})


def test_the_seven_metrics_have_their_agreed_names():
    assert len(METRICS) == 7
    assert {"loss", "exact_match", "avg_trm_steps"} < set(METRICS)


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Tracker(tmp_path / "run", QUIET, {}) as tracker:
        tracker.log(1, {"loss": 0.5, "exact_match": 0.25})
        assert records(tmp_path / "run") == [{"step": 1, "loss": 0.5, "exact_match": 0.25}]


def test_resume_drops_later_lines_and_a_line_cut_off_by_a_kill(tmp_path):
    log_steps(tmp_path, [10, 20, 30])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    log_steps(tmp_path, [30, 40], resume=True, resume_step=20)
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30, 40]


def test_a_new_run_starts_a_new_log(tmp_path):
    log_steps(tmp_path, [1, 2])
    log_steps(tmp_path, [1])
    assert len(records(tmp_path)) == 1


def test_resume_refuses_to_rewrite_a_file_that_is_not_a_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("step,loss\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: a line is not a metrics record"):
        log_steps(tmp_path, [], resume=True, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "step,loss\n"


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    with Tracker(tmp_path, QUIET, {}) as tracker:
        tracker.log(1, {"loss": float("nan"), "exact_match": float("inf")})
    assert records(tmp_path) == [{"step": 1, "loss": None, "exact_match": None}]


def test_other_processes_write_nothing(tmp_path):
    log_steps(tmp_path / "run", [1], is_main=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path):
    with Tracker(tmp_path, QUIET, {}) as tracker:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(ResourceError, match="the disk is full"):
            tracker.log(1, {"loss": 1.0})


def test_wandb_is_not_imported_unless_asked_for(tmp_path):
    code = (
        "import sys; from pathlib import Path; from arctrm.config import TrackingConfig\n"
        "from arctrm.training.tracking import Tracker\n"
        f"with Tracker(Path({str(tmp_path)!r}), TrackingConfig(), {{}}) as t: t.log(1, {{}})\n"
        "print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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


@pytest.mark.usefixtures("no_login")
def test_without_a_login_wandb_writes_an_offline_run_and_resume_continues_it(tmp_path, capsys):
    config, run = TrackingConfig(wandb=True), tmp_path / "run"
    for resume in (False, True):
        with Tracker(run, config, {"seed": 0}, resume=resume, resume_step=0) as tracker:
            tracker.log(1, {"loss": 0.5})
    names = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert names
    assert {name.rsplit("-", 1)[1] for name in names} == {(run / "wandb_id").read_text().strip()}
    assert capsys.readouterr().err.count("W&B runs offline") == 2
    assert len(records(run)) == 1


@pytest.mark.usefixtures("no_login")
def test_a_wandb_that_cannot_start_is_a_note_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with Tracker(tmp_path, TrackingConfig(wandb=True), {}) as tracker:
        tracker.log(1, {"loss": 0.5})
    assert "W&B could not start" in capsys.readouterr().err
    assert records(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_without_a_terminal_a_plain_line_comes_every_ten_seconds_and_at_the_end(capsys):
    with TrainingProgress(Schedule(ScheduleConfig(max_steps=100))) as progress:
        for step in range(1, 101):
            progress.update(step, 0.25 * step, {"loss": 1 / step, "exact_match": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "41/100", "81/100", "100/100"]
    assert lines[1] == "step 41/100  loss 0.0244  exact 50.0%  0:15 left"


def test_the_line_shows_throughput_and_the_time_left_of_a_budget(capsys):
    with TrainingProgress(Schedule(ScheduleConfig(budget="2h"))) as progress:
        progress.update(7, 60.0, {"loss": 0.5, "examples_per_second": 1234.5})
    assert capsys.readouterr().err == "step 7  loss 0.5000  1,234 examples/s  1:59:00 left\n"


def test_time_left_after_a_resume_goes_by_the_speed_since_then():
    progress = TrainingProgress(Schedule(ScheduleConfig(max_steps=100)))
    assert progress.seconds_left(50, 1000.0) is None
    assert progress.seconds_left(60, 1010.0) == pytest.approx(40.0)


def test_on_a_terminal_the_line_is_live(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress_module, "progress_console", lambda: terminal)
    with TrainingProgress(Schedule(ScheduleConfig(max_steps=2))) as progress:
        progress.update(1, 1.0, {"loss": 0.5})
    assert re.search(
        r"50%.*step 1/2 +loss 0\.5000", re.sub(r"\x1b\[[0-9;?]*\w", "", screen.getvalue())
    )


def test_other_processes_print_nothing(capsys):
    with TrainingProgress(Schedule(ScheduleConfig(max_steps=2)), is_main=False) as progress:
        progress.update(1, 1.0, {"loss": 0.5})
    assert capsys.readouterr().err == ""
