"""The planner: attempts of reader, decoder and verifier, each told what was wrong with the last.

All problems of a batch are attempted together; one whose probes are all right is not sent again.
The best-judged attempt is kept, not the last one. What decodes and judges is the caller's function,
so the planner sees no answer. Legend: b problems still running, P prefix vectors, H width of the
reader.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from arctrm.errors import ConfigError
from arctrm.planner.verifier import HEADING, Verdict

VerdictLike = Verdict | tuple[bool, str]  # a `Verdict`, or just (success, feedback)
RowVerifier = Callable[[Tensor, str], VerdictLike]  # z_init [H] and the new text
BatchVerifier = Callable[[Tensor, list[str], list[int]], Sequence[VerdictLike]]
"""z_init [b, H], texts and numbers of the problems attempted -> one verdict each."""


class _ReadByName:
    """Fields by name too, `result["success"]`, as users of the older pipeline read them."""

    names: ClassVar[tuple[str, ...]] = ()

    def __getitem__(self, name: str) -> Any:
        return {known: getattr(self, known) for known in self.names}[name]

    keys = lambda self: self.names  # makes `dict(result)` work


@dataclass(frozen=True, eq=False)
class Attempt(_ReadByName):
    """One round of reader and verifier."""

    names = ("number", "text", "score", "success", "feedback", "new_tokens")

    number: int
    text: str
    new_tokens: int | None  # new tokens in it; None if the reader does not tell
    verdict: Verdict
    z_init: Tensor = field(repr=False)  # [H]: the reader's latent

    success = property(lambda self: self.verdict.success, doc="Whether every probe was right.")
    score = property(lambda self: self.verdict.score, doc="The verdict's score, 0..1.")
    feedback = property(lambda self: self.verdict.feedback, doc="What the next attempt is told.")


@dataclass(frozen=True, eq=False)
class PlannerResult(_ReadByName):
    """All attempts at one problem."""

    names = ("success", "total_attempts", "reasoning_history", "final_feedback", "metrics")

    reasoning_history: tuple[Attempt, ...]

    success = property(lambda self: self.best.success, doc="Whether an attempt was all right.")
    total_attempts = property(lambda self: len(self.reasoning_history), doc="Attempts made.")
    final_feedback = property(lambda self: self.reasoning_history[-1].feedback, doc="On the last.")

    @property
    def best(self) -> Attempt:
        """The attempt to use: a successful one, else the best score; of equals the earlier."""
        return max(self.reasoning_history, key=lambda a: (a.success, a.score, -a.number))

    @property
    def metrics(self) -> dict[str, float]:
        """The best attempt's own metrics, success_rate, best_score, avg_attempts, and
        avg_reasoning_length: the mean number of new tokens, left out if the reader does not tell.
        """
        lengths = [a.new_tokens for a in self.reasoning_history if a.new_tokens is not None]
        return {
            **self.best.verdict.metrics,
            "avg_attempts": float(self.total_attempts),
            "success_rate": float(self.success),
            "best_score": self.best.score,
            **({"avg_reasoning_length": sum(lengths) / len(lengths)} if lengths else {}),
        }


class ARCPlanner:
    """Lets a `TextReasoningModule` (or what has a `generate_latent` like it) attempt each problem
    up to `max_attempts` times, at most `max_length` new tokens each, until a verifier is content.
    """

    def __init__(self, llm_module: Any, max_attempts: int = 16, max_length: int = 128):
        if max_attempts < 1:
            raise ConfigError(f"planner: max_attempts = {max_attempts}; use 1 (no second) or more")
        self.llm_module, self.max_attempts, self.max_length = llm_module, max_attempts, max_length

    def multi_attempt_solve(
        self, problem_description: str, verifier_fn: RowVerifier
    ) -> PlannerResult:
        """Attempt one problem; `verifier_fn` gets z_init [H] and the new text."""
        verify: BatchVerifier = lambda z_init, texts, rows: [verifier_fn(z_init[0], texts[0])]
        return self.solve_batch([problem_description], verify)[0]

    def solve_batch(
        self,
        problems: Sequence[str],
        verifier_fn: BatchVerifier,
        more: Callable[[], bool] = lambda: True,
    ) -> list[PlannerResult]:
        """Attempt many problems side by side; one result each, in order. `more` is asked before
        every attempt but the first whether there is time for it.
        """
        histories: list[list[Attempt]] = [[] for _ in problems]
        for number in range(1, self.max_attempts + 1):
            running = [i for i, done in enumerate(histories) if not (done and done[-1].success)]
            if not running or (number > 1 and not more()):
                break
            last = [histories[row][-1].verdict if histories[row] else None for row in running]
            read = self._read([problems[row] for row in running], last)
            z_init = torch.stack([z for z, _, _ in read])
            verdicts = verifier_fn(z_init, [text for _, text, _ in read], running)
            for row, (z, text, length), said in zip(running, read, verdicts, strict=True):
                histories[row].append(Attempt(number, text, length, _verdict(said), z))
        return [PlannerResult(tuple(history)) for history in histories]

    def _read(
        self, problems: Sequence[str], last: Sequence[Verdict | None]
    ) -> list[tuple[Tensor, str, int | None]]:
        """(z_init, text, new tokens); problems with equally long soft prefixes are read together.

        What was wrong before stands behind the problem, whose cache can so be reused.
        """
        told = ["" if said is None else said.feedback for said in last]
        both = zip(problems, told, strict=True)
        prompts = [f"{own}\n\n{HEADING}\n{fault}" if fault else own for own, fault in both]
        prefixes = [None if said is None else said.latent_prefix for said in last]
        stacked = [None if p is None else p[None] if p.ndim == 1 else p for p in prefixes]
        lengths = [0 if prefix is None else len(prefix) for prefix in stacked]
        read: dict[int, tuple[Tensor, str, int | None]] = {}
        for length in dict.fromkeys(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            alike = [p for row in rows if (p := stacked[row]) is not None]
            prefix = torch.stack(alike) if length else None
            output = self.llm_module.generate_latent(
                [prompts[row] for row in rows], latent_prefix=prefix, max_length=self.max_length
            )
            z_init, texts = output
            counts = getattr(output, "new_tokens", None) or [None] * len(rows)
            read |= zip(rows, zip(z_init, texts, counts, strict=True), strict=True)
        return [read[row] for row in range(len(problems))]


def _verdict(said: VerdictLike) -> Verdict:
    if isinstance(said, Verdict):
        return said
    if isinstance(said, tuple) and len(said) == 2:
        return Verdict(bool(said[0]), float(bool(said[0])), str(said[1]))
    raise ValueError(f"the verifier gave {said!r}; a Verdict or a (success, feedback) is wanted")
