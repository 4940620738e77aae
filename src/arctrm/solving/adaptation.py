"""Adaptation: test-time training on a task's own demonstrations.

Everything that answers is fine-tuned on views of the demonstrations (TRM, reader, adapters),
through the same streams, losses and optimisers as in training, with one task embedding: the task's
own if the model knows the task, else the mean of the trained ones. A demonstration can be held out
first and be used as a probe (leave-one-out) before all of them are trained on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from arctrm.config import AdaptationConfig
from arctrm.data.task import Pair, Task
from arctrm.solving.learners import (
    DRAFT_EVERY,
    Learner,
    batch_tokens,
    new_step,
    one_task_copy,
    trained_apart,
)
from arctrm.solving.weights import Solver

WARMUP_STEPS = 3


class Adapter:
    """A copy of a solver's model that adapts to one task; `solver` holds it at any time."""

    def __init__(
        self,
        solver: Solver,
        task: Task,
        config: AdaptationConfig,
        seed: int,
        seconds_per_token: float = 0.0,
    ):
        """`seconds_per_token` of answering, if known, guesses the time of the first step."""
        self.config, self.task, self.seed = config, task, seed
        self.steps = 0
        row = solver.row_of(task)
        self.known = row is not None
        model = one_task_copy(solver.model, solver.mean_row if row is None else row)
        self.solver = replace(
            solver, model=model, rows={task.id: 0}, by_content=False, views={}, name="adapted"
        )
        self.parts = trained_apart(model)
        self.learners = [Learner(part, config) for part in self.parts]
        tokens = sum(batch_tokens(part, task.demonstrations, config) for part in self.parts)
        self.seconds_per_step = seconds_per_token * tokens
        torch.manual_seed(seed)

    def train(
        self,
        demonstrations: Sequence[Pair],
        until: float,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """Train on views of `demonstrations` until the monotonic time `until`.

        Stops before a step that would end later, and after `config.max_steps`.
        """
        colours = self.solver.identity_colours
        steps = [
            new_step(part, demonstrations, self.config, self.seed, colours) for part in self.parts
        ]
        if self.steps == 0:  # a guess from one slow batch must not forbid the first step
            self.seconds_per_step = min(self.seconds_per_step, (until - time.monotonic()) / 2)
        longest = self.seconds_per_step
        for number in range(self.config.max_steps):
            expected = self.seconds_per_step if number % DRAFT_EVERY else longest
            if time.monotonic() + expected >= until:
                break
            begin = time.monotonic()
            self._step(steps)
            self.seconds_per_step = time.monotonic() - begin
            longest = max(longest, self.seconds_per_step)
            advance(self.steps)

    def _step(self, steps: Sequence[Callable[[], None]]) -> None:
        factor = min(1.0, (self.steps + 1) / WARMUP_STEPS)
        for learner, step in zip(self.learners, steps, strict=True):
            learner.learn(step, factor)
        self.steps += 1
        if self.solver.device.type == "cuda":
            torch.cuda.synchronize()

    def answering(self) -> Solver:
        """The solver to answer with, as it is now: its reader's weights in its own arithmetic.

        (Decoding would else turn float32 weights into narrower ones at every token.)
        """
        reader = self.solver.reader
        if reader is None or reader.dtype == torch.float32:
            return self.solver
        copy = replace(self.solver, model=one_task_copy(self.solver.model, 0))
        assert copy.reader is not None
        copy.reader.to(reader.dtype)
        copy.model.requires_grad_(False)
        return copy


def held_out(task: Task, seed: int) -> int | None:
    """Index of the demonstration to hold out; None when too few would be left to learn from."""
    if len(task.demonstrations) < 3:
        return None
    return int(np.random.default_rng([seed, *task.id.encode()]).integers(len(task.demonstrations)))


def probe_task(task: Task, index: int) -> Task:
    """A task that asks for demonstration `index` from the others; its answer is not in it."""
    rest = task.demonstrations[:index] + task.demonstrations[index + 1 :]
    return Task(task.id, rest, (Pair(task.demonstrations[index].input),))
