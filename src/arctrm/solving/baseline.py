"""`arctrm baseline`: a language model alone answers a test set, task by task.

Answers are set aside before any model sees a task (`evaluate.load`); `scoring` compares with them
when a task's grids are fixed. Submission and scores are made from results.json, so a resumed run
ends as an uninterrupted one would.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arctrm.config import BaselineConfig
from arctrm.console import console, note, progress_console
from arctrm.data.task import Grid, Task
from arctrm.reader.hub_errors import check_name
from arctrm.solving import scoring
from arctrm.solving.answering import rank, say_what_is_unusual
from arctrm.solving.baseline_results import (
    SUBMISSION,
    AttemptRecord,
    CandidateRecord,
    Cells,
    InputRecord,
    ModelRecord,
    PromptRecord,
    Results,
    TaskRecord,
    TokenCounts,
    open_results,
)
from arctrm.solving.candidates import Key, by_key
from arctrm.solving.evaluate import load
from arctrm.solving.questions import (
    Advance,
    Answer,
    Question,
    Respondent,
    TinyRespondent,
    load_respondent,
    require_a_question,
    weights_fingerprint,
)
from arctrm.solving.reading import as_logit, judge, reranked, to_judge
from arctrm.solving.resuming import content_of
from arctrm.solving.submission import check_complete, submission, write_submission
from arctrm.solving.vote import Candidate, Ranked, attempts, submitted
from arctrm.training.provenance import run_record

Known = dict[str, list[Grid | None]]
"""Answers by task id."""


def run(config: BaselineConfig, path: Path, resume: bool) -> scoring.Scores | None:
    """Write results.json to `path` after every task, submission.json beside it; print the scores.

    Returns the scores, or None where no answer is known.

    Raises:
        UserError: tasks, model or `path` cannot be used.
        KeyboardInterrupt: when interrupted; what was answered is in the file.
    """
    tasks, known = load(config)
    results = open_results(path, config, tasks, resume)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    respondent = load_respondent(config, device)
    left = [task for task in tasks if task.id not in results.tasks]
    if left:
        require_a_question(respondent, left)
    results.begin(run_record(config), _model_record(respondent))
    if isinstance(respondent, TinyRespondent):
        say_what_is_unusual(respondent.solver, tasks, config)
    try:
        _answer_all(respondent, tasks, known, config, results)
    except KeyboardInterrupt:
        done = sum(task.id in results.tasks for task in tasks)
        raise KeyboardInterrupt(
            f"stopped after {done} of {len(tasks)} tasks, which are in {path}; go on with --resume"
        ) from None
    return _report(config, tasks, known, results, respondent.reader.device)


def _model_record(respondent: Respondent) -> ModelRecord:
    fingerprint = weights_fingerprint(respondent.weights)
    return ModelRecord(name=respondent.name, how=respondent.how, weights=fingerprint)


def _answer_all(
    respondent: Respondent,
    tasks: list[Task],
    known: Known,
    config: BaselineConfig,
    results: Results,
) -> None:
    """Answer every task that is not in the results yet."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=progress_console()) as progress:
        whole = progress.add_task("tasks", total=len(tasks))
        prompts = progress.add_task("prompts")
        told: Advance = lambda done: progress.advance(prompts, done)
        for task in tasks:
            if task.id not in results.tasks:
                total = config.views * len(task.test)
                progress.reset(prompts, total=total, description=escape(task.id))
                record = answer_task(respondent, task, known[task.id], config, told)
                results.add(task.id, record)
                for line in record.notes:
                    note(escape(line))
            progress.advance(whole)
        progress.remove_task(prompts)


def answer_task(
    respondent: Respondent,
    task: Task,
    known: list[Grid | None],
    config: BaselineConfig,
    advance: Advance = lambda done: None,
) -> TaskRecord:
    """Ask about every test input of a task (without answers); `known` is only compared with."""
    begin = time.monotonic()
    questions, refused = respondent.questions(task, config.views)
    answers = respondent.answers(questions, advance)
    ranked = _ranked(respondent, task, config, questions, answers)
    seconds = time.monotonic() - begin
    kept = [ranked[task.id, index][: config.attempts] for index in range(len(task.test))]
    correct = scoring.judge([[entry.grid for entry in own] for own in kept], known)
    said = [answer.note for several in answers for answer in several]
    notes = [*refused, *(question.note for question in questions), *said]
    new_tokens = sum(answer.new_tokens for several in answers for answer in several)
    return TaskRecord(
        content=content_of(task),
        seconds=round(seconds, 3),
        tokens=TokenCounts(
            prompt=sum(len(question.reading.prompt.tokens) for question in questions),
            new=new_tokens,
        ),
        notes=tuple(dict.fromkeys(line for line in notes if line)),
        test=tuple(
            InputRecord(
                prompts=_prompt_records((task.id, index), questions, answers),
                attempts=tuple(map(_attempt_record, own, right)),
            )
            for index, (own, right) in enumerate(zip(kept, correct, strict=True))
        ),
    )


