"""What `baseline` asks of a language model, and what it answers: one task, many views.

Three kinds of respondent: the tiny reader and a hub model that spell grids token by token, and a
hub model that is asked in plain language and answers freely. All see the task as views show it; the
answers are turned back by the exact inverse. No test output is read here.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from arctrm.config import BaselineConfig, DecodingConfig, InferenceConfig
from arctrm.data.task import Grid, Task
from arctrm.data.views import View, distinct_views, fixed_colours
from arctrm.errors import CheckpointError, ConfigError
from arctrm.reader.grid_text import parse_grid_text
from arctrm.reader.hub import HubReader
from arctrm.reader.hub_loading import load_hub_reader
from arctrm.reader.interface import GridReader
from arctrm.reader.prompts import chat_prompt, task_prompt
from arctrm.reader.rows import by_length, memory_guard, split
from arctrm.reader.text_module import TextReasoningModule
from arctrm.reader.tiny_text import TinyText
from arctrm.reader.tokens import SEPARATOR
from arctrm.solving.reading import (
    Reading,
    batch_size,
    output_room,
    propose,
    task_readings,
    turned_back,
)
from arctrm.solving.weights import Solver, load_solver

HASHED_VALUES = 16
"""Values of each tensor that identify a model."""

Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Question:
    """One test input under one view, as a model is asked for it."""

    reading: Reading
    text: str
    """The whole prompt."""
    note: str = ""
    """What had to be left out of it."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model said to a question."""

    text: str
    """As it came, in the view's colours and orientation."""
    grid: Grid | None
    """Turned back; None where there is none, or where it only repeats the input."""
    new_tokens: int
    log_probability: float | None = None
    """Of the grid (nats); None for free text."""
    note: str = ""


class Respondent(Protocol):
    """A model that can be asked."""

    name: str
    how: str
    """For people: how it is asked."""

    @property
    def reader(self) -> GridReader:
        """The model behind it."""

    @property
    def weights(self) -> nn.Module:
        """What holds its weights."""

    def questions(self, task: Task, num_views: int) -> tuple[list[Question], list[str]]:
        """Questions view by view (the identity first), and why some cannot be asked."""

    def answers(self, questions: Sequence[Question], advance: Advance) -> list[list[Answer]]:
        """One answer or several to each question."""


class TinyRespondent:
    """The tiny reader of a checkpoint."""

    def __init__(self, solver: Solver, seed: int, decoding: DecodingConfig):
        assert solver.tiny is not None
        self.solver, self.seed, self.decoding = solver, seed, decoding
        self.name, self.reader = solver.name, solver.tiny
        self.weights: nn.Module = self.reader
        self.how = f'tiny reader, sequence = "{self.reader.config.sequence}"'
        self._text_of = TinyText(self.reader).text_of

    def questions(self, task: Task, num_views: int) -> tuple[list[Question], list[str]]:
        """Questions under the views that `eval` asks under."""
        readings = task_readings(self.solver, task, num_views, self.seed)
        return [self._question(task, reading) for reading in readings], []

    def _question(self, task: Task, reading: Reading) -> Question:
        shown = int((reading.prompt.tokens == SEPARATOR).sum()) - 1
        dropped = len(task.demonstrations) - shown
        note = ""
        if self.reader.config.sequence == "task" and dropped:
            note = (
                f"task {task.id}, test input {reading.key[1]}: {dropped} of "
                f"{len(task.demonstrations)} demonstrations do not fit into reader.max_pairs and "
                "reader.max_tokens of the checkpoint and were left out"
            )
        return Question(reading, self._text_of(reading.prompt.tokens.tolist()), note)

    def answers(self, questions: Sequence[Question], advance: Advance) -> list[list[Answer]]:
        """Grids decoded token by token."""
        return _spelled(self.reader, questions, self.decoding, self._text_of, advance)


