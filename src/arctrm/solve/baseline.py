"""`arctrm baseline`: a language model alone answers a test set, task by task, ranked by votes.

The tiny reader of a checkpoint, a hub model that spells grids token by token or is asked in plain
language, or a server (`solve.server`). results.json has config, model, scores, {task id: seconds,
tokens, notes, prompts with what was written, and for each test input the grids that were kept, best
first}; until then answers are in <results>.unfinished.jsonl. Test outputs are set aside before a
model sees a task.
"""

import json
import re
import time
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from math import isinf
from typing import Any, cast

import torch
from rich.progress import track
from torch import nn

from arctrm.config import BaselineConfig, EvalConfig, InferenceConfig
from arctrm.console import console, dry_run_table, note, progress_console
from arctrm.data.task import MAX_SIDE, Task
from arctrm.errors import CheckpointError, ConfigError, DataError
from arctrm.reader.grammar import END
from arctrm.reader.hub_prompts import chat_text
from arctrm.reader.text import GridText, grid_text, parse_grid_text
from arctrm.solve import scoring
from arctrm.solve.propose import READER, Candidate, as_logit, by_key, prompt_of, write
from arctrm.solve.questions import Key, Question, load_test_set, questions
from arctrm.solve.rank import rank
from arctrm.solve.results import (
    EVERYTHING,
    SUBMISSION,
    as_record,
    from_records,
    open_store,
    predictions,
    write_submission,
)
from arctrm.solve.weights import Solver, Voices, load_solver, weights_fingerprint
from arctrm.system import hold, write_bytes_atomically, write_run_record

# A chat answer has at most so many times the tokens of the largest plausible grid, and so many
# more; after every few it is looked at whether its grid is closed.
CHAT_FACTOR, CHAT_EXTRA, LOOK_EVERY = 3, 128, 16
ROW = r"[\s,|\[\]]*\d[\d\s,|\[\]]*"
Said = namedtuple("Said", "text grid prompt_tokens new_tokens log_probability note")


def baseline(
    config: BaselineConfig, *, resume: bool = False, dry_run: bool = False
) -> scoring.Scores | None:
    """Write results.json (`config.out`, or in this folder) and submission.json; print and return
    the scores where answers are known. `resume`: answer what an interrupted run has left.
    """
    # 1. Tasks, what is answered already, and who answers.
    if config.out is None:
        raise ConfigError("out: names no file for the results; give --out")
    path = config.out if config.out.suffix == ".json" else config.out / "results.json"
    if path.name == SUBMISSION or (path.parent / "checkpoints").is_dir():
        raise DataError(f"{path}: the submission or a training run is there; choose another --out")
    tasks, known = load_test_set(config.evaluation)
    unfinished = path.with_name(f"{path.stem}.unfinished.jsonl")
    store = open_store(unfinished, config, tasks, resume, (path.name, SUBMISSION))
    if dry_run:
        inputs = sum(len(task.test) for task in tasks)
        rows = {
            "model": config.hub.name or config.checkpoint or "bundled weights",
            "tasks, test inputs": f"{len(tasks)}, {inputs}",
            "answered before": len(tasks) - len(store.left(tasks)),
            "answers known": scoring.num_known(known),
            "prompts": f"{inputs * config.views:,} ({config.views} views, {config.hub.prompt})",
            "results": path,
        }
        console().print(dry_run_table("baseline", rows))
        return None
    solver = load_language_model(config)
    left = store.left(tasks)
    if left and not any(ask(solver, task, config)[0] for task in left):
        raise ConfigError(ask(solver, left[0], config)[1][0])
    store.held = hold(path.parent)
    write_run_record(path.parent, config)
    store.begin(config, solver.name, weights_fingerprint(solver.model))
    if (
        not config.server
        and config.hub.name
        and (config.hub.mode, config.hub.dtype) == ("frozen", "auto")
    ):
        from arctrm.reader.hub import halve_linear_layers

        halve_linear_layers(cast(Any, solver.reader))
    for line in solver.notes_on(tasks, config.evaluation):
        note(line)
    # 2. Task by task.
    try:
        for task in track(left, "answering", console=progress_console()):
            begin = time.monotonic()
            record = answer_task(solver, task, config)
            store.add(EVERYTHING, [(task, record)], time.monotonic() - begin)
            for line in record["notes"]:
                note(line)
    except KeyboardInterrupt:
        done = len(tasks) - len(store.left(tasks))
        kept = f"stopped after {done} of {len(tasks)} tasks, which are kept in {path.parent}"
        raise KeyboardInterrupt(f"{kept}; go on with --resume") from None
    # 3. Files and scores.
    records = {task.id: store.rows[EVERYTHING][task.id] for task in tasks}
    ranked = from_records(records.values())
    write_submission(path.parent, tasks, ranked)
    found = predictions(tasks, ranked)
    scores = scoring.score(found, known) if scoring.num_known(known) else None
    if scores is not None:
        console().print(scoring.scores_table(scores, config.attempts))
    content = {
        "config": config.model_dump(mode="json"),
        "model": {"name": solver.name, "weights": store.head["weights"]},
        "scores": scores and scoring.scores_dict(scores, config.attempts),
        "tasks": records,
    }
    write_bytes_atomically(path, (json.dumps(content) + "\n").encode())
    store.finish(tasks)
    total = lambda kind: sum(own.get(kind, 0) for own in records.values())
    said = "" if scores else "no answers are known, so nothing is scored; "
    said += f"seconds per task: {total('seconds') / len(tasks):.2f}; {total('prompt_tokens'):,} "
    note(f"{said}prompt tokens, {total('new_tokens'):,} new; written: {path}")
    return scores


