"""The planner at solve time: the reader drafts, TRM refines, held-out demonstrations judge.

Every demonstration is asked for just as the test input is (a probe): its row sees the other
demonstrations only (none, where the reader's sequences hold one pair), and has its own draft,
latents and soft prefix. The verdict on an attempt is how many probes it got right; the soft prefix
that TRM's latents give to each row is what the next attempt of that row starts from.

What is asked for depends on no held-out output: not the prompt, the canvas, nor the bound on the
draft. A probe's row is told nothing of the other probes, who have seen its output.

Legend: R rows (test inputs, then probes), P prefix vectors, H width of the reader.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from arctrm.config import InferenceConfig, SolveConfig
from arctrm.data.task import Grid, Task
from arctrm.hybrid import Hybrid
from arctrm.planner import ARCPlanner, GridVerifier, PlannerResult, Verdict
from arctrm.reader.grid_text import parse_grid_text
from arctrm.reader.hub_text import HubGridText
from arctrm.reader.text_interface import TextReader
from arctrm.reader.text_module import TextReasoningModule
from arctrm.reader.tiny_text import TinyText, text_of
from arctrm.solving.adaptation import probe_task
from arctrm.solving.candidates import Key, Query, grids_on, packed_rows
from arctrm.solving.costs import cells, reading_work
from arctrm.solving.guidance import Guide, longest_visible, states
from arctrm.solving.pace import Pace
from arctrm.solving.pool import questions
from arctrm.solving.reading import Reading
from arctrm.solving.vote import Candidate
from arctrm.solving.weights import Solver

PLAN_SHARE = 0.3
"""Share of the time left that the attempts may take."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What the planner did for a task."""

    histories: tuple[PlannerResult, ...] = ()
    """One per test input; none where there was nothing to plan with, or no time."""
    candidates: list[tuple[Key, Candidate]] = field(default_factory=list)
    """What the best-probed attempt says of each test input."""


def can_plan(solver: Solver) -> bool:
    """Whether reader and TRM are joined."""
    return solver.hybrid is not None and len(solver.hybrid.adapters) > 0


@torch.no_grad()
def plan(
    solver: Solver,
    task: Task,
    config: SolveConfig,
    pace: Pace,
    tell: Callable[[str], None] = lambda text: None,
    kept: float = 0.0,
) -> Plan:
    """Attempts at the test inputs, under the identity view, until every probe is right.

    Of the time left `kept` seconds are for something else.
    """
    if not can_plan(solver):
        return Plan()
    rows = RowsOfTask(solver, task, config)
    until = time.monotonic() + PLAN_SHARE * max(0.0, pace.left() - kept)
    asked = [*rows.asked, *rows.probes]
    work = reading_work(asked, solver.without_ensemble())
    expected = pace.seconds("read", work) + pace.seconds("refine", cells(asked))
    if time.monotonic() + expected > until:
        return Plan()
    began = time.monotonic()

    def more() -> bool:
        """Whether another attempt like the last one ends in time."""
        nonlocal began
        now = time.monotonic()
        last, began = now - began, now
        tell(f"planning, attempt {len(rows.grids) + 1} of {config.attempts}")
        return now + last <= until

    tell(f"planning, attempt 1 of {config.attempts}")
    planner = ARCPlanner(rows.module, _useful_attempts(solver, config), rows.longest_draft)
    results = planner.solve_batch(rows.texts, rows.verify, more)[: len(rows.asked)]
    return Plan(tuple(results), [rows.candidate(i, r) for i, r in enumerate(results)])


def _useful_attempts(solver: Solver, config: SolveConfig) -> int:
    """Without a way back, a second attempt would be the first again."""
    assert solver.hybrid is not None
    return config.attempts if "back" in solver.hybrid.adapters else 1


