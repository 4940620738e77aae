"""Adaptation: test-time training of TRM on a task's own demonstrations.

The whole model is fine-tuned on views of the demonstrations, through the same stream, loss and
optimisers as pretraining, with one task embedding: the task's own if the model knows the task, else
the mean of the trained ones. A demonstration can be held out first and be used as a probe
(leave-one-out) before all of them are trained on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from arctrm.config import AdaptationConfig, DataConfig, OptimiserConfig
from arctrm.data.canvas import pair_canvas
from arctrm.data.dataset import base_set_from_tasks
from arctrm.data.task import Pair, Task
from arctrm.solving.weights import Solver
from arctrm.training.optimisers import FlatGradients, Optimisers
from arctrm.training.stages import TOKENS_PER_ROW
from arctrm.training.step import MicroStep
from arctrm.training.stream import PairStream
from arctrm.trm.model import TRM

WARMUP_STEPS = 3
CPU_TOKENS, GPU_TOKENS = 1024, 16384


class Adapter:
    """A copy of a solver's model that adapts to one task; `solver` answers with it at any time."""

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
        trm = _copy_with_one_embedding(solver.trm, solver.mean_row if row is None else row)
        self.solver = replace(
            solver, model=trm, rows={task.id: 0}, by_content=False, views={}, name="adapted"
        )
        self.gradients = FlatGradients(list(trm.parameters()))
        self.optimisers = Optimisers(
            trm, OptimiserConfig(muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
        )
        self.seconds_per_step = seconds_per_token * self._num_tokens(task.demonstrations)
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
        step = self._micro_step(demonstrations)
        if self.steps == 0:  # a guess from one slow batch must not forbid the first step
            self.seconds_per_step = min(self.seconds_per_step, (until - time.monotonic()) / 2)
        last = self.steps + self.config.max_steps
        while self.steps < last and time.monotonic() + self.seconds_per_step < until:
            begin = time.monotonic()
            self.gradients.zero()
            step()
            self.gradients.clip(1.0)
            self.optimisers.step(min(1.0, (self.steps + 1) / WARMUP_STEPS))
            self.steps += 1
            if step.counts.is_cuda:
                torch.cuda.synchronize()
            self.seconds_per_step = time.monotonic() - begin
            advance(self.steps)

    def _num_tokens(self, demonstrations: Sequence[Pair]) -> int:
        """Tokens of a packed batch: at least one row of the largest demonstration."""
        trm = self.solver.trm
        default = GPU_TOKENS if trm.H_init.is_cuda else CPU_TOKENS
        largest = max(_row_tokens(trm, pair) for pair in demonstrations)
        return max(self.config.tokens_per_batch or default, largest)

    def _micro_step(self, demonstrations: Sequence[Pair]) -> MicroStep:
        trm = self.solver.trm
        task = Task(self.task.id, tuple(demonstrations))
        base = base_set_from_tasks({"task": [task]}, None, 0)
        data = DataConfig(
            subsets=("task",),
            test_set=None,
            num_aug=0,
            identity_colours=self.solver.identity_colours,
            enlarge_canvas=0.0,
        )
        stream = PairStream(base, data, trm.config, self.seed, trm.H_init.device)
        num_tokens = self._num_tokens(demonstrations)
        state = stream.new_state(trm, num_tokens, max(2, num_tokens // TOKENS_PER_ROW))
        return MicroStep(trm, stream, state, self.config.halt_max_steps, 1.0)


def _row_tokens(trm: TRM, pair: Pair) -> int:
    height, width = pair_canvas(pair)
    return trm.config.num_slots + height * width


def held_out(task: Task, seed: int) -> int | None:
    """Index of the demonstration to hold out; None when too few would be left to learn from."""
    if len(task.demonstrations) < 3:
        return None
    return int(np.random.default_rng([seed, *task.id.encode()]).integers(len(task.demonstrations)))


def probe_task(task: Task, index: int) -> Task:
    """A task that asks for demonstration `index` from the others; its answer is not in it."""
    rest = task.demonstrations[:index] + task.demonstrations[index + 1 :]
    return Task(task.id, rest, (Pair(task.demonstrations[index].input),))


def _copy_with_one_embedding(trm: TRM, row: int) -> TRM:
    device = trm.H_init.device
    copy = TRM(trm.config, 1).to(device)
    weights = {name: tensor.clone() for name, tensor in trm.state_dict().items()}
    weights["puzzle_emb.weights"] = weights["puzzle_emb.weights"][row : row + 1]
    copy.load_state_dict(weights)
    copy.dtype, copy.level = trm.dtype, trm.level
    copy.eval()
    return copy
