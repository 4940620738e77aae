"""Adaptation: test-time training of a copy of the weights on a task's own demonstrations.

In the reader's voice, through the sequences and losses of training, by many short steps; where only
TRM was trained, in its voice; of a hub model what was trained of it. The task embedding is the
task's own if the model knows the task, else the mean of the trained ones. A demonstration is held
out first, where there are enough, and asked for half-way (leave-one-out); then all are trained on.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from arctrm.config import AdaptationConfig, DataConfig, JointConfig, OptimiserConfig, TRMConfig
from arctrm.data.base_set import base_set_from_tasks
from arctrm.data.task import Pair, Task
from arctrm.errors import CheckpointError
from arctrm.model.layout import pair_length
from arctrm.model.trunk import TASK_TABLES, Trunk
from arctrm.solve import budget
from arctrm.solve.budget import RESERVE, Session
from arctrm.solve.propose import refine, write, written
from arctrm.solve.scoring import is_right
from arctrm.solve.weights import Solver
from arctrm.system import memory_errors
from arctrm.train.joint_hub import JointStep
from arctrm.train.optim import FlatGradients, Optimisers, Update, trained_parameters
from arctrm.train.sequences import Sequences
from arctrm.train.source import PairSource
from arctrm.train.steps import ReaderStep, TrmStep, room_for

GPU_TOKENS, CPU_TOKENS = 1024, 256  # of a batch, unless the largest demonstration has more
CONTEXT = 4  # pairs, the asked one included, that sequences of a hub model show at most
SOME_VIEWS = 16  # from which the time of all is foretold
CLIP_NORM, WARMUP_STEPS = 1.0, 3
Tell = Callable[[int], None]


class Adapted(NamedTuple):
    """What adaptation gave."""

    solver: Solver  # answers with the adapted weights
    steps: int  # of the optimiser
    leave_one_out: float | None  # share of answers that got the held-out demonstration exactly


def share_of_adaptation(session: Session) -> float:
    """Share of the time left that adaptation gets; 0 where configuration or weights allow none."""
    solver, config = session.solver, session.config.adaptation
    # Published embeddings are of single views, and of a frozen hub model nothing is trained.
    if (
        not config.enabled
        or solver.views
        or next(_part(solver, solver.model).parameters(), None) is None
    ):
        return 0.0
    return config.known_share if session.known else config.share


def adapt(session: Session, share: float) -> Adapted | None:
    """Adapt to the session's task within `share` of the time; None where that allows no step."""
    solver, task, config, clock = session.solver, session.task, session.config, session.clock
    # 1. How long: what the answers do not need adapts, too; one view is answered at least.
    now, left, views = time.monotonic(), clock.left(), config.inference.views
    least = session.reading_seconds(one := session.questions(1))
    if solver.refiner is not None:
        least = min(least, session.refining_seconds(one, budget.FIRST_STEPS))
    answers = session.reading_seconds(session.questions(min(views, SOME_VIEWS)))
    answers = answers * max(1.0, views / SOME_VIEWS) + session.judging_seconds()
    until = now + max(left * share, left - answers * RESERVE)
    until = min(until, clock.end - least * RESERVE)
    if until <= now:
        return None
    # 2. Without the held-out demonstration, then the probe, then all.
    most, tell = config.adaptation.max_steps, lambda n: clock.tell(f"step {n}")
    # A task that the model was trained on has no demonstration left to hold out.
    index, score = None if session.known else held_out(task, config.seed), None
    cure = "lower adaptation.tokens_per_batch, or --set adaptation.enabled=false"
    with memory_errors(lambda: f"{solver.name}: out of memory for a copy; {cure}"):
        adapter = Adapter(solver, task, config.adaptation, config.seed)
        passes = budget.TRAINING_PASSES * adapter.num_tokens
        adapter.seconds_per_step = session.pass_seconds(passes)
        if index is not None:
            probe = probe_task(task, index)
            adapter.train(probe, now + (until - now) * budget.PROBE_SHARE, most, tell)
            if adapter.steps:
                asking = replace(session, solver=adapter.answering(), task=probe)
                score = _probe(asking, task.demonstrations[index], until)
        adapter.train(task, until, most, tell)
    return Adapted(adapter.answering(), adapter.steps, score) if adapter.steps else None


def _probe(session: Session, held: Pair, until: float) -> float | None:
    asked, solver = session.questions(budget.PROBE_VIEWS), session.solver
    if session.reading_seconds(asked) > budget.PROBE_TIME * (until - time.monotonic()):
        return None
    if solver.reader is not None:
        size = session.config.judge.batch_size
        found = written(asked, write(solver.reader, asked, batch_size=size, deadline=until))
    else:
        assert solver.refiner is not None
        found = refine(solver.refiner, asked, None, num_steps=session.config.inference.steps)
    return float(np.mean([bool(is_right(one.grid, held.output)) for one in found]))


def held_out(task: Task, seed: int) -> int | None:
    """Index of the demonstration to hold out; None when too few would be left to learn from."""
    count, rng = len(task.demonstrations), np.random.default_rng([seed, *task.id.encode()])
    return int(rng.integers(count)) if count > 2 else None


