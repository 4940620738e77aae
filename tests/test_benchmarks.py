"""The scripts in `benchmarks/`: what cannot be used of what the user gave is one line."""

import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from arctrm.data.sources import load_tasks
from arctrm.invariants.shared import weights
from arctrm.solving.kept import KEPT, write_candidates
from arctrm.solving.vote import Candidate, vote

FOLDER = Path(__file__).parents[1] / "benchmarks"
RECIPE = str(FOLDER.parent / "configs" / "arc1_1h.toml")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("trm_inference", ["--checkpoint", "NOWHERE"]),
        ("grid_decoding", ["--checkpoint", "NOWHERE"]),
        ("held_out_loss", ["NOWHERE"]),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_gpu_is_one_line_and_exit_code_2(monkeypatch, capsys):
    line = refusal("decode_attention", [], monkeypatch, capsys)
    assert line.startswith("error: decode_attention: there is no CUDA device")


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


def test_screening_shows_a_dash_where_a_run_was_too_short_to_be_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(FOLDER))
    screen = runpy.run_path(str(FOLDER / "screen.py"))
    arms = [screen["Arm"](name, ()) for name in ("short", "long")]
    runs = [
        screen["Run"](arm, seed, tmp_path / f"{arm.name}_{seed}") for arm in arms for seed in (0, 1)
    ]
    for run in runs:
        run.scores.parent.mkdir(parents=True)
        run.scores.write_text(
            json.dumps({"task_fraction": dict.fromkeys(("pass@1", "pass@2", "pass@10"), 0.5)})
        )
        (run.folder / "weights").mkdir()
        line = "" if run == runs[0] else '{"exact_match": 0.9}\n'
        (run.folder / "weights" / "metrics.jsonl").write_text(line)
    screen["print_table"](arms, runs, "2 test pairs")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[1]: row[-2] for row in rows if row[:1] == ["│"]} == {"short": "-", "long": "90.0"}


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


def test_unseen_refuses_more_tasks_than_the_weights_do_not_know(
    trained, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "unseen.jsonl"
    given = ["--out", str(out), "--take", "training=9999", "--budget", "1"]
    words = [*given, "--checkpoint", str(trained.run)]
    line = refusal("unseen", words, monkeypatch, capsys)
    assert line.startswith("error: --take training=9999: ")
    assert line.endswith("; take no more than that, or from another source")
    new = len(load_tasks("training")) - len(trained.known)
    assert f" {new} of its tasks are new to " in line
    assert not out.exists()


def test_unseen_answers_the_first_unknown_tasks_by_hash_and_none_of_them_twice(
    trained, write_tasks, tmp_path, monkeypatch, capsys
):
    source = str(write_tasks(tmp_path / "tasks", [*trained.known[:1], *trained.others]))
    out = tmp_path / "there" / "unseen.jsonl"
    given = ["--out", str(out), "--take", f"{source}=2", "--budget", "2"]
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(*more):
        """The lines of the file, and how many of them were printed as they came."""
        words = ["unseen", *given, "--checkpoint", str(trained.run), *more]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(FOLDER / "unseen.py"), run_name="__main__")
        printed = capsys.readouterr().out.splitlines()
        lines = out.read_text().splitlines()
        return lines, sum(line in lines for line in printed)

    first, printed = run("--part", "2/2")
    assert (len(first), printed) == (1, 1)
    both, printed = run()
    assert (len(both), both[0], printed) == (2, first[0], 1)
    assert run() == (both, 0)
    ids = [task.id for task in trained.others]
    ids.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    answers = [json.loads(line) for line in both]
    assert [line["task"] for line in answers] == [ids[1], ids[0]]
    by_id = {task.id: task for task in trained.others}
    for line in answers:
        assert (line["source"], line["budget"]) == (source, 2.0)
        assert line["steps"] >= 0
        assert 0 <= line["first"] <= line["right"] <= line["inputs"]
        assert line["inputs"] == len(by_id[line["task"]].test)


@pytest.mark.parametrize(
    ("text", "begins", "ends"),
    [
        (
            '{"weights": "runs/other", "source": "training"}\n',
            "holds answers of runs/other, not of ",
            "; give --out another file",
        ),
        (
            '{"weights": "runs/other"}\n{"weights": "ru',
            "cannot be read as lines of JSON (",
            "; mend it, or give --out another file",
        ),
    ],
    ids=["of another checkpoint", "half written"],
)
def test_unseen_leaves_alone_a_file_that_it_cannot_add_to(
    trained, tmp_path, monkeypatch, capsys, text, begins, ends
):
    out = tmp_path / "unseen.jsonl"
    out.write_text(text)
    given = ["--out", str(out), "--take", "training=1", "--budget", "1"]
    words = [*given, "--checkpoint", str(trained.run)]
    line = refusal("unseen", words, monkeypatch, capsys)
    assert line.startswith(f"error: {out}: {begins}")
    assert line.endswith(ends)
    assert out.read_text() == text


def test_the_table_of_unseen_fits_80_columns(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    unseen = runpy.run_path(str(FOLDER / "unseen.py"))
    counts = {"inputs": 3, "right": 3, "first": 1}
    for source in ("evaluation2", "tasks/of/a/folder/with/a/long/name"):
        line = {"source": source, "budget": 3600.0, **counts}
        unseen["print_table"]([{**line, "steps": steps} for steps in (1001, 2000) * 200])
        table = [row for row in capsys.readouterr().out.splitlines() if row[:1] in "┃│"]
        assert max(map(len, table)) <= 80
        assert "…" not in "".join(table)
        heads = [head.strip() for head in table[0].strip("┃").split("┃")]
        named = ["source", "budget", "tasks", "solved", "inputs", "right", "at first", "steps"]
        assert heads == named
        cells = [cell.strip() for cell in table[1].strip("│").split("│")]
        assert cells[1:] == ["3600 s", "400", "400", "1200", "1200", "400", "1500.5"]


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
            own = [Candidate(wrong, 0.0), Candidate(wrong, 0.0), Candidate(pair.output, 0.0)]
            ranked[task.id, index] = vote(own, seed=0)
    (tmp_path / "scores").mkdir()
    write_candidates(tmp_path / "scores" / KEPT, tasks, ranked)
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
