"""The planner at solve time: the reader drafts, TRM refines, held-out demonstrations judge.

Every demonstration is asked for just as the test input is (a probe): its row is shown the other
demonstrations only, and nothing that is asked depends on its output. What comes back for the next
attempt is what training trained: a hub reader with the path back writes behind a soft prefix of
TRM's latents; a trunk's TRM begins with its own last answer.
"""

import itertools
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from arctrm.data.task import Grid
from arctrm.model.trm import Refined, Refiner, lay_out, read_off
from arctrm.planner import ARCPlanner, GridVerifier, PlannerResult, Verdict
from arctrm.reader.text import GridText, grid_text, parse_grid_text
from arctrm.reader.text_module import TextReasoningModule
from arctrm.solve.adapt import probe_task
from arctrm.solve.budget import PLAN_SHARE, Session, reading_work
from arctrm.solve.propose import Candidate, to_refine
from arctrm.solve.questions import Question
from arctrm.solve.weights import Solver

PLANNER = "planner"  # source of its candidates


def can_plan(solver: Solver) -> bool:
    """Whether another attempt can differ from the last."""
    hears = getattr(solver.model, "closes_the_loop", not solver.reads_pairs)
    return solver.speaks_both and bool(hears)


def planning_seconds(session: Session) -> float:
    """Time kept for the planner while views are read and refined: a trunk's gets what is left."""
    hears = session.solver.reads_pairs and can_plan(session.solver)
    return PLAN_SHARE * session.clock.left() if hears and session.config.max_attempts > 1 else 0.0


@torch.no_grad()
def plan(session: Session, kept: float) -> tuple[tuple[PlannerResult, ...], list[Candidate]]:
    """Attempts at the test inputs until every probe is right: what was tried, and the best of each.
    Nothing without two demonstrations, or time for two attempts beside `kept` seconds.
    """
    solver, task, most = session.solver, session.task, session.config.max_attempts
    if not can_plan(solver) or most < 2 or len(task.demonstrations) < 2:
        return (), []
    # A probe has other demonstrations, so that its task is known by its name only.
    row = solver.row_of(task)
    known = {task.id: solver.mean_row if row is None else row}
    session = replace(session, solver=replace(solver, rows=known, by_content=False))
    rows = [_Row(session, question) for question in session.questions(1)]
    held_out = [probe_task(task, index) for index in range(len(task.demonstrations))]
    probes = [_Row(session, replace(session, task=own).questions(1)[0]) for own in held_out]
    each = sum(own.seconds() for own in (*rows, *probes))
    most = min(most, int(max(0.0, session.clock.left() - kept) / max(each, 1e-9)))
    if most < 2:
        return (), []
    verifier = GridVerifier(demonstrations=task.demonstrations)
    # Grids of the probes in every attempt so far: they do not depend on the test input.
    judged: list[list[Grid | None]] = []
    results, candidates = [], []
    for own in rows:

        def verify(z_init: Tensor, text: str, own: _Row = own) -> Verdict:
            answer = own.answer(text)
            if len(judged) < len(own.answers):
                judged.append([probe.attempt().grid for probe in probes])
            return verifier.verify(judged[len(own.answers) - 1], answer.grid, own.soft)

        session.clock.tell(f"test input {own.question.key.index + 1} of {len(rows)}")
        planner = ARCPlanner(own, most, own.question.room)
        results.append(result := planner.multi_attempt_solve(own.text, verify))
        key, said, best = own.question.key, own.answers[result.best.number - 1], result.best
        more = {"log_p": said.log_p, "steps": said.steps, "probe": best.score}
        candidates.append(Candidate(key, said.grid, said.q, PLANNER, own.question.number, **more))
    return tuple(results), candidates


class _Row:
    """A test input or a probe, attempt by attempt; the planner's reader module for it."""

    def __init__(self, session: Session, question: Question):
        self.session, self.question = session, question
        self.module = TextReasoningModule(GridText(session.solver.reader, question.condition))
        grids = [*itertools.chain(*((p.input, p.output) for p in question.pairs)), question.query]
        both = zip(itertools.cycle(("input", "output")), grids, strict=False)
        self.text = "\n".join(f"{kind}\n{grid_text(g)}" for kind, g in both if g is not None)
        self.answers: list[Refined] = []  # of TRM, one for each attempt
        self.soft: Tensor | None = None  # what TRM tells the reader for the next attempt, [P, H]
        self._written: Any = None

    def seconds(self) -> float:
        # Of one attempt, in which the reader follows nothing.
        session, work = self.session, reading_work([self.question])
        kinds = ("read",) if self.question.pairs else ("read", "refine")
        reading = max(session.clock.seconds(kind, work) for kind in kinds)
        return reading + session.refining_seconds([self.question], session.most_steps)

    def generate_latent(
        self, problem_text: list[str], latent_prefix: Tensor | None = None, max_length: int = 128
    ) -> Any:
        """As `TextReasoningModule`; without a soft prefix the same is written every time."""
        if self._written is None or latent_prefix is not None:
            self._written = self.module.generate_latent(problem_text, latent_prefix, max_length)
        return self._written

    def attempt(self) -> Refined:
        soft = None if self.soft is None else self.soft[None]
        return self.answer(self.generate_latent([self.text], soft, self.question.room).text[0])

    def answer(self, text: str) -> Refined:
        """TRM's answer, from the draft in a text, or its own last one where that stays the same."""
        draft = parse_grid_text(text)
        if self.answers and self.soft is None:
            draft = self.answers[-1].grid
        refiner, steps = cast(Refiner, self.session.solver.refiner), self.session.most_steps
        asked = to_refine([self.question], [draft])[0][1]
        if not self.question.pairs:
            self.answers += refiner.refine([asked], steps)
        else:
            hybrid: Any = self.session.solver.model
            rows, _ = lay_out([asked], hybrid.trunk.device, hybrid.trunk.dtype)
            said = list(hybrid.steps(rows, hybrid.listen([asked], len(rows.tokens)), steps))
            self.soft = hybrid.soft_prefix(rows, said[-1])[0]
            self.answers += read_off(rows, iter(said), [asked])
        return self.answers[-1]
