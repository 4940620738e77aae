"""What `solve` shows: the task, the two attempts at each test input, and what speaks for them.

Test outputs are never read here, even when the task still carries them: whether an attempt is
right is told from outside, by `correct`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arctrm.data.render import MAX_WIDE, grid_panel, pair_row, side_by_side
from arctrm.data.task import Grid, Task
from arctrm.invariants.shared import weights
from arctrm.planner import PlannerResult
from arctrm.solving.vote import Evidence

MOST_NAMED = 3
"""Of what all demonstrations keep and an attempt breaks, so many are named, the heaviest."""
Verdicts = Sequence[bool | None]
"""Whether attempt_1 and attempt_2 are right; None where the answer is not known."""


@dataclass(frozen=True, eq=False)
class Solution:
    """The two grids for one test input, with the evidence for each."""

    attempts: tuple[Grid, Grid]
    evidence: tuple[Evidence, Evidence]
    adaptation_steps: int = 0
    """Optimiser steps of adaptation before the last answers."""
    seconds: float = 0.0
    """Wall-clock time from start to these attempts."""
    known: bool = False
    """Whether the model was trained on the task's demonstrations."""
    history: PlannerResult | None = None
    """The planner's attempts; None where it made none."""


def solution_report(
    task: Task, solutions: Sequence[Solution], correct: Sequence[Verdicts] | None = None
) -> RenderableType:
    """The demonstrations, then each test input with attempt_1 and attempt_2 side by side.

    Args:
        task: demonstrations and test inputs; its test outputs are not looked at.
        solutions: one per test input, in order.
        correct: per test input whether each attempt is right (`scoring.judge`); without it,
            right and wrong are not shown.
    """
    wide = _widest(task, solutions) <= MAX_WIDE
    demonstrations = [
        pair_row(pair, f"demonstration {number}", wide)
        for number, pair in enumerate(task.demonstrations, 1)
    ]
    parts: list[RenderableType] = [Text(task.id, "bold underline"), side_by_side(demonstrations)]
    for index, (pair, solution) in enumerate(zip(task.test, solutions, strict=True)):
        title = f"test {index + 1}" if len(task.test) > 1 else "test"
        verdicts = (None, None) if correct is None else correct[index]
        attempts = _attempts_row(solution, verdicts, wide)
        parts += [
            Text(),
            side_by_side([grid_panel(pair.input, title, wide), attempts]),
            _effort(solution),
        ]
    return Group(*parts)


def _attempts_row(solution: Solution, verdicts: Verdicts, wide: bool) -> RenderableType:
    """Both attempts in one unbreakable row: a narrow terminal moves the pair, not one of them."""
    row = Table.grid(padding=(0, 3, 0, 0))
    row.add_row(
        *(
            Group(
                grid_panel(grid, f"attempt_{number}", wide), *_verdict(verdict), _evidence(evidence)
            )
            for number, (grid, verdict, evidence) in enumerate(
                zip(solution.attempts, verdicts, solution.evidence, strict=True), 1
            )
        )
    )
    return row


def _verdict(right: bool | None) -> list[Text]:
    if right is None:
        return []
    return [Text("right", "bold green") if right else Text("wrong", "bold red")]


def _evidence(evidence: Evidence) -> Text:
    by_trm = set(evidence.votes_by) <= {"trm"} and evidence.reader_score is None
    lines = [f"{evidence.votes} of {evidence.views} {'views' if by_trm else 'answers'}"]
    if not by_trm and evidence.votes:
        lines.append(", ".join(f"{who} {votes}" for who, votes in evidence.votes_by.items()))
    if evidence.votes:
        lines.append(f"mean q {evidence.mean_q:.2f}")
    if evidence.reader_score is not None:
        lines.append(f"reader log p {evidence.reader_score:.2f}")
    if evidence.probe is not None:
        lines.append(f"probe score {evidence.probe:.2f}")
    if evidence.leave_one_out is not None:
        lines.append(f"leave-one-out {evidence.leave_one_out:.0%}")
    broken = [name for name in evidence.broken if name in weights()]
    if broken:
        lines.append("unlike all demonstrations in:")
        lines += [f"  {name}" for name in broken[:MOST_NAMED]]
        if len(broken) > MOST_NAMED:
            lines.append(f"  and {len(broken) - MOST_NAMED} more")
    return Text("\n".join(lines), "dim")


def _effort(solution: Solution) -> Text:
    steps = f"{solution.adaptation_steps} adaptation steps"
    if solution.known:
        steps = "known to the model, " + (steps if solution.adaptation_steps else "not adapted")
    return Text(f"{steps}, {solution.seconds:.1f} s", "dim")


def _widest(task: Task, solutions: Sequence[Solution]) -> int:
    grids = [pair.input for pair in (*task.demonstrations, *task.test)]
    grids += [pair.output for pair in task.demonstrations if pair.output is not None]
    grids += [grid for solution in solutions for grid in solution.attempts]
    return max(grid.shape[1] for grid in grids)
