"""The verifier: judges an attempt by demonstrations that were held out, never by the answer.

A target, where one is given (training, scoring), is compared with the prediction for the metrics
alone; feedback, score and success do not know whether there is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from arctrm.data.task import Grid, Pair
from arctrm.errors import TaskError
from arctrm.planner.feedback import MAX_CELLS, feedback_text
from arctrm.planner.probes import ProbeResult, probe, to_grid, well_formed


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the verifier says about one attempt."""

    success: bool
    """Every probe is exact, and there is at least one."""
    score: float
    """Mean score of the probes, 0..1; 0 without probes."""
    feedback: str = ""
    """What the query's row may be told; see `feedback_text`."""
    probes: tuple[ProbeResult, ...] = ()
    """One per demonstration, in order."""
    probe_feedback: tuple[str, ...] = ()
    """What each probe's row may be told: feedback on the demonstrations before it only. Those
    after it were predicted with its output in sight."""
    prediction: Grid | None = None
    """The attempt's grid for the query; None where there is none."""
    latent_prefix: Tensor | None = None
    """Soft prefix [H] or [P, H] for the next attempt."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Shares (0..1) over probes and, with a target, of the prediction."""


class GridVerifier:
    """Judges predicted grids of held-out demonstrations (leave-one-out probes).

    Args:
        target_grid: the query's answer, if known: an array or a list of rows. For metrics only.
        demonstrations: `Pair`s, (input, output) tuples or {"input", "output"} objects of the task
            as it was shown; the probes are compared with their outputs. Inputs are not looked at.
        max_cells: wrong cells that a feedback text names at most.

    Raises:
        TaskError: the target or an output is no grid.
    """

    def __init__(
        self,
        target_grid: Any = None,
        demonstrations: Sequence[Any] | None = None,
        max_cells: int = MAX_CELLS,
    ):
        self.target = None if target_grid is None else to_grid(target_grid, "target_grid")
        self.outputs = tuple(_output(d, i) for i, d in enumerate(demonstrations or ()))
        self.max_cells = max_cells

    def verify(
        self, probes: Sequence[Any], prediction: Any = None, latent_prefix: Tensor | None = None
    ) -> Verdict:
        """Judge one attempt.

        Args:
            probes: for each demonstration, in order, the grid predicted while it was held out
                (None or anything that is no grid: wrong).
            prediction: the grid predicted for the query.
            latent_prefix: passed on to the next attempt.

        Raises:
            ValueError: not one probe per demonstration.
        """
        if len(probes) != len(self.outputs):
            raise ValueError(
                f"GridVerifier: got {len(probes)} probes for {len(self.outputs)} demonstrations; "
                "give one per demonstration, None where there is no grid"
            )
        results = tuple(probe(p, truth) for p, truth in zip(probes, self.outputs, strict=True))
        grid = well_formed(prediction)
        return Verdict(
            success=bool(results) and all(result.exact for result in results),
            score=_mean([result.score for result in results]),
            feedback=feedback_text(results, self.max_cells),
            probes=results,
            probe_feedback=tuple(
                feedback_text(results[:i], self.max_cells) for i in range(len(results))
            ),
            prediction=grid,
            latent_prefix=latent_prefix,
            metrics=self._probe_metrics(results) | self._target_metrics(grid),
        )

    def _probe_metrics(self, results: Sequence[ProbeResult]) -> dict[str, float]:
        return {
            f"probe_{name}": _mean([float(getattr(result, name)) for result in results])
            for name in ("exact", "shape", "palette", "cells")
            if results
        }

    def _target_metrics(self, prediction: Grid | None) -> dict[str, float]:
        if self.target is None:
            return {}
        result = probe(prediction, self.target)
        return {
            "exact_match": float(result.exact),
            "shape_match": float(result.shape),
            "cell_accuracy": result.cells,
        }


def _output(demonstration: Any, index: int) -> Grid:
    if isinstance(demonstration, Pair):
        output = demonstration.output
    elif isinstance(demonstration, Mapping):
        output = demonstration.get("output")
    else:
        _, output = demonstration
    if output is None:
        raise TaskError(
            f"demonstrations[{index}] has no output to compare a probe with; give demonstrations, "
            "not test pairs"
        )
    return to_grid(output, f"demonstrations[{index}].output")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
