"""`arctrm eval`: answer a test set with one set of weights, rank, then score.

Answers are set aside before any model sees a task; only `arctrm.solve.scoring` reads them. In the
order of the run: (1) tasks, weights, and what is answered already; (2) questions, shared by all
processes, written by the reader and refined by TRM; (3) a ranking for everything, and one for each
ablation; (4) submission.json, scores.json, a table, a page. With `submission` a file that was
written before is scored, without a model.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from arctrm.config import EvalConfig
from arctrm.console import console, dry_run_table, note, progress_console
from arctrm.data.parse import load_json
from arctrm.data.task import Grid, Task
from arctrm.errors import ConfigError, DataError
from arctrm.solve import results, scoring
from arctrm.solve.propose import Advance, Candidate, by_key, refine, to_refine, write, written
from arctrm.solve.questions import Key, Question, all_questions, keys_of, load_test_set
from arctrm.solve.rank import Grids, Ranked, Scores, judged, rank
from arctrm.solve.report import write_gallery
from arctrm.solve.results import EVERYTHING, Store
from arctrm.solve.weights import Solver, load_solver, weights_fingerprint
from arctrm.system import LOCK, new_accelerator, write_bytes_atomically

PROMPTS_AT_ONCE, OF_A_HUB_MODEL = 64, 1024
"""Prompts of a part of the tasks, some batches: of a CPU, and of a hub model on a GPU."""
SCORES, ABLATIONS = "scores.json", "ablations.json"
FINISHED = (SCORES, results.SUBMISSION)  # files that an evaluation leaves when it ends


def evaluate(
    config: EvalConfig,
    *,
    solver: Solver | None = None,
    resume: bool = False,
    dry_run: bool = False,
    report: Path | None = None,
) -> scoring.Scores | None:
    """Write scores.json, submission.json and config.json to `config.out`; print the score table.

    `solver` answers instead of `config.checkpoint`. With `resume`, answer what an interrupted
    evaluation has left; with `dry_run`, only print what would be done; `report` is the file of a
    page to look at. Returns the scores; None where no answer is known (the submission is written
    all the same), after a dry run, and in all processes but the main one.
    """
    # 1. Tasks, weights, and what is answered already. Every process reads before any writes.
    if (out := config.out) is None:
        raise ConfigError("out: names no folder for scores.json and submission.json; give --out")
    if config.submission is not None:
        return _score_submission(config, config.submission, out, dry_run, report)
    tasks, known = load_test_set(config.evaluation)
    accelerator = new_accelerator()
    store = results.open_store(out / results.UNFINISHED, config, tasks, resume, FINISHED)
    solver = solver or load_solver(config.checkpoint, config.inference, accelerator.device)
    rows = (EVERYTHING, *config.evaluation.ablate)
    if len(rows) > 1 and not solver.speaks_both:
        voices = ", ".join(solver.voices)
        raise ConfigError(f"evaluation.ablate: {solver.name} has only {voices}; leave nothing out")
    if "other-context" in rows and (not solver.reads_pairs or len(tasks) < 2):
        raise ConfigError(
            "evaluation.ablate: other-context shows a hub model another task's demonstrations; "
            "it needs a checkpoint with a hub model, and two tasks"
        )
    run = _Run(config, solver, accelerator, tasks, known, store, rows, out, report)
    if dry_run:
        run.print_plan()
        return None
    accelerator.wait_for_everyone()
    is_main = accelerator.is_main_process
    if is_main:
        store.held = results.open_folder(out, config, (ABLATIONS, results.CANDIDATES))
        for line in solver.notes_on(tasks, config.evaluation):
            note(line)
    store.begin(config, solver.name, weights_fingerprint(solver.model), writes=is_main)
    # 2. and 3. Part by part; what is ranked is kept.
    try:
        parts = run.parts()
        for part in parts:
            for row, records, seconds in run.answer(part, many=len(parts) > 1):
                store.add(row, records, seconds)
            if len(parts) > 1 and is_main:
                left = len(store.left(tasks, rows))
                note(f"answered: {len(tasks) - left} of {len(tasks)} tasks")
    except KeyboardInterrupt:
        if not (done := len(tasks) - len(store.left(tasks))):
            raise
        kept = f"stopped after {done} of {len(tasks)} tasks, which are kept in {out}"
        raise KeyboardInterrupt(f"{kept}; go on with --resume") from None
    # 4. Scores.
    accelerator.end_training()
    if not is_main:
        return None
    scores = run.report()
    store.finish(tasks)
    return scores


@dataclass(eq=False)
class _Run:
    """An evaluation, by one of the processes that answer together."""

    config: EvalConfig
    solver: Solver
    accelerator: Accelerator
    tasks: list[Task]
    known: scoring.Answers
    store: Store
    rows: Sequence[str]
    out: Path
    page: Path | None  # to look at
    many: bool = False  # are there parts: finished bars would fill the screen, and go

    def parts(self) -> list[list[Task]]:
        """What is left, in tasks that are answered together: all at once by a trunk on a GPU, else
        some prompts at a time, the largest first (what does not fit should say so at once).
        """
        tasks = self.store.left(self.tasks, self.rows)
        on_gpu = self.solver.device.type == "cuda"
        some = OF_A_HUB_MODEL if on_gpu else PROMPTS_AT_ONCE
        quick = on_gpu and not self.solver.reads_pairs
        size = len(tasks) if quick else some // self.config.inference.views
        ordered = sorted(tasks, key=lambda task: -sum(pair.input.size for pair in task.test))
        return [ordered[i : i + max(1, size)] for i in range(0, len(ordered), max(1, size))]

    def answer(
        self, tasks: list[Task], many: bool
    ) -> Iterator[tuple[str, list[tuple[Task, dict[str, Any]]], float]]:
        """For each row that lacks tasks: its name, the record of each task, process-seconds."""
        config, solver, began, self.many = self.config, self.solver, time.monotonic(), many
        mine = self.share(all_questions(solver, tasks, config.inference.views, config.seed))
        read: list[Candidate] = []
        drafts, reader = None, solver.reader
        if reader is not None:
            size = config.judge.batch_size
            say = lambda told: write(reader, mine, batch_size=size, advance=told)
            texts = self.work("reading", len(mine), say)
            read, drafts = written(mine, texts), [text.grid for text in texts]
        deaf: list[Candidate] | None = None  # what TRM says that hears nothing
        for row in self.rows:
            if self.store.has(row, tasks):
                continue
            if row in ("no-reader", "no-coupling") and deaf is None:
                deaf = self.refine(mine, None)
            own = deaf or []
            if row == EVERYTHING:
                own = self.refine(mine, drafts)
            elif row == "other-context":
                own = self.refine(self.misled(mine), drafts)
            found = [*(read if row != "no-reader" else ()), *(own if row != "no-trm" else ())]
            candidates = by_key(self.gathered(found))
            judge = None if reader is None or row == "no-reader" else self.judge
            ranked = rank(solver, tasks, candidates, config, judge)
            seconds = (time.monotonic() - began) * self.accelerator.num_processes
            began = time.monotonic()
            yield row, [(task, _record(task, candidates, ranked)) for task in tasks], seconds

    def refine(self, mine: Sequence[Question], drafts: list[Grid | None] | None) -> list[Candidate]:
        """TRM's candidates; without drafts of TRM alone."""
        voices, chosen = self.solver.speakers, self.config.inference
        refiner = voices.alone if drafts is None else voices.refiner
        if refiner is None:
            return []
        first = [one.number < self.solver.trm_views(chosen) for one in mine]
        mine, drafts = [*compress(mine, first)], drafts and [*compress(drafts, first)]
        options: Any = {"num_steps": chosen.steps, "tokens_per_batch": chosen.tokens_per_batch}
        say = lambda told: refine(refiner, mine, drafts, **options, advance=told)
        return self.work("refining", len(to_refine(mine, drafts)), say)

    def misled(self, mine: Sequence[Question]) -> list[Question]:
        """Questions with the demonstrations of the next task, which a hub model reads for TRM."""
        ids = [task.id for task in self.tasks]
        following = dict(zip(ids, self.tasks[1:] + self.tasks[:1], strict=True))
        shown = ((q, following[q.key.task].demonstrations) for q in mine)
        return [replace(q, pairs=tuple(map(q.view.apply_pair, pairs))) for q, pairs in shown]

    def judge(self, questions: Sequence[Question], grids: Grids) -> Scores:
        """All processes as one `rank.Judge`."""
        mine, reader, size = self.share(questions), self.solver.reader, self.config.judge.batch_size
        assert reader is not None
        inverse = bool(questions) and questions[0].condition.inverse
        say = lambda told: judged(reader, mine, grids, batch_size=size, advance=told)
        return self.gathered(self.work("judging inputs" if inverse else "judging", len(mine), say))

    def share(self, items: Sequence) -> Sequence:
        """This process's part of `items`."""
        count, number = self.accelerator.num_processes, self.accelerator.process_index
        return items[len(items) * number // count : len(items) * (number + 1) // count]

    def work(self, what: str, total: int, work: Callable[[Advance], list]) -> list:
        """What this process makes of its `total` items, with a progress bar on the main one."""
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        screen = progress_console()
        hidden = not self.accelerator.is_main_process or (self.many and not screen.is_terminal)
        with Progress(*columns, console=screen, disable=hidden, transient=self.many) as progress:
            bar = progress.add_task("", total=total)
            return work(lambda done: progress.advance(bar, done))

    def gathered(self, found: list) -> list:
        """What all processes found."""
        return gather_object(found) if self.accelerator.num_processes > 1 else found

    @property
    def max_steps(self) -> int | None:
        """Supervision steps of TRM, where there is one."""
        refiner = self.solver.refiner
        return None if refiner is None else self.config.inference.steps or refiner.halt_max_steps

    def report(self) -> scoring.Scores | None:
        """Write what came out, and print it."""
        config, solver, tasks, out = self.config, self.solver, self.tasks, self.out
        records = {row: [self.store.rows[row][task.id] for task in tasks] for row in self.rows}
        ranked = {row: results.from_records(own) for row, own in records.items()}
        results.write_submission(out, tasks, ranked[EVERYTHING])
        if config.evaluation.keep_candidates:
            results.write_candidates(out / results.CANDIDATES, tasks, ranked[EVERYTHING])
        content = {
            "checkpoint": solver.name,
            "voices": solver.voices,
            "views": config.inference.views,
            "steps": self.max_steps,
        }
        if not scoring.num_known(self.known):
            if self.page is not None:
                write_gallery(self.page, content, tasks, ranked[EVERYTHING], self.known)
            note(f"no answers are known: nothing is scored, the submission is in {out}")
            return None
        scores = {
            row: scoring.score(results.predictions(tasks, own), self.known)
            for row, own in ranked.items()
        }
        everything, done = scores[EVERYTHING], records[EVERYTHING]
        per_task = sum(record["seconds"] for record in done) / len(tasks)
        steps, answers = (
            sum(record.get("trm_steps", (0, 0))[i] for record in done) for i in (0, 1)
        )
        content |= {
            "avg_trm_steps": steps / answers if answers else None,
            "judge": config.judge.model_dump() if solver.reader is not None else None,
            "seed": config.seed,
            "device": str(solver.device),
            "seconds_per_task": per_task,
        }
        _write_scores(out, content, everything)
        by_row = {row: scoring.scores_dict(one) for row, one in scores.items()}
        if len(self.rows) > 1:
            _write_json(out / ABLATIONS, by_row)
            console().print(scoring.comparison_table(scores))
        if self.page is not None:
            write_gallery(self.page, content, tasks, ranked[EVERYTHING], self.known, by_row)
        kind = "GPU" if solver.device.type == "cuda" else "CPU"
        note(f"{kind}-seconds per task: {per_task:.2f}; written to {out}")
        return everything

    def print_plan(self) -> None:
        """What would be done."""
        inputs, views = sum(len(task.test) for task in self.tasks), self.config.inference.views
        rows = {
            "checkpoint": self.solver.name,
            "voices": ", ".join(self.solver.voices),
            "tasks, test inputs": f"{len(self.tasks)}, {inputs}",
            "answered before": len(self.tasks) - len(self.store.left(self.tasks)),
            "in the id map": sum(self.solver.row_of(t) is not None for t in self.tasks),
            "answers known": scoring.num_known(self.known),
            "questions": f"{inputs * views:,} ({views} views)",
            "supervision steps": self.max_steps or "none",
        }
        console().print(dry_run_table("eval", rows))


def _record(
    task: Task, candidates: Mapping[Key, list[Candidate]], ranked: results.Rankings
) -> dict[str, Any]:
    found = [one.steps for key in keys_of([task]) for one in candidates.get(key, ())]
    steps = [count for count in found if count is not None]
    return {"trm_steps": [sum(steps), len(steps)], **results.as_record(task, ranked)}


def _score_submission(
    config: EvalConfig, given: Path, out: Path, dry_run: bool, page: Path | None
) -> scoring.Scores | None:
    """Score a submission, as in a competition; tasks that it does not answer are not solved. The
    page shows what else the folder of an evaluation has: candidates, ablations.
    """
    results.refuse_finished(out, [SCORES])
    tasks, known = load_test_set(config.evaluation)
    path = given / results.SUBMISSION if given.is_dir() else given
    content, test_set = results.read_submission(path), config.evaluation.test_set
    found = {task.id: content[task.id] for task in tasks if task.id in content}
    wrong = [t.id for t in tasks if len(found.get(t.id, t.test)) != len(t.test)]
    if not found or wrong:
        what = f"has other test inputs of {wrong[0]}" if wrong else "answers none of the tasks"
        raise DataError(f"{path}: {what}; give its own evaluation.test_set, not {test_set}")
    if dry_run:
        rows = {"submission": given, "tasks, answered there": f"{len(tasks)}, {len(found)}"}
        console().print(dry_run_table("eval", rows | {"answers known": scoring.num_known(known)}))
        return None
    best: Any = {name: [[Ranked(g, 0, 0.0) for g in own] for own in v] for name, v in found.items()}
    by_row: Any = None
    if page is not None and (kept := path.with_name(results.CANDIDATES)).is_file():
        best = results.read_candidates(kept)
    if page is not None and (kept := path.with_name(ABLATIONS)).is_file():
        by_row = load_json(kept)
    scores = scoring.score(found, known)
    told = {"submission": str(given), "test_set": test_set}
    with results.open_folder(out, config, (ABLATIONS, results.CANDIDATES)):
        _write_scores(out, told, scores, scoring.ATTEMPTS)
    (out / LOCK).unlink(missing_ok=True)
    if page is not None:
        own = {
            Key(name, i): grids for name, inputs in best.items() for i, grids in enumerate(inputs)
        }
        write_gallery(page, told, tasks, own, known, by_row)
    missing = len(tasks) - len(found)
    rest = f"; {missing} of {len(tasks)} tasks are not in the submission: not solved"
    note(f"written to {out}{rest if missing else ''}")
    return scores


def _write_scores(
    out: Path, told: Mapping[str, Any], scores: scoring.Scores, most: int = scoring.PASSES[-1]
) -> None:
    _write_json(out / SCORES, {**told, **scoring.scores_dict(scores, most)})
    console().print(scoring.task_table(scores), scoring.scores_table(scores, most))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_bytes_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
