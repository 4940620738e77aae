"""`arctrm solve`: the tasks of a file or folder under one clock, by one process or several.

Of a total budget each task gets a share of the time left: the square root of its tokens counts, and
a task that the weights know counts less, as nothing is adapted to it. Known tasks come first, as
they may end early; small ones come last, as they end on time. Answers are kept task by task, and
`submission.json` has two grids for every test input at any moment: its input until it is answered.
Several processes (one for each GPU, or those of torchrun) divide the tasks and write in turns.
"""

import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from torch import distributed

from arctrm.config import SolveConfig
from arctrm.console import console, dry_run_table, note, progress_console
from arctrm.data.sources import load_tasks
from arctrm.data.task import Task
from arctrm.errors import ArctrmError, ConfigError, Interrupted
from arctrm.model.layout import pair_length
from arctrm.report.pages import solution_page, write_page
from arctrm.solve import results, scoring
from arctrm.solve.adapt import require_adaptable
from arctrm.solve.questions import keys_of, require_test_inputs
from arctrm.solve.report import (
    progress_bar,
    solution_json,
    solution_report,
    write_gallery,
)
from arctrm.solve.results import EVERYTHING, INTERRUPTED, SUBMISSION, UNFINISHED, Store
from arctrm.solve.solution import Answer, Progress, Solution
from arctrm.solve.solve import Stopped, solve_task
from arctrm.solve.weights import Solver, load_solver, weights_fingerprint

TIMES_NOTED = 200  # the clock of a total budget is written down so often, once a second at most
END_SHARE, END_SECONDS = 0.02, 5.0
"""Of a total budget, at most, kept for a last task that ends late and for the process to end."""
MOST_NAMED = 3  # failed tasks that are named


