"""Planner: attempts until the held-out demonstrations are right; verifier; feedback text."""

from arctrm.planner.feedback import feedback_text, prompt_with_feedback
from arctrm.planner.planner import ARCPlanner, Attempt, PlannerResult, batch_metrics
from arctrm.planner.probes import ProbeResult, probe
from arctrm.planner.verifier import GridVerifier, Verdict

__all__ = [
    "ARCPlanner",
    "Attempt",
    "GridVerifier",
    "PlannerResult",
    "ProbeResult",
    "Verdict",
    "batch_metrics",
    "feedback_text",
    "probe",
    "prompt_with_feedback",
]
