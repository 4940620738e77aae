"""The planner: attempts of reader, decoder and verifier, each told what was wrong with the last.

All rows of a batch are attempted together; a row whose probes are all right is not sent again. The
best-judged attempt is kept, not the last one. What decodes and judges is the caller's function,
so the planner holds no model but the reader and sees no answer.

Legend: b rows still running, P prefix vectors, H width of the reader.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from arctrm.errors import ConfigError
from arctrm.planner.feedback import prompt_with_feedback
from arctrm.planner.verifier import Verdict

VerdictLike = Verdict | tuple[bool, str]
"""A `Verdict`, or just (success, feedback)."""

RowVerifier = Callable[[Tensor, str], VerdictLike]
"""z_init [H] and the new text of one attempt -> verdict."""

BatchVerifier = Callable[[Tensor, list[str], list[int]], Sequence[VerdictLike]]
"""z_init [b, H], texts and places in the batch of the rows attempted -> one verdict each."""


class LatentGenerator(Protocol):
    """A reader module; `TextReasoningModule` is the real one."""

    def generate_latent(
        self, problem_text: list[str], latent_prefix: Tensor | None = None, max_length: int = 128
    ) -> Any:
        """Something that unpacks as (z_init [b, H], new texts).

        Its `new_tokens`, if it has them, are the numbers of new tokens in each text.
        """


class _ReadByName:
    """Fields by name too, `result["success"]`, as users of the older pipeline read them."""

    names: ClassVar[tuple[str, ...]] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return getattr(self, name)

    def keys(self) -> tuple[str, ...]:
        """The names that can be read; makes `dict(result)` work."""
        return self.names


@dataclass(frozen=True, eq=False)
class Attempt(_ReadByName):
    """One round of reader and verifier."""

    names = ("number", "text", "score", "success", "feedback", "new_tokens")

    number: int
    """From 1."""
    text: str
    """New text of the reader."""
    new_tokens: int | None
    """New tokens in it; None if the reader does not tell."""
    verdict: Verdict
    """What the verifier said."""
    z_init: Tensor = field(repr=False)
    """[H]: the reader's latent."""

    @property
    def success(self) -> bool:
        """Whether every probe was right."""
        return self.verdict.success

    @property
    def score(self) -> float:
        """The verdict's score, 0..1."""
        return self.verdict.score

    @property
    def feedback(self) -> str:
        """What the next attempt is told."""
        return self.verdict.feedback


@dataclass(frozen=True, eq=False)
class PlannerResult(_ReadByName):
    """All attempts at one problem."""

    names = ("success", "total_attempts", "reasoning_history", "final_feedback", "metrics")

    reasoning_history: tuple[Attempt, ...]
    """Every attempt, in order."""

    @property
    def best(self) -> Attempt:
        """The attempt to use: a successful one, else the best score; of equals the earlier."""
        return max(self.reasoning_history, key=lambda a: (a.success, a.score, -a.number))

    @property
    def success(self) -> bool:
        """Whether an attempt had every probe right."""
        return self.best.success

    @property
    def total_attempts(self) -> int:
        """Attempts made."""
        return len(self.reasoning_history)

    @property
    def final_feedback(self) -> str:
        """Feedback on the last attempt."""
        return self.reasoning_history[-1].feedback

    @property
    def metrics(self) -> dict[str, float]:
        """avg_attempts, success_rate, avg_reasoning_length, and the best attempt's own metrics.

        avg_reasoning_length is the mean number of new tokens per attempt, left out if the reader
        does not tell.
        """
        lengths = [a.new_tokens for a in self.reasoning_history if a.new_tokens is not None]
        own = {
            "avg_attempts": float(self.total_attempts),
            "success_rate": float(self.success),
            "best_score": self.best.score,
        }
        if lengths:
            own["avg_reasoning_length"] = sum(lengths) / len(lengths)
        return {**self.best.verdict.metrics, **own}


def batch_metrics(results: Sequence[PlannerResult]) -> dict[str, float]:
    """Each metric averaged over the samples that have it: every sample counts once."""
    rows = [result.metrics for result in results]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