def solve(
    config: SolveConfig,
    target: str,
    *,
    check: bool = False,
    verbose: bool = False,
    json: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    report: Path | None = None,
    began: float | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Solve the tasks of `target`, print each, and keep the answers in `config.out`, if any.

    `check` says whether the answers are right, where they are known; `verbose` adds the numbers and
    the planner's attempts; `json` prints a line of JSON for each task, and all else to stderr;
    `resume` answers what an earlier run has left; `dry_run` only says what would be done; `report`
    is the file of a page to look at, of one task with its evidence or of many.
    `began`: monotonic time at which the clock started; `is_stopped` is asked whether to end.
    With `keep_going` a bad task is left out. One of several that fails is answered by its inputs,
    and the ArctrmError comes at the end.
    """
    # 1. Tasks, and what is answered already.
    began = time.monotonic() if began is None else began
    rank, count = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    left_out = lambda error: None if rank else note(f"left out: {error}")
    tasks = load_tasks(target, on_error=left_out if config.keep_going else None)
    require_test_inputs(tasks, target)
    out, store = config.out, Store(Path(UNFINISHED))
    if out is not None:
        store = results.open_store(out / UNFINISHED, config, tasks, resume, [SUBMISSION])
    elif count > 1:
        raise ConfigError("out: several processes share a folder of answers; give --out")
    # 2. Who answers: this process, or one for each GPU.
    starts = out is not None and "RANK" not in os.environ
    gpus = min(torch.cuda.device_count(), len(store.left(tasks))) if starts else 1
    if gpus > 1 and not dry_run:
        shown = dict(check=check, verbose=verbose, json=json, report=report)
        options: dict[str, Any] = {"resume": resume, "began": began} | shown
        return _start(gpus, config, target, options)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not dry_run:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    solver = load_solver(config.checkpoint, config.inference, device)
    require_adaptable(solver, "solve", "`arctrm eval` takes any checkpoint")
    how = (check, verbose, json, report, is_stopped)
    run = _Run(config, tasks, store, solver, began, rank, count, *how)
    if dry_run:
        return run.print_plan(max(count, gpus))
    # 3. Every process has read the folder before the first one writes; then they part.
    if count > 1:
        distributed.init_process_group("gloo")
        distributed.barrier()
    run.begin()
    if count > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    store.writes = out is not None
    # 4. Task by task.
    try:
        with run.on_the_clock():
            run.answer()
    except KeyboardInterrupt:
        run.draw_all()
        if out is None or len(tasks) == 1:
            raise
        done = f"{len(tasks) - len(store.left(tasks))} of {len(tasks)} tasks"
        kept = f"stopped after {done}, which are kept in {out}; go on with --resume"
        raise KeyboardInterrupt(kept) from None
    run.end()


@dataclass(eq=False)
class _Run:
    """The tasks of one command, by one of the processes that answer them."""

    config: SolveConfig
    tasks: list[Task]  # with their answers, where known
    store: Store
    solver: Solver
    began: float
    rank: int
    count: int  # of processes
    check: bool
    verbose: bool
    json: bool
    page: Path | None
    is_stopped: Callable[[], bool]
    failed: list[str] = field(default_factory=list)  # task ids
    late: list[str] = field(default_factory=list)  # for which there was no time

    def __post_init__(self) -> None:
        self.used_before, self.known = self.store.used, scoring.answers(self.tasks)

    @property
    def out(self) -> Path | None:
        """Where answers are kept, if anywhere."""
        return self.config.out

    def clock(self) -> float:
        """Seconds used by the command, those of interrupted runs included."""
        return self.used_before + time.monotonic() - self.began

    def is_known(self, task: Task) -> bool:
        """Whether the weights were trained on it."""
        return self.solver.row_of(task) is not None

    def print_plan(self, num_processes: int) -> None:
        """What would be done."""
        config, num_left = self.config, len(self.store.left(self.tasks))
        seconds = config.budget * num_left / num_processes
        if config.total_budget is not None:
            seconds = max(0.0, config.total_budget - self.used_before)
        rows = {
            "checkpoint, voices": f"{self.solver.name}, {' and '.join(self.solver.voices)}",
            "tasks, test inputs": f"{len(self.tasks)}, {sum(len(t.test) for t in self.tasks)}",
            "answered before": len(self.tasks) - num_left,
            "known to the model": sum(map(self.is_known, self.tasks)),
            "time, about": f"{seconds / 60:.1f} min",
        }
        self.say(dry_run_table("solve", rows))

    def begin(self) -> None:
        """Check that the weights are those that began; the first process begins the folder."""
        writes = self.out is not None and self.rank == 0
        if self.out is not None and writes:
            self.store.held = results.open_folder(self.out, self.config)
        weights = weights_fingerprint(self.solver.model)
        self.store.begin(self.config, self.solver.name, weights, writes=writes)
        if writes:
            self.write()

    def write(self) -> None:
        """Write the submission of all tasks, and the time."""
        if self.out is not None:
            results.write_submission(self.out, self.tasks, self.store.rankings(self.tasks))
            self.store.keep_time(self.clock())

    def answer(self) -> None:
        """Answer this process's part of the tasks, each in its share of the time."""
        adapts, total = self.config.adaptation, self.config.total_budget
        if total is not None:
            total -= min(total * END_SHARE, END_SECONDS)
        known_weight, needs = 1 - adapts.share + adapts.known_share, dict[str, float]()
        left = self.store.left(self.tasks)
        for task in left:
            tokens = sum(pair_length(pair) for pair in (*task.demonstrations, *task.test))
            needs[task.id] = tokens**0.5 * (known_weight if self.is_known(task) else 1.0)
        if total is not None:
            left.sort(key=lambda task: (not self.is_known(task), -needs[task.id]))
        mine = left[self.rank :: self.count]
        for place, task in enumerate(mine):
            seconds = self.config.budget
            if total is not None:
                share = needs[task.id] / sum(needs[one.id] for one in mine[place:])
                seconds = (total - self.clock()) * share
            if seconds <= 0:
                self.late = [one.id for one in mine[place:]]
                break
            if len(self.tasks) > 1:
                number = len(self.tasks) - len(self.store.left(self.tasks)) + len(self.failed) + 1
                told = f"task {number} of {len(self.tasks)}: {task.id}, about {seconds:.0f} s"
                note(told)
            self.solve_one(task, seconds)

    def solve_one(self, task: Task, seconds: float) -> None:
        """Answer a task, keep the answers, show them."""
        config, row, stop = self.config.model_copy(update={"budget": seconds}), EVERYTHING, None
        bar = progress_bar(seconds) if self.count == 1 else nullcontext(lambda now: None)
        try:
            with bar as shown:

                def on_progress(now: Progress) -> None:
                    shown(now)
                    if self.is_stopped():
                        raise KeyboardInterrupt

                solution = solve_task(self.solver, task, config, on_progress)
        except Stopped as error:
            solution, row, stop = error.solution, INTERRUPTED, error
        except Exception as error:
            if len(self.tasks) == 1:
                raise
            said = f"failed ({type(error).__name__}: {error}); its inputs are submitted"
            note(f"{task.id}: {said}")
            self.failed.append(task.id)
            answers = tuple(Answer(pair.input) for pair in task.test)
            return self.show(Solution(task.without_answers(), answers))
        ranked = dict(zip(keys_of([task]), solution.candidates, strict=True))
        with self.store.exclusive():
            self.store.add(row, [(task, results.as_record(task, ranked))], solution.seconds)
            self.write()
            self.show(solution)
        if stop is not None:
            raise stop

    @contextmanager
    def on_the_clock(self) -> Iterator[None]:
        """Write down the time now and then: a run that is killed has used it all the same."""
        ended, total = threading.Event(), self.config.total_budget or 0.0

        def tick() -> None:
            with suppress(ArctrmError):  # a full disk, which the next answer finds; all is finished
                while not ended.wait(max(1.0, total / TIMES_NOTED)):
                    self.store.keep_time(self.clock())
                self.store.keep_time(self.clock())

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def show(self, solution: Solution) -> None:
        """Print a solved task."""
        known = self.known[solution.task.id]
        correct = scoring.verdicts(solution.attempts, known) if self.check else None
        if self.json:
            console().print(solution_json(solution, correct), soft_wrap=True)
        else:
            self.say(solution_report(solution, correct, verbose=self.verbose))
        if self.page is not None and len(self.tasks) == 1:
            write_page(self.page, solution_page(solution, correct, self.solver.name))
            note(f"the page is {self.page}")

    def draw_all(self) -> None:
        """Draw the page of several tasks."""
        if self.page is not None and len(self.tasks) > 1:
            ranked, known = self.store.rankings(self.tasks), self.known if self.check else {}
            head = {"checkpoint": self.solver.name}
            write_gallery(self.page, head, self.tasks, ranked, known)

    def say(self, text: RenderableType) -> None:
        """Print for people."""
        (progress_console() if self.json else console()).print(text)

    def end(self) -> None:
        """Say how it ended; the process that ends last has the answers of all."""
        tasks, out = self.tasks, self.out
        is_complete = not self.store.left(tasks)
        if is_complete or self.late or self.count == 1:
            self.draw_all()
        if is_complete and out is not None:
            self.store.finish(tasks)
        if self.check and (is_complete or self.count == 1):
            right = [
                any(own)
                for task, found in results.submitted(tasks, self.store.rankings(tasks)).items()
                for own in scoring.verdicts(found, self.known[task])
                if None not in own
            ]
            told = f"{sum(right)} of {len(right)} test inputs with a known answer solved"
            self.say(told if right else "no answer is known, so nothing is checked")
        if self.late:
            what = f"no time was left for {len(self.late)} tasks; their inputs are submitted"
            note(f"{what}; --resume with a longer --total-budget goes on")
        if self.failed:
            names = ", ".join(self.failed[:MOST_NAMED]) + ", ..." * (len(self.failed) > MOST_NAMED)
            told = f"{len(self.failed)} of {len(tasks)} tasks failed ({names})"
            again = "; --resume tries them again" if out is not None else ""
            raise ArctrmError(f"{told}, their inputs are submitted{again}")


def _start(count: int, config: SolveConfig, target: str, options: dict[str, Any]) -> None:
    """Solve in one process for each of `count` GPUs, and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    stopping = spawn.Event()
    given = (count, port, stopping, config, target, options)
    processes = [spawn.Process(target=_process, args=(rank, *given)) for rank in range(count)]
    for one in processes:
        one.start()
    while any(one.is_alive() for one in processes):
        try:
            for one in processes:
                one.join()
        except KeyboardInterrupt:
            stopping.set()
    codes = [one.exitcode for one in processes]
    if stopping.is_set() or Interrupted.exit_code in codes:
        raise KeyboardInterrupt(f"stopped; go on with --resume --out {config.out}")
    if any(codes):
        said = f"{sum(map(bool, codes))} of {count} processes failed; --resume answers the rest"
        raise ArctrmError(f"{said} in {config.out}")


def _process(
    rank: int, count: int, port: int, stopping: Any, config: SolveConfig, target: str, options: Any
) -> None:
    """The process number `rank`, as torchrun would start it; ends with the one that started it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, count, "127.0.0.1", port)), strict=True))
    parent = multiprocessing.parent_process()
    is_stopped = lambda: stopping.is_set() or not (parent and parent.is_alive())
    try:
        solve(config, target, **options, is_stopped=is_stopped)
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except ArctrmError as error:
        note(f"error: {error}")
        sys.exit(error.exit_code)
