"""Adaptation: test-time training on the demonstrations of the tasks to be answered.

What answers (TRM, adapters, a tiny reader, what is trained of a hub reader), or of it the reader
alone, is fine-tuned on views of the demonstrations, through the same streams and losses as in
training, with one task embedding for each task: its own if the model knows the task, else the mean
of the trained ones. `solve` adapts to one task within its time (here), `eval` to all of them side
by side (`arctrm.solving.side_by_side`). A demonstration can be held out first and be used as a
probe (leave-one-out) before all of them are trained on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from arctrm.config import LearningConfig
from arctrm.data.task import Pair, Task
from arctrm.errors import CheckpointError, ResourceError
from arctrm.hybrid import Hybrid
from arctrm.reader.hub_module import HubModule
from arctrm.solving.learners import (
    DRAFT_EVERY,
    Learner,
    batch_tokens,
    least_tokens,
    new_step,
    trainable_copy,
    trained_apart,
)
from arctrm.solving.weights import Solver
from arctrm.training.step import GraphedStep, Step

WARMUP_STEPS = 3


class Adapter:
    """A copy of a solver's model that adapts to some tasks; `solver` holds it at any time."""

    def __init__(
        self,
        solver: Solver,
        tasks: Sequence[Task],
        config: LearningConfig,
        seed: int,
        seconds_per_token: float = 0.0,
    ):
        """`seconds_per_token` of answering, if known, guesses the time of the first step."""
        self.config, self.seed = config, seed
        self.steps = 0
        tasks = sorted(tasks, key=lambda task: task.id)
        rows = [solver.row_of(task) for task in tasks]
        self.num_known = sum(row is not None for row in rows)
        """Tasks that the model was trained on."""
        with _room_for_a_copy(solver):
            model = trainable_copy(
                solver.model, [solver.mean_row if row is None else row for row in rows]
            )
            self.parts = trained_apart(model, config)
            self.learners = [Learner(part, config) for part in self.parts]
        own = {task.id: row for row, task in enumerate(tasks)}
        self.solver = replace(
            solver, model=model, rows=own, by_content=False, views={}, name="adapted", adapted=True
        )
        self.num_tokens = [batch_tokens(part, tasks, config) for part in self.parts]
        """Tokens of a batch of each part."""
        self.smallest = max(least_tokens(part, tasks) for part in self.parts)
        self.seconds_per_step = seconds_per_token * sum(self.num_tokens)
        torch.manual_seed(seed)

    def new_steps(self, tasks: Sequence[Task]) -> list[Step]:
        """What adds the gradients of batches of the demonstrations of `tasks`, for each part."""
        assert sorted(task.id for task in tasks) == list(self.solver.rows)
        colours = self.solver.identity_colours
        return [new_step(part, tasks, self.config, self.seed, colours) for part in self.parts]

    def learn(self, steps: Sequence[Step | GraphedStep], factor: float) -> None:
        """One optimiser step of every part at `factor` x the learning rates.

        Raises:
            ResourceError: out of memory; says which key to lower.
        """
        with self.memory_errors():
            for learner, step in zip(self.learners, steps, strict=True):
                learner.learn(step, factor)
        self.steps += 1

    def train(
        self,
        tasks: Sequence[Task],
        until: float,
        max_steps: int,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """Train on views of the demonstrations of `tasks` until the monotonic time `until`.

        Stops before a step that would end later, and after `max_steps`.
        """
        steps = self.new_steps(tasks)
        if self.steps == 0:  # a guess from one slow batch must not forbid the first step
            self.seconds_per_step = min(self.seconds_per_step, (until - time.monotonic()) / 2)
        longest = self.seconds_per_step
        for number in range(max_steps):
            expected = self.seconds_per_step if number % DRAFT_EVERY else longest
            if time.monotonic() + expected >= until:
                break
            begin = time.monotonic()
            self.learn(steps, min(1.0, (self.steps + 1) / WARMUP_STEPS))
            if self.solver.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds_per_step = time.monotonic() - begin
            longest = max(longest, self.seconds_per_step)
            advance(self.steps)

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Turn out of memory into the ResourceError that says which key to lower."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            tokens = max(self.num_tokens)
            cure = f"lower it, for example --set adaptation.tokens_per_batch={tokens // 2}"
            if tokens <= self.smallest:
                cure = "no batch holds less than the largest demonstration; use a smaller model"
            raise ResourceError(
                f"out of memory with adaptation.tokens_per_batch = {tokens}; {cure}"
            ) from error

    def answering(self) -> Solver:
        """The solver to answer with, as it is now: its reader's weights in its own arithmetic.

        (Decoding would else turn float32 weights into narrower ones at every token.)
        """
        return self.frozen() if _answers_in_less(self.solver) else self.solver

    def frozen(self) -> Solver:
        """A copy of the solver, as it is now, that is not trained: what answers after the last
        step. A hub model is shared but for what was trained of it.
        """
        rows = range(len(self.solver.rows))
        copy = replace(self.solver, model=trainable_copy(self.solver.model, rows))
        if copy.tiny is not None:
            copy.tiny.to(copy.tiny.dtype)
        if isinstance(copy.model, Hybrid) and isinstance(copy.model.reader, HubModule):
            copy.model.reader.narrow()
        copy.model.requires_grad_(False)
        return copy


def _answers_in_less(solver: Solver) -> bool:
    """Whether the reader's weights are narrower where they answer than where they are trained."""
    if solver.tiny is not None:
        return solver.tiny.dtype != torch.float32
    reader = solver.model.reader if isinstance(solver.model, Hybrid) else None
    return isinstance(reader, HubModule) and any(d != torch.float32 for d in reader.dtypes)


@contextmanager
def _room_for_a_copy(solver: Solver) -> Iterator[None]:
    """Turn out of memory, while everything that is trained is copied, into a ResourceError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{solver.name}: out of memory for a copy of what is trained and its gradients; answer "
            "without adaptation (solve: adaptation.enabled = false, eval: evaluation.adapt_steps = "
            "0), or use a smaller model"
        ) from error


def require_adaptable(solver: Solver, command: str, instead: str) -> None:
    """Refuse a checkpoint whose task embeddings cannot be adapted; `instead`: what to do.

    Raises:
        CheckpointError: of a TRM with another layout or with embeddings of single views.
    """
    if not solver.has_trm:
        return
    config = solver.trm.config
    if config.layout != "compact" or config.task_embedding != "shared":
        raise CheckpointError(
            f"{solver.name}: trm.layout = {config.layout!r} with trm.task_embedding = "
            f"{config.task_embedding!r} cannot adapt to a task; {command} needs layout 'compact' "
            f"with 'shared' embeddings ({instead})"
        )


def held_out(task: Task, seed: int) -> int | None:
    """Index of the demonstration to hold out; None when too few would be left to learn from."""
    if len(task.demonstrations) < 3:
        return None
    return int(np.random.default_rng([seed, *task.id.encode()]).integers(len(task.demonstrations)))


def probe_task(task: Task, index: int) -> Task:
    """A task that asks for demonstration `index` from the others; its answer is not in it."""
    rest = task.demonstrations[:index] + task.demonstrations[index + 1 :]
    return Task(task.id, rest, (Pair(task.demonstrations[index].input),))
