"""`arctrm joint`: loss falls, a stopped run goes on exactly, every path can be switched off."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from joint_parts import FORMS, SMALL, new_config, small_tasks
from runs import ONE_THREAD, end_of, numbers_of, plain, refused, wait_for_checkpoint

from arctrm.config import JointConfig
from arctrm.config.load import load_config
from arctrm.errors import CheckpointError
from arctrm.training import joint
from arctrm.training.checkpoints import latest_checkpoint, read_meta, read_model, read_rank

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Path(__file__).parents[2] / "configs" / "joint.toml"
QUICK = {
    "batch_size": 4,
    "trm.hidden_size": 16,
    "reader.hidden_size": 16,
    "reader.num_layers": 1,
    "coupling.drafted_pairs": 4,
    "coupling.draft_every": 3,
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, write_tasks):
    """Build a configuration on a folder of small tasks."""
    tasks = [replace(t, test=t.demonstrations[:1]) for t in small_tasks(num_tasks=3)]
    folder = write_tasks(tmp_path_factory.mktemp("data") / "tasks", tasks)

    def build(changes=None, form="pair"):
        data = {"data.subsets": [str(folder)]}
        return new_config(QUICK | data | FORMS[form] | (changes or {}))

    return build


def last_line(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("pair", {}),
        ("task", {}),
        ("pair", {"training.grad_accum": 2, "llama_frozen": True}),
        ("pair", {"training.ema_decay": 0.0, "coupling.context": False, "max_attempts": 3}),
    ],
    ids=["pair", "task", "grad_accum frozen", "no_ema draft only"],
)
def test_an_interrupted_run_ends_with_the_same_bytes(run_of, tmp_path, form, changes):
    steps = {"training.schedule.max_steps": 6, "training.checkpoint_every_steps": 2}
    config = run_of({**changes, **steps, "training.keep_last": 5}, form)
    joint.run(config, tmp_path / "whole", False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{later:08d}")
    torch.manual_seed(99)
    joint.run(config, tmp_path / "cut", True)
    assert end_of(tmp_path / "cut", 6) == end_of(tmp_path / "whole", 6)
    assert numbers_of(tmp_path / "cut") == numbers_of(tmp_path / "whole")
    whole, cut = (read_rank(latest_checkpoint(tmp_path / run), 0) for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert "carry.0.drafts.cells" in whole
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_needs_no_configuration(run_of, tmp_path):
    """The run folder holds the configuration, as the files and flags made it."""
    sets = {**SMALL, **QUICK, "data_path": str(run_of().data.subsets[0]), "data.test_set": ""}
    del sets["data.subsets"]
    sets |= {"training.schedule.max_steps": 12, "training.checkpoint_every_steps": 2}
    for old in ("trm.hidden_size", "trm.halt_max_steps"):
        sets["trm_" + old.partition(".")[2]] = sets.pop(old, 3)
    del sets["coupling.no_draft_share"]
    words = [w for key, value in sets.items() for w in ("--set", f"{key}={value}")]
    words = [w.replace("=True", "=true").replace("=False", "=false") for w in words]
    start = [sys.executable, "-m", "arctrm", "joint", "--config", str(CONFIG), *words]
    for name in ("whole", "cut"):
        out = tmp_path / name
        process = subprocess.Popen(
            [*start, "--out", str(out)], env=ONE_THREAD, stderr=subprocess.PIPE, text=True
        )
        if name == "cut":
            wait_for_checkpoint(out, process)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (130 if name == "cut" else 0), errors
    assert read_meta(latest_checkpoint(out)).step < 12
    again = [sys.executable, "-m", "arctrm", "joint", "--resume", "--out", str(out)]
    done = subprocess.run(again, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert end_of(out, 12) == end_of(tmp_path / "whole", 12)
    assert numbers_of(out) == numbers_of(tmp_path / "whole")


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_falls(run_of, tmp_path, form):
    changes = {
        "training.schedule.max_steps": 24,
        "lr": 1e-2,
        "coupling.draft_every": 100,
        "data.num_aug": 1,
        "max_attempts": 1,
        "training.schedule.constant_fraction": 1.0,
    }
    joint.run(run_of(changes, form), tmp_path, False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert lines[-1]["reader_loss"] < 0.9 * lines[0]["reader_loss"]


def test_the_logged_metrics_are_these(run_of, tmp_path):
    joint.run(run_of({"training.schedule.max_steps": 2}), tmp_path, False)
    line = last_line(tmp_path)
    seven = "loss exact_match shape_match cell_accuracy avg_attempts avg_trm_steps"
    assert set([*seven.split(), "avg_reasoning_length"]) <= set(line)
    more = "reader_loss contrast context_variance context_swap_difference drafts_right"
    parts = {f"gradient/{part}" for part in ("reader", "trm", "context", "draft", "back")}
    assert {*more.split(), "drafted_share", *parts} <= set(line)
    assert line["avg_attempts"] == 2
    assert line["avg_trm_steps"] == 4
    assert line["avg_reasoning_length"] > 1
    assert all(line[part] > 0 for part in parts - {"gradient/draft"})


@pytest.mark.parametrize(
    "off", [("context",), ("draft",), ("back",), ("context", "draft"), ("context", "draft", "back")]
)
def test_each_path_can_be_switched_off(run_of, tmp_path, off):
    changes = {f"coupling.{path}": False for path in off} | {"training.schedule.max_steps": 2}
    joint.run(run_of(changes), tmp_path, False)
    held = {name.split(".")[1] for name in read_model(latest_checkpoint(tmp_path), ema=False)
            if name.startswith("adapters.")}  # fmt: skip
    assert held == {"context", "draft", "back"} - set(off)
    assert last_line(tmp_path)["loss"] > 0


def test_the_checkpoint_holds_every_part_and_the_configuration(run_of, tmp_path):
    joint.run(run_of({"training.schedule.max_steps": 2}), tmp_path, False)
    path = latest_checkpoint(tmp_path)
    meta = read_meta(path)
    for weights in (read_model(path, ema=ema) for ema in (True, False)):
        assert {name.split(".")[0] for name in weights} == {"reader", "trm", "adapters"}
    config = JointConfig.model_validate(meta.config)
    assert config.coupling.num_context_slots == 3
    assert len(meta.task_ids) == len(meta.notes["task_fingerprints"]) == 3


def test_a_run_may_go_on_with_gradient_checkpointing_and_ends_with_the_same_bytes(run_of, tmp_path):
    steps = {"training.checkpoint_every_steps": 2, "training.schedule.max_steps": 4}
    joint.run(run_of(steps), tmp_path / "whole", False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    joint.run(run_of({**steps, "reader.gradient_checkpointing": True}), tmp_path / "cut", True)
    assert end_of(tmp_path / "cut", 4) == end_of(tmp_path / "whole", 4)


def test_another_coupling_is_refused_on_resume(run_of, tmp_path):
    joint.run(run_of({"training.schedule.max_steps": 1}), tmp_path, False)
    changes = {"training.schedule.max_steps": 1, "coupling.trm_weight": 2.0}
    text = refused(CheckpointError, lambda: joint.run(run_of(changes), tmp_path, True))
    assert "coupling.trm_weight = 1.0 there, 2.0 now" in text


def test_the_dry_run_names_the_parameters_of_every_part(tmp_path):
    text = plain(joint.describe(load_config(JointConfig, [CONFIG], environ={})))
    for word in ("reader", "TRM", "adapters: context", "adapters: draft", "adapters: back"):
        assert word in text
    assert "evaluation (400 tasks)" in text
