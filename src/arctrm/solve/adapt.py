"""Adaptation: test-time training of a copy of the weights on a task's own demonstrations.

In the reader's voice, through the sequences and losses of training, by many short steps; where only
TRM was trained, in its voice; of a hub model what was trained of it. The task embedding is the
task's own if the model knows the task, else the mean of the trained ones. A demonstration is held
out first, where there are enough, and asked for half-way (leave-one-out); then all are trained on.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from arctrm.config import AdaptationConfig, DataConfig, OptimiserConfig, TRMConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import CheckpointError, ResourceError
from arctrm.model.layout import CHOICES, VOCABULARY, pair_length
from arctrm.model.trunk import TASK_TABLES, Trunk
from arctrm.solve.budget import (
    FIRST_STEPS,
    PROBE_SHARE,
    PROBE_TIME,
    PROBE_VIEWS,
    RESERVE,
    TRAINING_PASSES,
    Session,
)
from arctrm.solve.propose import refine, write, written
from arctrm.solve.scoring import is_right
from arctrm.solve.weights import Solver
from arctrm.train.losses import IGNORE
from arctrm.train.optim import FlatGradients, Optimisers, Update, trained_parameters
from arctrm.train.sequences import Sequences
from arctrm.train.source import PairSource
from arctrm.train.steps import ReaderStep, TrmStep, room_for

GPU_TOKENS, CPU_TOKENS = 1024, 256
"""Of a batch, unless the largest demonstration has more."""
CONTEXT = 4
"""Sequences of a hub model show so many pairs, the asked one included, at most."""
CLIP_NORM = 1.0
SOME_VIEWS = 16
"""From which the time of all is foretold."""
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Adapted:
    """What adaptation gave."""

    solver: Solver
    """Answers with the adapted weights."""
    steps: int
    """Optimiser steps."""
    leave_one_out: float | None
    """Share of answers that got the held-out demonstration exactly; None if not asked."""


def share_of_adaptation(session: Session) -> float:
    """Share of the time left that adaptation gets; 0 where the configuration or weights allow none:
    published embeddings are of single views, and of a frozen hub model nothing is trained.
    """
    solver, config = session.solver, session.config.adaptation
    if not config.enabled or solver.views:
        return 0.0
    if not any(True for _ in _part(solver.model).parameters()):
        return 0.0
    return config.known_share if session.known else config.share


def adapt(session: Session, share: float) -> Adapted | None:
    """Adapt to the session's task within `share` of the time; None where that allows no step.

    A task that the model was trained on has no demonstration left to hold out.
    """
    solver, task, config, clock = session.solver, session.task, session.config, session.clock
    # 1. How long: what the answers do not need adapts, too; one view is answered at least.
    now, left, one = time.monotonic(), clock.left(), session.questions(1)
    least = session.reading_seconds(one)
    if solver.refiner is not None:
        least = min(least, session.refining_seconds(one, FIRST_STEPS))
    views = config.inference.views
    some = session.questions(min(views, SOME_VIEWS))
    answers = session.reading_seconds(some) * max(1.0, views / SOME_VIEWS)
    answers += session.judging_seconds()
    until = now + max(left * share, left - answers * RESERVE)
    until = min(until, clock.end - least * RESERVE)
    if until <= now:
        return None
    adapter = Adapter(solver, task, config.adaptation, config.seed)
    adapter.seconds_per_step = TRAINING_PASSES * session.pass_seconds(adapter.num_tokens)
    most, told = config.adaptation.max_steps, lambda n: session.tell(f"adapting, step {n}")
    # 2. Without the held-out demonstration, then the probe, then all.
    index = None if session.known else held_out(task, config.seed)
    score = None
    if index is not None:
        rest = probe_task(task, index)
        adapter.train(rest, now + (until - now) * PROBE_SHARE, most, told)
        if adapter.steps:
            score = _probe(replace(session, solver=adapter.answering()), index, until)
    adapter.train(task, until, most, told)
    return Adapted(adapter.answering(), adapter.steps, score) if adapter.steps else None


def _probe(session: Session, index: int, until: float) -> float | None:
    """Share of answers that get the held-out demonstration exactly; None without time for it."""
    truth = session.task.demonstrations[index].output
    asking = replace(session, task=probe_task(session.task, index))
    asked, solver = asking.questions(PROBE_VIEWS), session.solver
    if session.reading_seconds(asked) > PROBE_TIME * (until - time.monotonic()):
        return None
    if solver.reader is not None:
        size = session.config.judge.batch_size
        found = written(asked, write(solver.reader, asked, batch_size=size, deadline=until))
    else:
        assert solver.refiner is not None
        found = refine(solver.refiner, asked, None, num_steps=session.config.inference.steps)
    return float(np.mean([bool(is_right(one.grid, truth)) for one in found]))


def held_out(task: Task, seed: int) -> int | None:
    """Index of the demonstration to hold out; None when too few would be left to learn from."""
    if len(task.demonstrations) < 3:
        return None
    return int(np.random.default_rng([seed, *task.id.encode()]).integers(len(task.demonstrations)))


def probe_task(task: Task, index: int) -> Task:
    """A task that asks for demonstration `index` from the others; its answer is not in it."""
    rest = task.demonstrations[:index] + task.demonstrations[index + 1 :]
    return Task(task.id, rest, (Pair(task.demonstrations[index].input),))


def require_adaptable(solver: Solver, command: str, instead: str) -> None:
    """Refuse a published checkpoint, whose embeddings are of single views; `instead`: what to do.

    Raises:
        CheckpointError: it is one.
    """
    if solver.views:
        raise CheckpointError(
            f"{solver.name}: a published TRM checkpoint has an embedding for each view of a task "
            f"and cannot adapt to another; {command} needs weights that can ({instead})"
        )


class Adapter:
    """A copy of a solver's model that learns one task."""

    def __init__(self, solver: Solver, task: Task, config: AdaptationConfig, seed: int):
        self.config, self.seed, self.solver = config, seed, solver
        self.steps, self.seconds_per_step = 0, 0.0
        with self._memory():
            row = solver.row_of(task)
            row = solver.mean_row if row is None else row
            self.model = _hub_copy(solver.model) if solver.reads_pairs else _copy(solver, row)
            trained = trained_parameters(_part(self.model))
            self.gradients = FlatGradients(trained)
            rates = OptimiserConfig(
                kind=config.kind, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr
            )
            self.update = Update(self.gradients, Optimisers(trained, rates), None, CLIP_NORM)
        usual = GPU_TOKENS if solver.device.type == "cuda" else CPU_TOKENS
        self.least = max(map(_longest, task.demonstrations))
        self.num_tokens = max(config.tokens_per_batch or usual, self.least)
        """Tokens of a batch: at least those of the largest demonstration."""
        self.row = {} if solver.reads_pairs else {task.id: 0}
        torch.manual_seed(seed)

    def train(
        self,
        task: Task,
        until: float,
        max_steps: int,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """Train on views of the demonstrations of `task` until the monotonic time `until`.

        Stops before a step that would end later, and after `max_steps`.

        Raises:
            ResourceError: out of memory; says which key to lower.
        """
        with self._memory():
            step = self._new_step(task)
            if self.steps == 0:  # a guess must not forbid the first step
                left = until - time.monotonic()
                self.seconds_per_step = min(self.seconds_per_step, left / 2)
            for _ in range(max_steps):
                begin = time.monotonic()
                if begin + self.seconds_per_step >= until:
                    break
                self.gradients.zero()
                step()
                self.steps += 1
                self.update(min(1.0, self.steps / WARMUP_STEPS), self.steps)
                if self.gradients.flat.is_cuda:
                    torch.cuda.synchronize()
                self.seconds_per_step = time.monotonic() - begin
                advance(self.steps)

    def answering(self) -> Solver:
        """Who answers with the weights as they are now (a trunk's are cast once, if at all)."""
        adapted = self.solver.with_model(self.model)
        if not self.row:
            return adapted
        return replace(adapted, rows=self.row, by_content=False, mean_row=0, name="adapted")

    def _new_step(self, task: Task) -> Callable[[], None]:
        """What adds the gradient of a batch of views of the demonstrations."""
        base = base_set_from_tasks({"task": [task]}, "task", 0)
        colours = self.solver.identity_colours
        data = DataConfig(subsets=("task",), test_set="task", num_aug=0, identity_colours=colours)
        source = PairSource(base, data, self.seed, self.gradients.flat.device)
        if self.solver.reads_pairs:
            return _HubStep(self.model.reader, source, self.num_tokens, len(task.demonstrations))
        trunk, tokens, reads = self.model, self.num_tokens, self.solver.reader is not None
        sequences = Sequences(source, trunk.dtype, whole=not reads)
        room = room_for(sequences, tokens)
        if reads:
            return ReaderStep(trunk, sequences, tokens, room)
        return TrmStep(trunk, sequences, tokens, room, TRMConfig(supervision_steps=2))

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Turn out of memory into the sentence that says what to lower."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            tokens = getattr(self, "num_tokens", 0)
            cure = f"lower it, for example --set adaptation.tokens_per_batch={tokens // 2}"
            if tokens <= getattr(self, "least", 0):
                cure = "it cannot be lower; answer with --set adaptation.enabled=false"
            raise ResourceError(
                f"{self.solver.name}: out of memory for a copy that adapts, with "
                f"adaptation.tokens_per_batch = {tokens}; {cure}"
            ) from error


def _copy(solver: Solver, row: int) -> Trunk:
    """A trainable float32 copy with one task embedding."""
    trunk = solver.model
    assert isinstance(trunk, Trunk)
    state = {name: tensor.detach().float().clone() for name, tensor in trunk.state_dict().items()}
    state |= {name: state[name][[row]] for name in TASK_TABLES}
    with torch.device("meta"):
        other = Trunk(trunk.config, 1, trunk.num_scales)
    other.load_state_dict(state, assign=True)
    other.dtype = trunk.dtype if solver.reader is None else solver.reader.dtype
    return other.requires_grad_(True).eval()


def _hub_copy(hybrid: nn.Module) -> Any:
    """The same hybrid with a reader whose trained parameters are its own."""
    other: Any = copy.copy(hybrid)
    other.__dict__["_modules"] = dict(hybrid._modules)
    other.reader = other.reader.trainable_copy().requires_grad_(True)
    return other


def _part(model: Any) -> nn.Module:
    """What of the model is trained."""
    return model if isinstance(model, Trunk) else model.reader


def _longest(pair: Pair) -> int:
    """Tokens of a pair under the view that makes most of it: a turned grid may have more rows."""
    assert pair.output is not None
    return max(pair_length(pair), pair_length(Pair(pair.input.T, pair.output.T)))


class _HubStep:
    """The gradient of a batch of sequences of demonstrations, as a hub model reads them."""

    def __init__(self, reader: Any, source: PairSource, num_tokens: int, num_pairs: int):
        pairs = max(1, min(num_pairs, CONTEXT))
        self.reader, self.num_tokens = reader, num_tokens * pairs
        longest = min(self.num_tokens, reader.max_prompt_tokens)
        self.sequences = Sequences(source, torch.float32, num_pairs=pairs, longest=longest)
        self.queue = self.sequences.draw(room_for(self.sequences, self.num_tokens))
        self.choice_of = torch.full((VOCABULARY,), IGNORE, device=source.device)
        self.choice_of[list(CHOICES)] = torch.arange(len(CHOICES), device=source.device)

    def __call__(self) -> None:
        with torch.no_grad():
            batch = self.sequences.next_batch(self.queue, self.num_tokens)
        real = batch.num_sequences + 1  # dummies lie behind
        hidden = self.reader.run_packed(batch.tokens, batch.seen.offsets[:real])
        known = batch.labels != IGNORE
        labels = self.choice_of[batch.labels[known]]
        F.cross_entropy(self.reader.grid_logits(hidden[known]), labels).backward()
