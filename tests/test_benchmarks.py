"""The scripts in `benchmarks/`: what cannot be used of what the user gave is one line."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from arctrm.data.sources import load_tasks
from arctrm.invariants.task import weights
from arctrm.solve.propose import Candidate
from arctrm.solve.questions import Key
from arctrm.solve.rank import vote
from arctrm.solve.results import CANDIDATES, write_candidates

FOLDER = Path(__file__).parents[1] / "benchmarks"
RECIPE = str(FOLDER.parent / "src/arctrm/configs/arc1_1h.toml")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("rankings", ["NOWHERE"]),
        ("invariant_weights", ["--tasks", "training", "--scores", "NOWHERE", "--recipe", RECIPE]),
    ],
)
def test_a_missing_checkpoint_is_one_line_and_exit_code_2(
    script, words, tmp_path, monkeypatch, capsys
):
    nowhere = str(tmp_path / "nowhere")
    given = [word.replace("NOWHERE", nowhere) for word in words]
    assert refusal(script, given, monkeypatch, capsys).startswith(f"error: {nowhere}")


def test_screening_asks_for_the_last_of_many_demonstrations_and_shows_no_test_pair(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(FOLDER))
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


@pytest.mark.parametrize(
    ("words", "got"),
    [
        (["--take", "training"], "argument --take: 'training' is no source with a number"),
        (["--take", "training=0"], "argument --take: 'training=0' is no source with a number"),
        (["--take", "=3"], "argument --take: '=3' is no source with a number"),
        (["--part", "3/2"], "argument --part: '3/2' is no part of a whole, such as 2/3"),
        (["--part", "2"], "argument --part: '2' is no part of a whole, such as 2/3"),
    ],
)
def test_unseen_names_an_argument_of_no_use_and_what_is_allowed(words, got, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unseen.py", *words])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "unseen.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"unseen.py: error: {got}")


@pytest.mark.parametrize(
    ("words", "got"),
    [
        (["--take", "training=5", "--budget", "1"], "--take: training"),
        (["--budget", "1.0", "--budget", "1"], "--budget: 1"),
    ],
)
def test_unseen_refuses_what_it_would_answer_twice(words, got, tmp_path, monkeypatch, capsys):
    out = tmp_path / "unseen.jsonl"
    given = ["--out", str(out), "--take", "training=3", *words]
    line = refusal("unseen", given, monkeypatch, capsys)
    assert line == f"error: {got} is given more than once; give it once"
    assert not out.exists()


def test_unseen_counts_solved_training_tasks_by_their_certainty(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    count = runpy.run_path(str(FOLDER / "unseen.py"))["print_counts"]
    line = {"source": "training", "inputs": 1, "right": 1, "probe": 1.0, "agreement": [0.9]}
    wrong = {**line, "right": 0, "agreement": [0.1]}
    old = {name: value for name, value in line.items() if name != "agreement"} | {"probe": None}
    count([line, line, wrong, old, {**line, "source": "evaluation2"}])
    rows = [row.split("│")[2:5] for row in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) == 3]
    expected = ("all", "2", "3"), ("yes", "2", "2"), ("no", "0", "1"), ("all", "1", "1")
    assert [row for row in rows if row[1].isdigit()] == [*map(list, expected), ["-", "1", "1"]]


def refusal(script, words, monkeypatch, capsys):
    """The one line that a script ends with."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_invariants_are_weighed_by_what_right_and_wrong_grids_break(tmp_path, monkeypatch, capsys):
    tasks = load_tasks("training")[:40]
    ranked = {}
    for task in tasks:
        for index, pair in enumerate(task.test):
            wrong = pair.output.copy()
            wrong[0, 0] = (wrong[0, 0] + 5) % 10
            key = Key(task.id, index)
            grids = (wrong, wrong, pair.output)
            own = [Candidate(key, grid, 0.0, "reader", view) for view, grid in enumerate(grids)]
            ranked[key] = vote(own, seed=0)
    (tmp_path / "scores").mkdir()
    write_candidates(tmp_path / "scores" / CANDIDATES, tasks, ranked)
    words = ["--tasks", "training", "--scores", str(tmp_path / "scores"), "--recipe", RECIPE]
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["invariant_weights.py", *words, "--folds", "2"])
    before = weights()
    runpy.run_path(str(FOLDER / "invariant_weights.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    rows = [re.findall(r"[\d.]+", line.split("│")[2] + line.split("│")[3]) for line in lines[4:10]]
    first = {float(weight): float(score) for weight, score in rows}
    assert first[0.0] == 0.0
    assert first[1.5] > 50.0  # with weights from the other fold
    nats = [float(line.split()[0]) for line in lines[12:]]
    assert len(nats) > 20
    assert nats == sorted(nats, reverse=True)
    assert min(nats) > 0.3
    weights.cache_clear()
    assert weights() == before  # nothing is written
