"""`arctrm solve` from the command line: targets, --check, --keep-going, --out, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from arctrm.cli import main
from arctrm.data.task import Pair
from arctrm.solving.submission import check_complete, read_submission

QUICK = (
    *("--budget", "5s", "--views", "2", "--set", "inference.steps=1"),
    *("--set", "adaptation.max_steps=2", "--set", "adaptation.tokens_per_batch=256"),
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def solve(capfd, trained):
    """Run `arctrm solve` in this process with the tiny model: (exit code, stdout, stderr)."""

    def call(*arguments, checkpoint=trained.run):
        words = ["solve", *arguments, "--checkpoint", checkpoint, *QUICK]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        printed = capfd.readouterr()
        return stop.value.code, printed.out, printed.err

    return call


def refused(result, said):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.fixture
def task_file(trained, write_tasks):
    write_tasks(Path("tasks"), trained.others[2:])
    return Path("tasks") / f"{trained.others[2].id}.json"


def test_a_task_file_is_answered_with_two_grids_and_their_evidence(solve, task_file):
    code, out, _ = solve(task_file)
    assert code == 0
    for words in ("attempt_1", "attempt_2", "of 2 views", "4 adaptation steps", "demonstration 1"):
        assert words in out


def test_nothing_is_written_unless_asked(solve, task_file):
    before = sorted(Path().rglob("*"))
    assert solve(task_file)[0] == 0
    assert sorted(Path().rglob("*")) == before


def test_out_holds_a_valid_submission(solve, task_file, trained):
    assert solve(task_file, "--out", "deep/answers")[0] == 0
    written = Path("deep/answers/submission.json")
    check_complete(json.loads(written.read_text()), trained.others[2:])
    assert list(read_submission(written)) == [trained.others[2].id]


def test_right_or_wrong_is_said_only_when_asked(solve, task_file):
    code, out, err = solve(task_file)
    assert code == 0
    assert not {"right", "wrong"} & set(f"{out} {err}".split())
    code, out, _ = solve(task_file, "--check")
    assert code == 0
    assert {"right", "wrong"} & set(out.split())
    assert "of 1 test inputs with a known answer solved" in " ".join(out.split())


def test_right_is_said_of_a_right_answer(solve, trained, write_tasks):
    """Solve once, make that answer the truth, and check again."""
    task = trained.others[2]
    write_tasks(Path("tasks"), [task])
    assert solve("tasks", "--out", "answers")[0] == 0
    [(attempt_1, _)] = read_submission(Path("answers/submission.json"))[task.id]
    write_tasks(Path("told"), [replace(task, test=(Pair(task.test[0].input, attempt_1),))])
    code, out, _ = solve("told", "--check")
    assert code == 0
    assert "right" in out.split()
    assert "1 of 1 test inputs with a known answer solved" in " ".join(out.split())


def test_nothing_is_said_of_an_answer_that_is_not_known(solve, trained, write_tasks):
    write_tasks(Path("tasks"), [trained.others[2].without_answers()])
    code, out, _ = solve("tasks", "--check")
    assert code == 0
    assert not {"right", "wrong"} & set(out.split())


def test_a_bundled_task_is_named_by_its_id(solve, trained):
    task = trained.known[0].id
    code, out, _ = solve(f"arc1:{task}", "--out", "answers")
    assert code == 0
    assert task in out
    assert "leave-one-out" not in out
    assert list(read_submission(Path("answers/submission.json"))) == [task]


def test_a_kaggle_file_is_answered_whole(solve, trained, write_kaggle):
    challenges, _ = write_kaggle(Path("kaggle"), trained.others)
    assert solve(challenges, "--out", "answers")[0] == 0
    check_complete(json.loads(Path("answers/submission.json").read_text()), trained.others)


def test_one_bad_task_stops_a_folder_before_anything_is_written(solve, task_file):
    (task_file.parent / "bad.json").write_text("not JSON")
    refused(solve("tasks", "--out", "answers"), "bad.json: is not JSON")
    assert not Path("answers").exists()


def test_keep_going_reports_the_bad_task_and_goes_on(solve, task_file, trained):
    (task_file.parent / "bad.json").write_text("not JSON")
    code, _, err = solve("tasks", "--out", "answers", "--keep-going")
    assert code == 0
    assert "left out: tasks/bad.json: is not JSON" in " ".join(err.split())
    assert list(read_submission(Path("answers/submission.json"))) == [trained.others[2].id]


def test_a_reported_error_is_printed_as_it_is(solve, task_file):
    (task_file.parent / "bad[x].json").write_text("not JSON")
    code, _, err = solve("tasks", "--keep-going")
    assert code == 0
    assert "bad[x].json" in "".join(err.split())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere.json", "nowhere.json: no such file or folder"),
        ("arc1:ffffffff", "arc1:ffffffff: ARC-AGI-1 has no task of that id"),
        ("empty", "empty: has no task files"),
        ("number.json", "number.json"),
        ("ragged.json", "train[0].input row 1"),
        ("untested.json", "a task needs at least a test input"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry_run"])
def test_what_is_no_task_is_refused(solve, target, said, dry_run):
    Path("empty").mkdir()
    Path("number.json").write_text("7")
    pair = {"input": [[1, 2], [3]], "output": [[1]]}
    Path("ragged.json").write_text(json.dumps({"train": [pair], "test": [pair]}))
    pair = {"input": [[1]], "output": [[1]]}
    Path("untested.json").write_text(json.dumps({"train": [pair], "test": []}))
    refused(solve(target, "--out", "answers", *(["--dry-run"] if dry_run else [])), said)
    assert not Path("answers").exists()


def test_a_reference_checkpoint_cannot_adapt_and_says_so(solve, task_file, reference_file):
    refused(solve(task_file, checkpoint=reference_file), "trm.layout = 'reference'")


def test_a_per_view_checkpoint_cannot_adapt_and_says_so(solve, task_file, trained_per_view):
    refused(solve(task_file, checkpoint=trained_per_view), "per_view")


def test_a_dry_run_counts_and_solves_nothing(solve, trained, write_tasks, monkeypatch):
    from arctrm.solving import solve as module

    monkeypatch.setattr(module, "solve_task", lambda *given: pytest.fail("a task was solved"))
    write_tasks(Path("tasks"), [trained.known[0], *trained.others])
    code, out, _ = solve("tasks", "--dry-run", "--out", "answers")
    assert code == 0
    num_inputs = 1 + sum(len(task.test) for task in trained.others)
    assert f"4, {num_inputs}" in out
    assert "0.3 min" in out
    assert not Path("answers").exists()


def test_a_dry_run_refuses_a_checkpoint_that_cannot_adapt(solve, task_file, trained_per_view):
    refused(solve(task_file, "--dry-run", checkpoint=trained_per_view), "per_view")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(solve, task_file, monkeypatch):
    from arctrm.solving import solve as module

    monkeypatch.setattr(module, "solve_task", lambda *given: pytest.fail("a task was solved"))
    Path("answers").write_text("a file")
    refused(solve(task_file, "--out", "answers"), "answers")


# -- the planner


def test_trace_shows_the_attempts_of_a_coupled_checkpoint(solve, task_file, joined):
    code, out, err = solve(task_file, "--trace", "--attempts", "2", checkpoint=joined(True))
    assert (code, "error" in err) == (0, False), err
    for words in ("test 1: attempts", "score", "feedback", "* kept: attempt"):
        assert words in out


def test_trace_says_where_there_is_nothing_to_plan_with(solve, task_file, joined, tiny_reader):
    for checkpoint in (None, joined(False), tiny_reader):
        given = {} if checkpoint is None else {"checkpoint": checkpoint}
        code, _, err = solve(task_file, "--trace", **given)
        assert code == 0
        assert "has no coupling of a reader and a TRM to plan with" in " ".join(err.split())


@pytest.mark.parametrize("attempts", ["0", "17"])
def test_a_number_of_attempts_out_of_range_is_refused(solve, task_file, attempts):
    refused(solve(task_file, "--attempts", attempts), f"attempts = {attempts}")