def load_language_model(config: BaselineConfig) -> Solver:
    """The server or hub model that is named, else the reader of the checkpoint; nobody else."""
    if config.server:
        name = f"{config.hub.name} at {config.server}"
        none = Voices(None, None, None)
        return Solver(none, nn.Module(), lambda _: none, {}, True, 0, name, reads_pairs=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.hub.name:
        from arctrm.reader.hub_loading import load_hub_reader

        reader = load_hub_reader(config.hub, device)
        only, name = Voices(reader, None, None), reader.name
        return Solver(only, reader.model, lambda _: only, {}, True, 0, name, reads_pairs=True)
    solver = load_solver(config.checkpoint, InferenceConfig(views=config.views), device)
    if solver.reader is None or solver.reads_pairs:
        told = "holds no tiny reader that answers alone; name a hub model with --model"
        raise CheckpointError(f"{solver.name}: {told}")
    return replace(solver, speakers=Voices(solver.reader, None, None))


def ask(solver: Solver, task: Task, config: BaselineConfig) -> tuple[list[Question], list[str]]:
    """Questions about every test input, view by view, and why a query too long is not asked."""
    found, refused = [], []
    for index, pair in enumerate(task.test):
        try:
            own = questions(solver, replace(task, test=(pair,)), config.views, config.seed)
            if config.hub.prompt == "chat" and not config.server:
                reader: Any = solver.reader
                own = [replace(q, prompt=reader.chat_prompt(q.query, q.pairs)) for q in own]
        except ConfigError as error:
            refused.append(f"task {task.id}, test input {index}: {error}")
        else:
            found += [replace(question, key=Key(task.id, index)) for question in own]
    return sorted(found, key=lambda one: (one.number, one.key)), refused


def answer_task(solver: Solver, task: Task, config: BaselineConfig) -> dict[str, Any]:
    """Ask about every test input of a task: its record, as results.json has it."""
    asked, notes = ask(solver, task, config)
    if config.server:
        answers = serve(asked, config)
    else:
        answers = (chat if config.hub.prompt == "chat" else spell)(solver, asked, config)
    candidates, prompts = [], []
    decode = getattr(getattr(solver.reader, "tokenizer", None), "decode", None)
    for question, said in zip(asked, answers, strict=True):
        grid, log_p = question.turned_back(said.grid), said.log_probability
        q = 0.0 if log_p is None else as_logit(log_p)
        candidates.append(Candidate(question.key, grid, q, READER, question.number))
        view, index = question.view, question.key.index
        if question.prompt is None:
            prompt = chat_text(question.query, question.pairs, " ")
        elif decode:
            prompt = decode(question.prompt.tokens.tolist())
        else:
            prompt = f"input\n{grid_text(question.query)}\noutput\n"
        notes += [f"task {task.id}, test input {index}: {said.note}"] if said.note else []
        where: Any = {"test": index, "dihedral": view.dihedral, "prompt": prompt}
        more = {"colours": list(view.colours), "grid": None if grid is None else grid.tolist()}
        more["log_probability"] = None if log_p is None or isinf(log_p) else log_p
        prompts.append(where | said._asdict() | more)
    # The ranking of `eval`, but for the invariants, which are no work of the model.
    settings = EvalConfig(seed=config.seed, inference=InferenceConfig(invariant_weight=0.0))
    ranked = rank(solver, [task], by_key(candidates), settings)
    return {
        "prompt_tokens": sum(said.prompt_tokens for said in answers),
        "new_tokens": sum(said.new_tokens for said in answers),
        "notes": notes,
        "prompts": prompts,
        **as_record(task, {key: own[: config.attempts] for key, own in ranked.items()}),
    }


def spell(solver: Solver, asked: Sequence[Question], config: BaselineConfig) -> list[Said]:
    """Grids written token by token, in their grammar."""
    reader: Any = solver.reader
    spelt = lambda one: GridText(reader).text_of([c for c in one.choices if c != END])
    return [
        Said(
            spelt(one), one.grid, len(prompt_of(q).tokens), one.num_tokens, one.log_probability, ""
        )
        for q, one in zip(asked, write(reader, asked, batch_size=config.batch_size), strict=True)
    ]


def chat(solver: Solver, asked: Sequence[Question], config: BaselineConfig) -> list[Said]:
    """Free text, greedily, until a grid is closed."""
    from arctrm.reader.text_module import HubText

    hub: Any = solver.reader
    texts = HubText(hub)
    over = lambda own: len(own) % LOOK_EVERY == 0 and is_closed(texts.text_of(own))
    size, found = config.batch_size or hub.batch_rows, {}
    order = sorted(range(len(asked)), key=lambda i: len(prompt_of(asked[i]).tokens))
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        prompts = [prompt_of(asked[i]) for i in batch]
        left = hub.max_tokens - max(len(prompt.tokens) for prompt in prompts)
        most = min(config.max_new_tokens, left)
        bounds = [min(most, CHAT_FACTOR * asked[i].room + CHAT_EXTRA) for i in batch]
        new = texts.write(prompts, None, bounds, over)
        for i, prompt, tokens in zip(batch, prompts, new, strict=True):
            text = texts.text_of(tokens)
            read = len(prompt.tokens)
            found[i] = Said(text, parse_grid_text(text), read, len(tokens), None, "")
    return [found[i] for i in range(len(asked))]


def serve(asked: Sequence[Question], config: BaselineConfig) -> list[Said]:
    """Free text of a server."""
    from arctrm.solve.server import Server

    replies = Server(config).answer([chat_text(one.query, one.pairs, " ") for one in asked])
    grid = lambda text: parse_grid_text(text.rpartition("</think>")[2])
    return [
        Said(r.text, grid(r.text), r.prompt_tokens, r.new_tokens, None, r.note) for r in replies
    ]


def is_closed(text: str) -> bool:
    """Whether a text has a grid, outside of what a model thinks aloud, and goes on behind it; or
    ends with more rows than a grid may have.
    """
    if "<think>" in text and "</think>" not in text:
        return False
    *lines, last = text.rpartition("</think>")[2].split("\n")
    if len(lines) > MAX_SIDE and all(re.fullmatch(ROW, line) for line in lines[-MAX_SIDE - 1 :]):
        return True
    ends = bool(last.strip(" ,|[]0123456789")) or (not last and lines[-1:] == [""])
    return ends and parse_grid_text("\n".join(lines)) is not None
