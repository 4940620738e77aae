"""`arctrm baseline`: a language model alone answers a test set, task by task, ranked by votes.

The tiny reader of a checkpoint, or a hub model that spells grids token by token or is asked in
plain language. All see a task as views show it; answers are turned back by the exact inverse. What
is answered is kept in <results>.unfinished.jsonl, from which the files are written in the end:

    results.json   config, model, scores, {task id: seconds, tokens, notes, prompts with what was
                   written, and for each test input the grids that were kept, best first}

Test outputs are set aside before any model sees a task; only `scoring` reads them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from arctrm.config import BaselineConfig, EvalConfig, InferenceConfig
from arctrm.console import console, note, plain, progress_console
from arctrm.data.task import Grid, Task
from arctrm.errors import CheckpointError, ConfigError, DataError
from arctrm.reader.grammar import END
from arctrm.reader.text import GridText, grid_text, parse_grid_text
from arctrm.solve import scoring
from arctrm.solve.propose import READER, Candidate, as_logit, by_key, prompt_of, write
from arctrm.solve.questions import Key, Question, keys_of, load_test_set, questions
from arctrm.solve.rank import rank
from arctrm.solve.results import (
    EVERYTHING,
    SUBMISSION,
    Store,
    as_record,
    from_records,
    open_store,
    write_submission,
)
from arctrm.solve.weights import Solver, Voices, load_solver, weights_fingerprint
from arctrm.system import disk_errors, write_bytes_atomically, write_run_record

RESULTS = "results.json"
CHAT_FACTOR, CHAT_EXTRA = 3, 128
"""An answer in plain language has at most so many times the tokens of the largest plausible grid,
and so many more."""
LOOK_EVERY = 16  # tokens between two looks at whether a grid is closed
Tasks = Sequence[Task]
Known = dict[str, list[Grid | None]]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model said to a question."""

    text: str
    """As it came, in the view's colours and orientation."""
    grid: Grid | None  # turned back
    new_tokens: int
    log_p: float | None = None
    """Of the grid (nats); None for free text, which votes alone rank."""


def baseline(
    config: BaselineConfig, *, resume: bool = False, dry_run: bool = False
) -> scoring.Scores | None:
    """Write results.json (`config.out`, or in this folder) and submission.json, print the scores
    and return them, where answers are known.

    With `resume`, answer what an interrupted run has left; with `dry_run`, only say what would be
    done. Raises UserError where tasks, model or folder cannot be used, and KeyboardInterrupt, which
    says how much is kept.
    """
    # 1. Tasks, what is answered already, and who answers.
    path = _results_path(config)
    tasks, known = load_test_set(config.evaluation)
    store = open_store(path.with_name(f"{path.stem}.unfinished.jsonl"), config, tasks, resume)
    if not resume and (path.exists() or path.with_name(SUBMISSION).exists()):
        raise DataError(f"{path}: holds the results of an earlier run; choose another --out")
    if dry_run:
        console().print(_table(config, tasks, known, store, path))
        return None
    solver = load_language_model(config)
    left = store.left(tasks)
    if left and not any(ask(solver, task, 1, config)[0] for task in left):
        raise ConfigError(ask(solver, left[0], 1, config)[1][0])
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_run_record(path.parent, config)
    store.begin(config, solver.name, weights_fingerprint(solver.model))
    for line in solver.notes_on(tasks, config.evaluation):
        note(plain(line))
    # 2. Task by task.
    try:
        _answer_all(solver, left, store, config)
    except KeyboardInterrupt:
        done = len(tasks) - len(store.left(tasks))
        raise KeyboardInterrupt(
            f"stopped after {done} of {len(tasks)} tasks, which are kept in {path.parent}; go on "
            "with --resume"
        ) from None
    # 3. Files and scores.
    return _report(solver, tasks, known, store, config, path)