class HubRespondent:
    """A causal model of the hub, asked for grids token by token, or in plain language."""

    def __init__(self, reader: HubReader, config: BaselineConfig):
        self.reader, self.config, self.name = reader, config, reader.name
        self.weights: nn.Module = reader.model
        self.chats = config.hub.prompt == "chat"
        self.how = "plain language" if self.chats else reader.probe.how
        if self.chats and config.max_new_tokens >= reader.max_tokens:
            raise ConfigError(
                f"max_new_tokens = {config.max_new_tokens} leaves no room for a prompt: "
                f"{self.name} holds {reader.max_tokens} tokens; lower max_new_tokens"
            )

    def questions(self, task: Task, num_views: int) -> tuple[list[Question], list[str]]:
        """Questions under distinct views; a query that is too long for the model is not asked."""
        rng = np.random.default_rng([self.config.seed, *task.id.encode()])
        found, refused = [], []
        for view in distinct_views(fixed_colours(task), num_views, rng):
            for index in range(len(task.test)):
                try:
                    found.append(self.question(task, index, view))
                except ConfigError as error:
                    refused.append(str(error))
        return found, refused

    def question(self, task: Task, index: int, view: View) -> Question:
        """One test input under one view.

        Raises:
            ConfigError: it alone is too long, or the model has no usable chat template.
        """
        reader, query = self.reader, task.test[index].input
        room = output_room(task, query, view)
        new_tokens = self.config.max_new_tokens if self.chats else room
        bound = max(0, reader.max_tokens - new_tokens)
        bound = min(self.config.hub.max_tokens or bound, bound)
        build = chat_prompt if self.chats else task_prompt
        built = build(reader, task, index, bound, view)
        text = built.text or reader.tokenizer.decode(built.prompt.tokens.tolist())
        reading = Reading((task.id, index), view, built.prompt, query, room)
        return Question(reading, text, built.note)

    def answers(self, questions: Sequence[Question], advance: Advance) -> list[list[Answer]]:
        """Grids decoded token by token, or read out of free text."""
        if self.chats:
            return [[answer] for answer in self._written(questions, advance)]
        decode = self.reader.tokenizer.decode
        return _spelled(self.reader, questions, self.config.reader, decode, advance)

    @torch.no_grad()
    def _written(self, questions: Sequence[Question], advance: Advance) -> list[Answer]:
        """Free text, greedily; the last grid in it counts."""
        module = TextReasoningModule(self.reader)
        prompts = [question.reading.prompt for question in questions]
        size, most = batch_size(self.reader, self.config.reader), self.config.max_new_tokens
        found: dict[int, Answer] = {}
        for batch in split(by_length(prompts, [most] * len(prompts)), size):
            with memory_guard(size):
                out = module.continue_prompts([prompts[i] for i in batch], max_length=most)
            for i, text, count in zip(batch, out.text, _counts(out.new_tokens), strict=True):
                found[i] = _read_answer(questions[i].reading, text, count, most)
            advance(len(batch))
        return [found[i] for i in range(len(questions))]


def load_respondent(config: BaselineConfig, device: torch.device) -> Respondent:
    """The hub model that is named, else the reader of the checkpoint.

    Raises:
        ConfigError: there is no such model, or it cannot be asked.
        CheckpointError: the checkpoint is damaged, or has no reader.
        ResourceError: it does not fit.
    """
    if config.hub.name:
        return HubRespondent(load_hub_reader(config.hub, device), config)
    solver = load_solver(config.checkpoint, InferenceConfig(views=config.views), device)
    if solver.tiny is None:
        raise CheckpointError(
            f"{solver.name}: holds no reader that baseline can ask alone; train a tiny one "
            "with `arctrm pretrain --config configs/pretrain_reader.toml` and give it with "
            "--checkpoint, or name a hub model with --model"
        )
    return TinyRespondent(solver, config.seed, config.reader)


def require_a_question(respondent: Respondent, tasks: Sequence[Task]) -> None:
    """Raise ConfigError, before anything is written, if no task can be asked about."""
    reasons: list[str] = []
    for task in tasks:
        found, reasons = respondent.questions(task, 1)
        if found:
            return
    raise ConfigError(reasons[0])


def weights_fingerprint(module: nn.Module) -> str:
    """12 hex digits over names, shapes and some values of all weights, in any dtype."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:  # of a model that does not fit into memory
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + _sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """The first values, rounded to bfloat16: a narrower copy of a model is the same model."""
    values = tensor.detach().flatten()[:HASHED_VALUES].to("cpu", torch.bfloat16)
    return values.view(torch.int16).numpy().tobytes()


def _spelled(
    reader: GridReader,
    questions: Sequence[Question],
    decoding: DecodingConfig,
    text_of: Callable[[list[int]], str],
    advance: Advance,
) -> list[list[Answer]]:
    """Answers that are grids from the first token on."""
    readings = [question.reading for question in questions]
    return [
        [
            Answer(
                text_of(list(one.tokens)),
                turned_back(reading, one.grid),
                one.num_tokens,
                one.log_probability,
            )
            for one in several
        ]
        for reading, several in zip(
            readings, propose(reader, readings, decoding, advance), strict=True
        )
    ]


def _read_answer(reading: Reading, text: str, new_tokens: int, most: int) -> Answer:
    grid = parse_grid_text(text)
    note = ""
    if new_tokens >= most:
        task_id, index = reading.key
        note = (
            f"task {task_id}, test input {index}: an answer was cut off at max_new_tokens = {most}"
        )
    return Answer(text, turned_back(reading, grid), new_tokens, note=note)


def _counts(new_tokens: int | list[int]) -> list[int]:
    assert isinstance(new_tokens, list)
    return new_tokens