class ARCPlanner:
    """Attempts until verified, or `max_attempts`.

    Args:
        llm_module: the reader; see `LatentGenerator`.
        max_attempts: attempts per problem, at least 1.
        max_length: new tokens per attempt at most.

    Raises:
        ConfigError: fewer than one attempt.
    """

    def __init__(self, llm_module: LatentGenerator, max_attempts: int = 16, max_length: int = 128):
        if max_attempts < 1:
            raise ConfigError(
                f"planner: max_attempts = {max_attempts} leaves nothing to do; "
                "use 1 (no second attempt) or more, 16 by default"
            )
        self.llm_module = llm_module
        self.max_attempts = max_attempts
        self.max_length = max_length

    def multi_attempt_solve(
        self, problem_description: str, verifier_fn: RowVerifier
    ) -> PlannerResult:
        """Attempt one problem; `verifier_fn` gets z_init [H] and the new text."""

        def verify(z_init: Tensor, texts: list[str], rows: list[int]) -> Sequence[VerdictLike]:
            return [verifier_fn(z_init[0], texts[0])]

        return self.solve_batch([problem_description], verify)[0]

    def solve_batch(
        self,
        problems: Sequence[str],
        verifier_fn: BatchVerifier,
        more: Callable[[], bool] = lambda: True,
    ) -> list[PlannerResult]:
        """Attempt many problems side by side; one result each, in order.

        `verifier_fn` gets z_init [b, H], the texts, and which problems they belong to; `more` is
        asked before every attempt but the first whether there is time for it.
        """
        histories: list[list[Attempt]] = [[] for _ in problems]
        for number in range(self.max_attempts):
            running = [i for i, done in enumerate(histories) if not (done and done[-1].success)]
            if not running or (number and not more()):
                break
            read = self._read(problems, histories, running)
            z_init = torch.stack([z for z, _, _ in read])
            verdicts = verifier_fn(z_init, [text for _, text, _ in read], running)
            for row, (z, text, length), said in zip(running, read, verdicts, strict=True):
                number = len(histories[row]) + 1
                histories[row].append(Attempt(number, text, length, _verdict(said), z))
        return [PlannerResult(tuple(history)) for history in histories]

    def _read(
        self, problems: Sequence[str], histories: Sequence[list[Attempt]], running: list[int]
    ) -> list[tuple[Tensor, str, int | None]]:
        """(z_init, text, new tokens) of the running rows, told what was wrong before."""
        last = {row: histories[row][-1].verdict if histories[row] else None for row in running}
        read: dict[int, tuple[Tensor, str, int | None]] = {}
        for rows, prefix in _same_prefix({row: _prefix(said) for row, said in last.items()}):
            prompts = [
                prompt_with_feedback(problems[row], said.feedback if (said := last[row]) else "")
                for row in rows
            ]
            output = self.llm_module.generate_latent(
                prompts, latent_prefix=prefix, max_length=self.max_length
            )
            z_init, texts = output
            lengths = getattr(output, "new_tokens", None)
            lengths = [None] * len(texts) if lengths is None else [int(n) for n in lengths]
            read |= zip(rows, zip(z_init, texts, lengths, strict=True), strict=True)
        return [read[row] for row in running]


def _same_prefix(
    prefixes: dict[int, Tensor | None],
) -> Iterator[tuple[list[int], Tensor | None]]:
    """Rows that can be read together: those with equally long prefixes, stacked [b, P, H]."""
    groups: dict[int, list[int]] = {}
    for row, prefix in prefixes.items():
        groups.setdefault(0 if prefix is None else len(prefix), []).append(row)
    for length, rows in groups.items():
        found = [prefix for row in rows if (prefix := prefixes[row]) is not None]
        yield rows, torch.stack(found) if length else None


def _prefix(said: Verdict | None) -> Tensor | None:
    """The prefix [P, H] that a verdict passes on."""
    if said is None or said.latent_prefix is None:
        return None
    prefix = said.latent_prefix
    return prefix[None] if prefix.ndim == 1 else prefix


def _verdict(said: VerdictLike) -> Verdict:
    if isinstance(said, Verdict):
        return said
    if isinstance(said, tuple) and len(said) == 2:
        success, feedback = said
        return Verdict(bool(success), float(bool(success)), str(feedback))
    raise ValueError(
        f"the verifier function returned {type(said).__name__}; it must return a Verdict or a "
        "(success, feedback) tuple for every row"
    )