def load_language_model(config: BaselineConfig) -> Solver:
    """The hub model that is named, else the reader of the checkpoint; nobody else answers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.hub.name:
        from arctrm.reader.hub_loading import load_hub_reader

        reader = load_hub_reader(config.hub, device)
        if config.hub.prompt == "chat" and config.max_new_tokens >= reader.max_tokens:
            raise ConfigError(
                f"max_new_tokens = {config.max_new_tokens} leaves no room for a prompt: "
                f"{reader.name} holds {reader.max_tokens} tokens; lower max_new_tokens"
            )
        only = Voices(reader, None, None)
        return Solver(
            only, reader.model, lambda _: only, {}, True, 0, reader.name, reads_pairs=True
        )
    solver = load_solver(config.checkpoint, InferenceConfig(views=config.views), device)
    if solver.reader is None or solver.reads_pairs:
        raise CheckpointError(
            f"{solver.name}: holds no tiny reader that answers alone; train one with "
            "`arctrm pretrain --config configs/pretrain_reader.toml` and give it with "
            "--checkpoint, or name a hub model with --model"
        )
    return replace(solver, speakers=Voices(solver.reader, None, None))


# ---- asking


def ask(
    solver: Solver, task: Task, views: int, config: BaselineConfig
) -> tuple[list[Question], list[str]]:
    """Questions about every test input, view by view, and why some cannot be asked: a query that is
    too long for the model.
    """
    found: list[Question] = []
    refused: list[str] = []
    for index, pair in enumerate(task.test):
        try:
            own = questions(solver, replace(task, test=(pair,)), views, config.seed)
            if config.hub.prompt == "chat":
                reader: Any = solver.reader
                own = [replace(q, prompt=reader.chat_prompt(q.query, q.pairs)) for q in own]
        except ConfigError as error:
            refused.append(f"task {task.id}, test input {index}: {error}")
        else:
            found += [replace(question, key=Key(task.id, index)) for question in own]
    return sorted(found, key=lambda one: (one.number, one.key)), refused


def answer_task(solver: Solver, task: Task, config: BaselineConfig) -> dict[str, Any]:
    """Ask about every test input of a task: its record, as results.json has it."""
    asked, notes = ask(solver, task, config.views, config)
    answers = (chat if config.hub.prompt == "chat" else spell)(solver, asked, config)
    notes += [getattr(question.prompt, "note", "") for question in asked]
    found = by_key(
        Candidate(q.key, a.grid, 0.0 if a.log_p is None else as_logit(a.log_p), READER, q.number)
        for q, a in zip(asked, answers, strict=True)
    )
    # The ranking of `eval`, but for the invariants, which are no work of the model.
    settings = EvalConfig(seed=config.seed, inference=InferenceConfig(invariant_weight=0.0))
    ranked = rank(solver, [task], found, settings)
    return {
        "prompt_tokens": sum(len(prompt_of(question).tokens) for question in asked),
        "new_tokens": sum(answer.new_tokens for answer in answers),
        "notes": [line for line in dict.fromkeys(notes) if line],
        "prompts": [_prompt_record(solver, *both) for both in zip(asked, answers, strict=True)],
        **as_record(task, {key: own[: config.attempts] for key, own in ranked.items()}),
    }


def spell(solver: Solver, asked: Sequence[Question], config: BaselineConfig) -> list[Answer]:
    """Grids written token by token, in their grammar."""
    assert solver.reader is not None
    text = GridText(solver.reader)
    done = write(solver.reader, asked, batch_size=config.batch_size)
    found = []
    for question, one in zip(asked, done, strict=True):
        shown = text.text_of([choice for choice in one.choices if choice != END])
        grid = question.turned_back(one.grid)
        found.append(Answer(shown, grid, one.num_tokens, one.log_probability))
    return found


@torch.no_grad()
def chat(solver: Solver, asked: Sequence[Question], config: BaselineConfig) -> list[Answer]:
    """Free text, greedily, until a grid is closed."""
    from arctrm.reader.hub import HubStore

    hub: Any = solver.reader
    ends = (hub.tokenizer.eos_token_id, hub.model.generation_config.eos_token_id)
    stops = {i for end in ends for i in (end if isinstance(end, list) else [end])}
    decode = partial(hub.tokenizer.decode, skip_special_tokens=True)
    size, found = config.batch_size or hub.batch_rows, {}
    order = sorted(range(len(asked)), key=lambda i: len(prompt_of(asked[i]).tokens))
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        prompts = [prompt_of(asked[i]) for i in batch]
        store, left = HubStore(hub, prompts), hub.max_tokens - max(len(p.tokens) for p in prompts)
        most = min(config.max_new_tokens, left)
        bounds = [min(most, CHAT_FACTOR * asked[i].room + CHAT_EXTRA) for i in batch]
        new: list[list[int]] = [[] for _ in batch]
        last = store.read_states()
        there = np.ones((len(batch), 1), dtype=bool)
        while there.any():
            chosen = hub.logits(last).argmax(-1)
            for row in np.flatnonzero(there):
                token = int(chosen[row])
                new[row] += [] if token in stops else [token]
                over = token in stops or len(new[row]) >= bounds[row]
                look = len(new[row]) % LOOK_EVERY == 0
                there[row] = not (over or (look and is_closed(decode(new[row]))))
            if there.any():
                last = store.append_states(chosen[:, None], there)[:, 0]
        for i, tokens in zip(batch, new, strict=True):
            text = decode(tokens)
            found[i] = Answer(text, asked[i].turned_back(parse_grid_text(text)), len(tokens))
    return [found[i] for i in range(len(asked))]


def is_closed(text: str) -> bool:
    """Whether a text has a grid and goes on behind it: the answer is written. What a model thinks
    aloud before is no answer.
    """
    if "<think>" in text and "</think>" not in text:
        return False
    *lines, last = text.rpartition("</think>")[2].split("\n")
    ends = bool(last.strip(" ,|[]0123456789")) or (not last and lines[-1:] == [""])
    return ends and parse_grid_text("\n".join(lines)) is not None


# ---- results


def _answer_all(solver: Solver, left: Tasks, store: Store, config: BaselineConfig) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=progress_console()) as progress:
        bar = progress.add_task("tasks", total=len(left))
        for task in left:
            begin = time.monotonic()
            record = answer_task(solver, task, config)
            store.add(EVERYTHING, [(task, record)], time.monotonic() - begin)
            for line in record["notes"]:
                note(plain(line))
            progress.advance(bar)


def _prompt_record(solver: Solver, question: Question, answer: Answer) -> dict[str, Any]:
    prompt, spelling = prompt_of(question), getattr(solver.reader, "tokenizer", None)
    text = getattr(prompt, "text", "") or (spelling and spelling.decode(prompt.tokens.tolist()))
    return {
        "test": question.key.index,
        "dihedral": question.view.dihedral,
        "colours": list(question.view.colours),
        "prompt": text or f"input\n{grid_text(question.query)}\noutput\n",
        "text": answer.text,
        "grid": None if answer.grid is None else answer.grid.tolist(),
        "new_tokens": answer.new_tokens,
        "log_probability": answer.log_p,
    }


def _report(
    solver: Solver, tasks: Tasks, known: Known, store: Store, config: BaselineConfig, path: Path
) -> scoring.Scores | None:
    """Write the submission, score what is known, say what it took."""
    records = {task.id: store.rows[EVERYTHING][task.id] for task in tasks}
    kept = from_records(records.values())
    write_submission(path.parent, tasks, kept)
    scores = None
    if scoring.num_known(known):
        found: dict[str, list[list[Grid]]] = {}
        for task in tasks:
            for key, pair in zip(keys_of([task]), task.test, strict=True):
                own = [one.grid for one in kept[key]] or [pair.input]
                found.setdefault(task.id, []).append(own)
        scores = scoring.score(found, known)
    content = {
        "config": config.model_dump(mode="json"),
        "model": {"name": solver.name, "weights": store.head["weights"]},
        "scores": scores and scoring.scores_dict(scores, config.attempts),
        "tasks": records,
    }
    write_bytes_atomically(path, (json.dumps(content) + "\n").encode())
    store.finish(tasks)
    if scores is not None:
        console().print(scoring.scores_table(scores, config.attempts))
    kinds = ("seconds", "prompt_tokens", "new_tokens")
    seconds, prompt, new = (sum(own[kind] for own in records.values()) for kind in kinds)
    said = "" if scores else "no answers are known, so nothing is scored; "
    took = f"seconds per task: {seconds / len(tasks):.2f}; {prompt:,} prompt tokens, {new:,} new"
    note(f"{said}{took}; written: {plain(path)}")
    return scores


def _results_path(config: BaselineConfig) -> Path:
    if config.out is None:
        raise ConfigError("out: names no file for the results; give --out")
    path = config.out if config.out.suffix == ".json" else config.out / RESULTS
    if path.name == SUBMISSION or (path.parent / "checkpoints").is_dir():
        what = "the submission" if path.name == SUBMISSION else "the checkpoints of a training run"
        raise DataError(f"{path}: is where {what} goes; choose another --out")
    return path


def _table(config: BaselineConfig, tasks: Tasks, known: Known, store: Store, path: Path) -> Table:
    """What `baseline` would run; no model is loaded."""
    inputs, how = sum(len(task.test) for task in tasks), config.hub.prompt
    named = f"{config.hub.name}, prompt = {how!r}" if config.hub.name else config.checkpoint
    table = Table(title="baseline (dry run)", title_justify="left", show_header=False)
    for row in (
        ("model", plain(named or "bundled weights")),
        ("tasks, test inputs", f"{len(tasks)}, {inputs}"),
        ("answered before", str(len(tasks) - len(store.left(tasks)))),
        ("answers known", str(scoring.num_known(known))),
        ("prompts", f"{inputs * config.views:,} ({config.views} views)"),
        ("results", plain(path)),
    ):
        table.add_row(*row)
    return table
