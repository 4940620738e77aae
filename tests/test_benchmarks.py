"""The scripts in `benchmarks/`: what cannot be used of what the user gave is one line."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from arctrm.data.sources import load_tasks

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("trm_inference", ["--checkpoint", "NOWHERE"]),
        ("grid_decoding", ["--checkpoint", "NOWHERE"]),
        ("held_out_loss", ["NOWHERE"]),
        ("rankings", ["NOWHERE"]),
    ],
)
def test_a_missing_checkpoint_is_one_line_and_exit_code_2(
    script, words, tmp_path, monkeypatch, capsys
):
    nowhere = str(tmp_path / "nowhere")
    given = [word.replace("NOWHERE", nowhere) for word in words]
    assert refusal(script, given, monkeypatch, capsys).startswith(f"error: {nowhere}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_gpu_is_one_line_and_exit_code_2(monkeypatch, capsys):
    line = refusal("decode_attention", [], monkeypatch, capsys)
    assert line.startswith("error: decode_attention: there is no CUDA device")


def test_screening_asks_for_the_last_of_many_demonstrations_and_shows_no_test_pair(tmp_path):
    screen = runpy.run_path(str(FOLDER / "screen.py"))
    num_pairs = screen["write_test_set"](tmp_path / "small.json.gz", 30)
    tasks = {task.id: task for task in load_tasks(str(tmp_path / "small.json.gz"))}
    assert len(tasks) == 30
    assert sum(len(task.test) for task in tasks.values()) == num_pairs
    originals = {task.id: task for task in load_tasks("training")}
    for task in tasks.values():
        original = originals[task.id]
        shown = len(task.demonstrations)
        assert shown == len(original.demonstrations) - (len(original.demonstrations) >= 4)
        assert same_pairs(task.demonstrations, original.demonstrations[:shown])
        assert same_pairs(task.test, original.test + original.demonstrations[shown:])


def same_pairs(some, others):
    return [(p.input.tolist(), p.output.tolist()) for p in some] == [
        (p.input.tolist(), p.output.tolist()) for p in others
    ]


def test_screening_averages_the_runs_that_are_there_and_names_one_that_fails(
    tmp_path, monkeypatch, capsys
):
    for name, seed, at_two in (("plain", 0, 0.4), ("plain", 1, 0.5), ("broken", 0, 0.6)):
        folder = tmp_path / f"{name}_{seed}"
        (folder / "eval").mkdir(parents=True)
        (folder / "weights").mkdir()
        scores = {"task_fraction": {"pass@1": 0.3, "pass@2": at_two, "pass@10": 0.7}}
        (folder / "eval" / "scores.json").write_text(json.dumps(scores))
        (folder / "weights" / "metrics.jsonl").write_text('{"exact_match": 0.9}\n')
    arms = ["--arm", "plain", "--arm", "broken", "no.such.key=1"]
    given = ["screen", "--out", str(tmp_path), "--tasks", "2", "--seeds", "2", *arms]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "screen.py"), run_name="__main__")
    assert str(end.value.code).startswith(f"error: runs failed: 1, the first {tmp_path}/broken_1")
    assert "unknown key no;" in (tmp_path / "broken_1" / "log.txt").read_text()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = {row[1]: row[3:-1:2] for row in rows if row[:1] == ["│"]}
    assert numbers["plain"] == ["2", "30.0", "45.0", "70.0", "7.1", "90.0"]
    assert numbers["broken"] == ["1", "30.0", "60.0", "70.0", "-", "90.0"]


def refusal(script, words, monkeypatch, capsys):
    """The one line that a script ends with."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