def _ranked(
    respondent: Respondent,
    task: Task,
    config: BaselineConfig,
    questions: list[Question],
    answers: list[list[Answer]],
) -> dict[Key, list[Ranked]]:
    """The grids of each test input, best first: by votes, or by the model's log-probability."""
    found = by_key(
        (question.reading.key, Candidate(answer.grid, _confidence(answer), "reader"))
        for question, several in zip(questions, answers, strict=True)
        for answer in several
    )
    ranked, decoding = rank([task], found, config.seed), config.reader
    if decoding.rank == "votes":
        return ranked
    asked, _ = respondent.questions(task, decoding.scoring_views)
    readings = [question.reading for question in asked]
    grids = to_judge(ranked, decoding)
    return reranked(ranked, judge(respondent.reader, readings, grids, decoding))


def _confidence(answer: Answer) -> float:
    """As `eval` counts it; free text has none, so votes alone decide."""
    return 0.0 if answer.log_probability is None else as_logit(answer.log_probability)


def _prompt_records(
    key: Key, questions: list[Question], answers: list[list[Answer]]
) -> tuple[PromptRecord, ...]:
    return tuple(
        PromptRecord(
            dihedral=question.reading.view.dihedral,
            colours=question.reading.view.colours,
            prompt=question.text,
            prompt_tokens=len(question.reading.prompt.tokens),
            candidates=tuple(map(_candidate_record, several)),
        )
        for question, several in zip(questions, answers, strict=True)
        if question.reading.key == key
    )


def _candidate_record(answer: Answer) -> CandidateRecord:
    return CandidateRecord(
        text=answer.text,
        grid=None if answer.grid is None else _cells(answer.grid),
        new_tokens=answer.new_tokens,
        log_probability=_finite(answer.log_probability),
    )


def _attempt_record(entry: Ranked, correct: bool | None) -> AttemptRecord:
    return AttemptRecord(
        grid=_cells(entry.grid),
        votes=entry.votes,
        mean_q=_finite(entry.mean_q) or 0.0,
        reader_score=_finite(entry.reader_score),
        correct=correct,
    )


def _cells(grid: Grid) -> Cells:
    return tuple(map(tuple, grid.tolist()))


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _report(
    config: BaselineConfig, tasks: list[Task], known: Known, results: Results, device: torch.device
) -> scoring.Scores | None:
    """Write the submission, score what is known, say what it took."""
    records = [results.tasks[task.id] for task in tasks]
    _write_submission(results.path.with_name(SUBMISSION), tasks, records)
    seconds = sum(record.seconds for record in records) / len(records)
    prompt, new = (sum(getattr(r.tokens, kind) for r in records) for kind in ("prompt", "new"))
    kind = "GPU" if device.type == "cuda" else "CPU"
    written = escape(f"{results.path} and {SUBMISSION}")
    took = (
        f"{kind}-seconds per task: {seconds:.2f}; {prompt:,} tokens of prompts, {new:,} new; "
        f"written: {written}"
    )
    if not any(answer is not None for grids in known.values() for answer in grids):
        results.finish(None)
        note(f"no answers are known, so nothing is scored; {took}")
        return None
    predictions = {
        task.id: [
            submitted([_grid(attempt) for attempt in test.attempts], pair.input)
            for test, pair in zip(record.test, task.test, strict=True)
        ]
        for task, record in zip(tasks, records, strict=True)
    }
    scores = scoring.score(predictions, known)
    results.finish(scoring.scores_dict(scores, config.attempts))
    console().print(scoring.scores_table(scores, config.attempts))
    note(took)
    return scores


def _write_submission(path: Path, tasks: list[Task], records: list[TaskRecord]) -> None:
    """Two grids for every test input; the input itself where there is none."""
    content = submission(
        {
            task.id: [
                attempts([_entry(attempt) for attempt in test.attempts], pair.input)
                for test, pair in zip(record.test, task.test, strict=True)
            ]
            for task, record in zip(tasks, records, strict=True)
        }
    )
    check_complete(content, tasks)
    write_submission(path, content)


def _entry(attempt: AttemptRecord) -> Ranked:
    return Ranked(_grid(attempt), attempt.votes, attempt.mean_q, ("reader",))


def _grid(attempt: AttemptRecord) -> Grid:
    return np.array(attempt.grid, dtype=np.uint8)


def describe(config: BaselineConfig, path: Path, resume: bool) -> Table:
    """What `baseline` would run; a hub model is not loaded."""
    tasks, known = load(config)
    results = open_results(path, config, tasks, resume)
    if config.hub.name:
        check_name(config.hub.name)
        name = f"{config.hub.name}, prompt = {config.hub.prompt!r}"
    else:
        respondent = load_respondent(config, torch.device("cpu"))
        name = f"{respondent.name}, {respondent.how}"
    inputs = sum(len(task.test) for task in tasks)
    table = Table(title="baseline (dry run)", title_justify="left", show_header=False)
    table.add_row("model", escape(name))
    table.add_row("tasks, test inputs", f"{len(tasks)}, {inputs}")
    table.add_row("answered before", str(sum(task.id in results.tasks for task in tasks)))
    table.add_row("answers known", str(sum(a is not None for g in known.values() for a in g)))
    table.add_row("prompts", f"{inputs * config.views:,} ({config.views} views)")
    table.add_row("results", escape(str(path)))
    return table
