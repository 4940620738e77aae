"""`solve` over many tasks: every task is answered into one submission, whatever happens."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from arctrm.config import SolveConfig
from arctrm.data.sources import load_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import ArctrmError, CheckpointError, DataError, TaskError
from arctrm.solve import many
from arctrm.solve import solve as room
from arctrm.solve.many import solve
from arctrm.solve.results import SUBMISSION, UNFINISHED, read_submission
from arctrm.solve.solution import Answer, Progress, Solution
from helpers import write_tasks


def quick(trained, out=None, **top) -> SolveConfig:
    """Each task ends soon by itself."""
    tables = {"inference": {"views": 3, "dtype": "float32"}, "judge": {"scoring_views": 2}}
    tables["adaptation"] = {"max_steps": 1, "tokens_per_batch": 256}
    given = {"budget": 0.2, "checkpoint": trained.run, "out": out, **tables, **top}
    return SolveConfig.model_validate(given)


def watched(monkeypatch, failing=None, error=None):
    """The tasks that `answer_first` sees; it raises at the task `failing`."""
    seen, original = [], room.answer_first

    def recorded(answers):
        seen.append(answers.session.task)
        if answers.session.task.id == failing:
            raise error
        return original(answers)

    monkeypatch.setattr(room, "answer_first", recorded)
    return seen


def test_a_folder_is_answered_into_one_submission_and_no_answer_is_handed_on(
    trained, tmp_path, capsys, monkeypatch
):
    seen = watched(monkeypatch)
    tasks = [trained.known[0], *trained.others[:2]]
    folder = write_tasks(tmp_path / "tasks", tasks)
    solve(quick(trained, tmp_path / "out"), str(folder), check=True)
    submitted = read_submission(tmp_path / "out/submission.json")
    assert {name: len(own) for name, own in submitted.items()} == {t.id: len(t.test) for t in tasks}
    said = " ".join(capsys.readouterr().out.split())
    assert f"of {sum(len(t.test) for t in tasks)} test inputs with a known answer solved" in said
    assert {task.id for task in seen} == set(submitted)
    assert all(pair.output is None for task in seen for pair in task.test)


def interrupted(*given, **named):
    raise KeyboardInterrupt


def kept_lines(out):
    """The lines that are whole: while one is written, or after a kill, the last may not be."""
    text = (out / UNFINISHED).read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def records(out):
    """Answers that are kept, in the order in which they came."""
    return [line for line in kept_lines(out) if "row" in line]


def flat(answers):
    return [grid for two in answers for grid in two]


def are_inputs(submitted, task):
    both = zip(task.test, submitted[task.id], strict=True)
    return all(np.array_equal(grid, pair.input) for pair, grids in both for grid in grids)


def test_an_interrupted_run_goes_on_and_loses_nothing(trained, tmp_path, monkeypatch):
    tasks, out = [*trained.known[:2], *trained.others], tmp_path / "out"
    folder, settings = str(write_tasks(tmp_path / "tasks", tasks)), quick(trained, out)
    failing = trained.others[1]
    with monkeypatch.context() as patched:
        seen = watched(patched, failing.id, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt, match=r"of 5 tasks, which are kept in .*--resume"):
            solve(settings, folder)
    first = read_submission(out / SUBMISSION)
    assert list(first) == sorted(task.id for task in tasks)
    answered = [task.id for task in seen[:-1]]
    assert len(answered) >= 2
    assert are_inputs(first, failing)  # not yet answered
    before = (out / SUBMISSION).read_bytes()
    with pytest.raises(DataError, match="add --resume"):
        solve(settings, folder)
    with pytest.raises(CheckpointError, match="seed = 0 then, 3 now"):
        solve(quick(trained, out, seed=3), folder, resume=True)
    assert (out / SUBMISSION).read_bytes() == before
    again = watched(monkeypatch)
    solve(settings, folder, resume=True)
    assert sorted([*answered, *(task.id for task in again)]) == list(first)
    last = read_submission(out / SUBMISSION)
    for name in answered:
        assert [g.tolist() for g in flat(last[name])] == [g.tolist() for g in flat(first[name])]
    assert not (out / UNFINISHED).exists()
    for resume in (False, True):
        with pytest.raises(DataError, match="finished run, of which nothing is left to --resume"):
            solve(settings, folder, resume=resume)


def test_an_answer_that_was_cut_short_is_submitted_and_found_again(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder, settings = str(write_tasks(tmp_path / "tasks", trained.others)), quick(trained, out)
    with monkeypatch.context() as patched:
        patched.setattr(room, "answer_later", interrupted)
        with pytest.raises(KeyboardInterrupt, match="after 0 of 3 tasks"):
            solve(settings, folder)
    [record] = records(out)
    own = read_submission(out / SUBMISSION)[record["task"]]
    assert [two[0].tolist() for two in own] == [ranked[0]["grid"] for ranked in record["test"]]
    seen = watched(monkeypatch)
    solve(settings, folder, resume=True)
    assert len(seen) == 3
    assert not (out / UNFINISHED).exists()


def test_the_page_of_one_task_and_of_many(trained, tmp_path):
    page = tmp_path / "new" / "page.html"
    folder = write_tasks(tmp_path / "tasks", trained.others[:2])
    known = write_tasks(tmp_path / "known", trained.known[:1])
    solve(quick(trained), str(folder), report=page)
    html = page.read_text(encoding="utf-8")
    assert html.count('class="card"') == 2
    assert html.count("answer not known") > 2  # without --check no answer is shown
    solve(quick(trained), str(known), report=page, check=True)
    html = page.read_text(encoding="utf-8")
    assert f"<title>{trained.known[0].id}" in html
    assert "Time line" in html
    assert 'type="range"' in html


def test_a_task_that_fails_is_answered_by_its_inputs_and_the_others_go_on(
    trained, tmp_path, monkeypatch, capsys
):
    failing, out = trained.others[0], tmp_path / "out"
    folder, settings = str(write_tasks(tmp_path / "tasks", trained.others)), quick(trained, out)
    with monkeypatch.context() as patched:
        watched(patched, failing.id, IndexError("out of [range]"))
        with pytest.raises(ArctrmError, match=f"1 of 3 tasks failed .{failing.id}.*--resume"):
            solve(settings, folder)
    submitted = read_submission(out / SUBMISSION)
    assert list(submitted) == [task.id for task in trained.others]
    assert are_inputs(submitted, failing)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{failing.id}: failed (IndexError: out of [range])" in said
    with monkeypatch.context() as patched:
        seen = watched(patched)
        solve(settings, folder, resume=True)
    assert [task.id for task in seen] == [failing.id]
    watched(monkeypatch, failing.id, IndexError("out of range"))
    with pytest.raises(IndexError):  # nothing else is there to go on with
        solve(quick(trained), str(write_tasks(tmp_path / "one", [failing])))


# -- one clock for all tasks


@pytest.fixture
def clock(monkeypatch):
    """Budgets of tasks as they come, on a clock that moves by `clock.use(budget)` a task."""
    told = SimpleNamespace(now=1000.0, budgets={}, use=lambda budget: budget, is_killed=False)

    def solved(solver, task, config, on_progress):
        told.budgets[task.id] = config.budget
        told.now += told.use(config.budget)
        on_progress(Progress("reading", "", 0.0, config.budget, ()))
        if told.is_killed:
            raise KeyboardInterrupt
        return Solution(task.without_answers(), tuple(Answer(pair.input) for pair in task.test))

    monkeypatch.setattr(many, "solve_task", solved)
    monkeypatch.setattr(many, "time", SimpleNamespace(monotonic=lambda: told.now))
    return told


def timed(trained, out, total):
    return quick(trained, out, total_budget=total, budget=60.0)


def large(task):
    """The same task, with cells repeated."""
    grow = lambda grid: np.kron(grid, np.ones((4, 4), np.uint8))
    pairs = lambda own: tuple(Pair(grow(pair.input), grow(pair.output)) for pair in own)
    return Task("large", pairs(task.demonstrations), pairs(task.test))


def test_a_total_budget_is_shared_by_need_and_used_up(trained, tmp_path, clock):
    tasks = [*trained.known, *trained.others, large(trained.others[0])]
    folder = write_tasks(tmp_path / "tasks", tasks)
    solve(timed(trained, tmp_path / "out", 100.0), str(folder))
    given = clock.budgets
    assert sum(given.values()) == pytest.approx(98.0)  # the rest is for the end
    small = given[trained.others[0].id]
    assert 2 * small < given["large"] < 8 * small
    assert all(given[task.id] < small for task in trained.known)  # of much the same size
    # Known tasks may end early, and small ones end on time.
    last = min(trained.others, key=lambda task: given[task.id])
    assert set(list(given)[: len(trained.known)]) == {task.id for task in trained.known}
    assert list(given)[len(trained.known)] == "large"
    assert list(given)[-1] == last.id


def test_time_that_tasks_leave_goes_to_later_ones_and_what_they_overrun_is_taken(
    trained, tmp_path, clock, capsys
):
    folder, budgets = str(write_tasks(tmp_path / "tasks", trained.others)), []
    for used in (0.5, 1.0, 1.3):
        clock.use, clock.budgets = (lambda budget, used=used: used * budget), {}
        solve(timed(trained, tmp_path / f"{used}", 90.0), folder)
        budgets.append(list(clock.budgets.values()))
    assert budgets[0][0] == pytest.approx(budgets[1][0])
    assert budgets[0][-1] > budgets[1][-1] > budgets[2][-1] > 0
    clock.use = lambda budget: 200.0
    solve(timed(trained, tmp_path / "late", 90.0), folder)
    assert "no time was left for 2 tasks" in " ".join(capsys.readouterr().err.split())
    assert len(read_submission(tmp_path / "late" / SUBMISSION)) == 3
    clock.use, clock.budgets = (lambda budget: budget), {}
    solve(timed(trained, tmp_path / "late", 300.0), folder, resume=True)
    assert sum(clock.budgets.values()) == pytest.approx(300.0 - 5.0 - 200.0)
    assert len(clock.budgets) == 2


def test_a_resumed_run_has_the_time_that_is_left(trained, tmp_path, clock):
    """The time of the task that was not answered is used, too."""
    folder, out = str(write_tasks(tmp_path / "tasks", trained.others)), tmp_path / "out"
    clock.is_killed = True
    with pytest.raises(KeyboardInterrupt, match="after 0 of 3 tasks"):
        solve(timed(trained, out, 90.0), folder)
    [used] = clock.budgets.values()
    clock.is_killed, clock.budgets, clock.now = False, {}, 5000.0
    solve(timed(trained, out, 90.0), folder, resume=True)
    assert sum(clock.budgets.values()) == pytest.approx(88.2 - used, abs=0.1)


# -- the folder


def test_a_bad_task_ends_the_run_before_anything_is_written(trained, tmp_path, capsys):
    folder = write_tasks(tmp_path / "tasks", trained.others[:1])
    (folder / "bad.json").write_text('{"train": [], "test": []}')
    with pytest.raises(TaskError, match=r"bad\.json"):
        solve(quick(trained, tmp_path / "out"), str(folder))
    assert not (tmp_path / "out").exists()
    solve(quick(trained, tmp_path / "out", keep_going=True), str(folder))
    assert list(read_submission(tmp_path / "out/submission.json")) == [trained.others[0].id]
    assert "bad.json" in "".join(capsys.readouterr().err.split())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(trained, tmp_path, capsys):
    solve(quick(trained, tmp_path / "out"), str(trained.folder), dry_run=True)
    assert "reader and trm" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_for_scripts_stdout_has_a_line_of_json_for_each_task(trained, capsys):
    solve(quick(trained), str(trained.folder), json=True, check=True, verbose=True)
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert sorted(line["task"] for line in lines) == [task.id for task in trained.known]
    assert all("right" in answer for line in lines for answer in line["answers"])
    assert "test inputs with a known answer solved" in err
    solve(quick(trained), str(trained.folder), json=True, dry_run=True)
    assert capsys.readouterr().out == ""


# -- real processes


def many_tasks(trained, tmp_path):
    """A folder of nine tasks, and the command that solves them within a total budget."""
    own = [*trained.known, *trained.others]
    more = [replace(task, id=f"{task.id}-{n}") for n in range(2) for task in trained.others]
    folder = write_tasks(tmp_path / "tasks", [*own, *more][:9])
    command = [sys.executable, "-m", "arctrm", "solve", str(folder), "--out", str(tmp_path / "out")]
    for key in ("inference.views=3", "inference.dtype=float32", "judge.scoring_views=2"):
        command += ["--set", key]
    return [*command, "--checkpoint", str(trained.run)]


def is_whole(out):
    submitted = read_submission(out / SUBMISSION)
    return len(submitted) == 9 and all(map(all, map(flat_sizes, submitted.values())))


def flat_sizes(answers):
    return [grid.size for grid in flat(answers)]


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_nothing_is_lost(trained, tmp_path):
    """With a submission of all tasks at any moment; the time used is known."""
    out, command = tmp_path / "out", many_tasks(trained, tmp_path)
    command += ["--budget", "1s"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    num_seen = 0
    while running.poll() is None:
        if (out / SUBMISSION).exists():
            assert is_whole(out)
            num_seen += 1
            if len(records(out)) >= 2:
                running.kill()
                running.wait()
        time.sleep(0.02)
    assert running.returncode == -signal.SIGKILL
    assert num_seen > 1
    kept = records(out)
    assert max(line.get("used", 0) for line in kept_lines(out)) > 0
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, "add --resume" in refused.stderr) == (2, True)
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    after = read_submission(out / SUBMISSION)
    assert is_whole(out)
    assert not (out / UNFINISHED).exists()
    inputs = {task.id: [pair.input for pair in task.test] for task in load_tasks(command[4])}
    for one in kept:
        # On a busy machine a test input may have no grid in time: its input is submitted.
        both = zip(one["test"], inputs[one["task"]], strict=True)
        best = [ranked[0]["grid"] if ranked else given.tolist() for ranked, given in both]
        assert [two[0].tolist() for two in after[one["task"]]] == best


def started_by_itself(command, tmp_path):
    """The command where two GPUs are pretended: it starts two processes, which find none."""
    script = "import sys, torch; torch.cuda.device_count = lambda: 2\n"
    script += "if __name__ == '__main__': from arctrm.cli import main; main()"
    (tmp_path / "two.py").write_text(script)
    return [command[0], str(tmp_path / "two.py"), *command[3:]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "its own"])
def test_two_processes_divide_the_tasks(trained, tmp_path, launcher):
    out, command = tmp_path / "out", many_tasks(trained, tmp_path)
    command += ["--budget", "1s"]
    if launcher == "torchrun":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        command = started_by_itself(command, tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert is_whole(out)
    assert not (out / UNFINISHED).exists()
    answered = re.findall(r"^task \d of 9: (\S+),", done.stderr, re.M)
    assert len(answered) == len(set(answered)) == 9  # no task by both


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(trained, tmp_path, how):
    out, command = tmp_path / "out", many_tasks(trained, tmp_path)
    command = [*started_by_itself(command, tmp_path), "--total-budget", "10m"]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (out / UNFINISHED).exists() or not records(out):
        assert running.poll() is None
        time.sleep(0.1)
    others = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(how)  # to this process alone
    said = running.communicate()[1]
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert f"stopped; go on with --resume --out {out}" in said
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive
    assert is_whole(out)
    assert 1 <= len(records(out)) < 9
