"""Planner: attempts until the held-out demonstrations are right; verifier; feedback text."""

from arctrm.planner.planner import ARCPlanner, Attempt, PlannerResult
from arctrm.planner.verifier import GridVerifier, ProbeResult, Verdict

__all__ = ["ARCPlanner", "Attempt", "GridVerifier", "PlannerResult", "ProbeResult", "Verdict"]