class RowsOfTask:
    """The test inputs of a task and its demonstrations as probes, attempted together."""

    def __init__(self, solver: Solver, task: Task, config: SolveConfig):
        assert solver.hybrid is not None
        row = solver.row_of(task)
        # A probe has other demonstrations, so that it is known by its name only.
        rows = {task.id: solver.mean_row if row is None else row}
        self.solver = replace(solver, rows=rows, by_content=False, views={})
        self.task, self.inference, seed = task, config.inference, config.seed
        self.asked = questions(self.solver, [task], 1, seed)
        self.probes = [
            questions(self.solver, [probe_task(task, index)], 1, seed)[0]
            for index in range(len(task.demonstrations))
        ]
        both = [*self.asked, *self.probes]
        self.queries: list[Query] = [q.query for q in both if q.query is not None]
        self.readings: list[Reading] = [q.reading for q in both if q.reading is not None]
        self.drafts: list[Grid | None] = [None] * len(both)
        self.grids: list[list[Grid | None]] = []
        """Of every attempt so far, what TRM says of each row."""
        self.q_halt: list[list[float]] = []
        self.soft_RPH: Tensor | None = None
        self.verifier = GridVerifier(demonstrations=task.demonstrations)
        self.layouts = [r.layout for r in self.readings if r.layout is not None]
        text = _grid_text(solver.hybrid, self.layouts[0].condition)
        self.module = TextReasoningModule(text)
        self.texts = [text_of(layout.tokens.tolist()) for layout in self.layouts]
        wanted = max(reading.max_output_tokens for reading in self.readings)
        longest = max(len(reading.prompt.tokens) for reading in self.readings)
        left = text.max_tokens - longest - solver.hybrid.config.num_back_vectors
        self.longest_draft = max(0, min(wanted, left))

    def verify(self, z_init: Tensor, texts: list[str], rows: list[int]) -> Sequence[Verdict]:
        """Refine what the reader wrote for all rows, and judge it by the probes."""
        assert rows == list(range(len(self.readings)))  # one verdict ends them all
        for row, text in enumerate(texts):
            draft = self.draft_in(text, row)
            self.drafts[row] = self.drafts[row] if draft is None else draft
        grids, q_halt, self.soft_RPH = self.refine(self.drafts, self.soft_RPH)
        self.grids.append(grids)
        self.q_halt.append(q_halt)
        return self._verdicts(grids, self.soft_RPH)

    def draft_in(self, text: str, row: int) -> Grid | None:
        """The grid in what the reader wrote, as far as a plausible output goes."""
        return parse_grid_text(text[: self.readings[row].max_output_tokens])

    def refine(
        self, drafts: Sequence[Grid | None], soft_RPH: Tensor | None
    ) -> tuple[list[Grid | None], list[float], Tensor | None]:
        """TRM's grid and halting logit for each row, and the soft prefix [R, P, H] that follows."""
        hybrid = self.solver.hybrid
        assert hybrid is not None
        rows, lengths = packed_rows(self.solver, self.queries)
        guides = [Guide(layout, d) for layout, d in zip(self.layouts, drafts, strict=True)]
        said = states(hybrid, guides, len(guides), soft_RPH)
        start = hybrid.start(said, rows.tokens, longest_visible(said))
        steps = hybrid.refine(rows, start, _num_steps(self.solver, self.inference))
        latents, prediction = deque(steps, maxlen=1).pop()
        codes = prediction.logits.argmax(-1).to(torch.uint8).cpu().numpy()
        soft = None
        if "back" in hybrid.adapters:
            soft = hybrid.soft_prefix(latents, rows.tokens, len(guides))
        return grids_on(self.queries, codes, lengths), prediction.q_halt.tolist(), soft

    def _verdicts(self, grids: Sequence[Grid | None], soft: Tensor | None) -> list[Verdict]:
        num_asked = len(self.asked)
        prefixes = [None] * len(grids) if soft is None else list(soft.float())
        probes = grids[num_asked:]
        verdicts = [
            self.verifier.verify(probes, grid, prefix)
            for grid, prefix in zip(grids[:num_asked], prefixes, strict=False)
        ]
        success, score = verdicts[0].success, verdicts[0].score
        return verdicts + [Verdict(success, score, latent_prefix=p) for p in prefixes[num_asked:]]

    def candidate(self, index: int, result: PlannerResult) -> tuple[Key, Candidate]:
        """What the best-probed attempt says of test input `index`."""
        best = result.best
        q = self.q_halt[best.number - 1][index]
        return (self.task.id, index), Candidate(
            best.verdict.prediction, q, "planner", probe=best.score
        )


def _grid_text(hybrid: Hybrid, condition: tuple[int, int, int]) -> TextReader:
    """The reader, as it reads and writes the text of grids."""
    if hybrid.hub is not None:
        return HubGridText(hybrid.hub, condition)
    assert hybrid.tiny is not None
    return TinyText(hybrid.tiny, condition)


def _num_steps(solver: Solver, inference: InferenceConfig) -> int:
    return inference.steps or solver.trm.config.halt_max_steps