def probe_task(task: Task, index: int) -> Task:
    """A task that asks for demonstration `index` from the others; its answer is not in it."""
    rest = task.demonstrations[:index] + task.demonstrations[index + 1 :]
    return Task(task.id, rest, (Pair(task.demonstrations[index].input),))


def require_adaptable(solver: Solver, command: str, instead: str) -> None:
    """Refuse a published checkpoint (CheckpointError); `instead`: what to do."""
    if solver.views:
        what = "a published TRM checkpoint cannot adapt to a task"
        raise CheckpointError(f"{solver.name}: {what}; {command} needs one that can ({instead})")


class Adapter:
    """A copy of a solver's model that learns one task."""

    def __init__(self, solver: Solver, task: Task, config: AdaptationConfig, seed: int):
        self.seed, self.solver, self.steps, self.seconds_per_step = seed, solver, 0, 0.0
        usual = GPU_TOKENS if solver.device.type == "cuda" else CPU_TOKENS
        # A batch holds the largest demonstration under any view: a turned grid may have more rows.
        turned = [Pair(p.input.T, p.output.T) for p in task.demonstrations if p.output is not None]
        longest = max(map(pair_length, (*task.demonstrations, *turned)))
        self.num_tokens = max(config.tokens_per_batch or usual, longest)
        row = solver.row_of(task)
        row = solver.mean_row if row is None else row
        self.row = {} if solver.reads_pairs else {task.id: 0}
        self.model = _hub_copy(solver.model) if solver.reads_pairs else _copy(solver, row)
        trained = trained_parameters(_part(solver, self.model))
        self.gradients = FlatGradients(trained)
        rates = {name: getattr(config, name) for name in ("kind", "muon_lr", "adamw_lr")}
        optimisers = Optimisers(trained, OptimiserConfig(**rates))
        self.update = Update(self.gradients, optimisers, None, CLIP_NORM)
        torch.manual_seed(seed)

    def train(self, task: Task, until: float, most: int, tell: Tell = lambda steps: None) -> None:
        """Train on views of the demonstrations of `task`: `most` steps, and none that would end
        after the monotonic time `until`.
        """
        step = self._new_step(task)
        if self.steps == 0:  # a guess must not forbid the first step
            self.seconds_per_step = min(self.seconds_per_step, (until - time.monotonic()) / 2)
        for _ in range(most):
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
            tell(self.steps)

    def answering(self) -> Solver:
        """Who answers with the weights as they are now (a trunk's are cast once, if at all)."""
        adapted = self.solver.with_model(self.model)
        if not self.row:
            return adapted
        return replace(adapted, rows=self.row, by_content=False, mean_row=0, name="adapted")

    def _new_step(self, task: Task) -> Callable[[], None]:
        solver, base = self.solver, base_set_from_tasks({"task": [task]}, "task", 0)
        data = DataConfig(subsets=("task",), test_set="task", num_aug=0)
        data = data.model_copy(update={"identity_colours": solver.identity_colours})
        source = PairSource(base, data, self.seed, self.gradients.flat.device)
        if solver.reads_pairs:
            return _hub_step(self.model, source, self.num_tokens, len(task.demonstrations))
        sequences = Sequences(source, self.model.dtype, whole=solver.reader is None)
        how = (self.model, sequences, self.num_tokens, room_for(sequences, self.num_tokens))
        return ReaderStep(*how) if solver.reader else TrmStep(*how, TRMConfig())


def _copy(solver: Solver, row: int) -> Trunk:
    """A trainable float32 copy with one task embedding."""
    trunk: Any = solver.model
    state = {name: tensor.detach().float().clone() for name, tensor in trunk.state_dict().items()}
    state |= {name: state[name][[row]] for name in TASK_TABLES}
    other = trunk.holding(state)
    dtype = trunk.dtype if solver.reader is None else solver.reader.dtype
    # Small gradients are zero in float16.
    other.dtype = torch.float32 if dtype == torch.float16 else dtype
    other.requires_grad_(True)
    for parameter in other.trm_parameters().values() if solver.reader else ():
        parameter.requires_grad_(False)
    return other.eval()


def _hub_copy(hybrid: nn.Module) -> Any:
    """The same hybrid with a reader whose trained parameters are its own."""
    other: Any = copy.copy(hybrid)
    other.__dict__["_modules"] = dict(hybrid._modules)
    other.reader = other.reader.trainable_copy().requires_grad_(True)
    return other


def _part(solver: Solver, model: Any) -> nn.Module:
    return model.reader if solver.reads_pairs else model


def _hub_step(hybrid: Any, source: PairSource, tokens: int, num_pairs: int) -> Callable[[], None]:
    # The reader's own part of a joint step.
    pairs = max(1, min(num_pairs, CONTEXT))
    longest = min(tokens * pairs, hybrid.reader.max_prompt_tokens)
    sequences = Sequences(source, torch.float32, num_pairs=pairs, longest=longest)
    room = room_for(sequences, tokens * pairs)
    joint = JointStep(hybrid, sequences, JointConfig(batch_size=room))
    joint.num_tokens = tokens * pairs

    def add_gradient() -> None:
        batch = joint.next_batch()
        offsets = batch.seen.offsets[: batch.num_sequences + 1]  # dummies lie behind
        hidden = hybrid.reader.run_packed(batch.tokens, offsets)
        joint.read_losses(batch, hidden).mean.backward()

    return add_gradient
