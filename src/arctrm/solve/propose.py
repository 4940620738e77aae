"""Who proposes an answer: the reader writes it, TRM refines it; both see the question's view.

TRM answers a whole grid of known size in two ways: from hidden cells, which sees what the reader
missed, and (coupled) from the reader's draft, with the reader's states of it, which repairs what it
nearly had. The size is the draft's, else by the rules of `data.sizes`. Without the coupling nothing
passes from the reader to TRM: no draft, no states, no size.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arctrm.data.task import Grid
from arctrm.model import layout
from arctrm.model.layout import Prompt
from arctrm.model.trm import GPU_TOKENS, Asked, Refiner
from arctrm.reader.decoding import Decoded, decode
from arctrm.reader.protocol import Reader
from arctrm.solve.questions import Key, Question
from arctrm.system import memory_errors

# Sources of candidates: written by the reader, refined from hidden cells, refined from a draft.
READER, TRM, JOINT = "reader", "trm", "joint"

Advance = Callable[[int], None]  # is told how many questions are done
Drafts = Sequence[Grid | None]  # the reader's, of each question, as its view shows it


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposed answer in the task's own colours and orientation."""

    key: Key
    grid: Grid | None  # None where no grid came out
    q: float  # the proposer's confidence as a logit: TRM's halting logit, the reader's log-odds
    source: str = TRM
    view: int = 0  # its number
    log_p: float = 0.0  # log-probability (nats) that the proposer gave it
    steps: int | None = None  # supervision steps behind it, where TRM proposed it
    probe: float | None = None
    """Score (0..1) of the held-out demonstrations in the planner's attempt that gave it."""
    history: tuple[Grid | None, ...] = ()
    """The draft (None: hidden cells) and TRM's grid after each supervision step, where kept."""


def by_key(candidates: Iterable[Candidate]) -> dict[Key, list[Candidate]]:
    """Candidates of each test input."""
    grouped: dict[Key, list[Candidate]] = {}
    for candidate in candidates:
        grouped.setdefault(candidate.key, []).append(candidate)
    return grouped


def write(
    reader: Reader,
    questions: Sequence[Question],
    *,
    batch_size: int | None = None,
    expected: Mapping[Key, Grid] | None = None,
    follow: bool = True,
    deadline: float = math.inf,
    advance: Advance = lambda done: None,
) -> list[Decoded]:
    """The grid that the reader writes for each question, greedily, as its view shows it.

    Where the reader is faster with something to follow (and may `follow`), it follows what is
    `expected` of a test input, else what its own first view gives; this changes nothing but the
    time. Answers that have not ended at `deadline` (of `time.monotonic`) have no grid.
    """
    follows = follow and reader.follows_drafts
    known = dict(expected or {})
    found: dict[int, Decoded] = {}

    def likely(one: Question) -> Grid | None:
        """Another view's answer, or the input itself."""
        own = one.query if one.shape == one.query.shape else None
        return one.shown(known[one.key]) if one.key in known else own

    # The first view of every test input of which nothing is known, then all others.
    seen, parts = set(known), ([], [])  # type: tuple[set[Key], tuple[list[int], list[int]]]
    for index, question in enumerate(questions):
        parts[not follows or question.key in seen].append(index)
        seen.add(question.key)
    for part in filter(None, parts):
        own = [questions[index] for index in part]
        written = decode(
            reader,
            [prompt_of(one) for one in own],
            batch_size=batch_size or reader.batch_rows,
            max_output_tokens=[one.room for one in own],
            drafts=[*map(likely, own)] if follows else None,
            deadline=deadline,
            advance=advance,
        )
        found |= zip(part, written, strict=True)
        for one, text in zip(own, written, strict=True):
            if text.grid is not None and one.key not in known:
                known[one.key] = one.view.inverse(text.grid)
    return [found[index] for index in range(len(questions))]


def written(questions: Sequence[Question], decoded: Sequence[Decoded]) -> list[Candidate]:
    """The reader's candidates: what it wrote, turned back."""
    found = []
    for question, one in zip(questions, decoded, strict=True):
        grid, log_p = question.turned_back(one.grid), one.log_probability
        found.append(Candidate(question.key, grid, as_logit(log_p), READER, question.number, log_p))
    return found


def as_logit(log_probability: float) -> float:
    """The logit of a probability given by its logarithm: comparable with TRM's halting logit."""
    log_p = min(log_probability, -1e-9)
    return log_p - math.log(-math.expm1(log_p))


def prompt_of(question: Question) -> Prompt:
    """Of a question that is no inverse one."""
    assert question.prompt is not None
    return question.prompt


def refine(
    refiner: Refiner,
    questions: Sequence[Question],
    drafts: Drafts | None,
    *,
    num_steps: int | None = None,
    tokens_per_batch: int | None = None,
    keep_history: bool = False,
    advance: Advance = lambda done: None,
) -> list[Candidate]:
    """TRM's candidates, turned back, with `drafts` of the reader or without any.

    A question with a draft gives two candidates (from the draft, and from hidden cells of the
    draft's size), one without gives one. `keep_history` is about those of the first view.
    Raises ResourceError where there is too little memory.
    """
    asked = to_refine(questions, drafts)
    now = tokens_per_batch or GPU_TOKENS
    cure = f"lower it, for example --set inference.tokens_per_batch={now // 2}"
    with memory_errors(lambda: f"out of memory with inference.tokens_per_batch = {now}; {cure}"):
        own = [one for _, one in asked]
        more: dict[str, Any] = {"keep_history": keep_history, "advance": advance}
        answers = refiner.refine(own, num_steps, tokens_per_batch=tokens_per_batch, **more)
    found = []
    for (question, one), answer in zip(asked, answers, strict=True):
        source = TRM if one.draft is None else JOINT
        grid, steps = question.turned_back(answer.grid), (one.draft, *answer.history)
        is_kept = keep_history and question.number == 0
        history = tuple(map(question.turned_back, steps)) if is_kept else ()
        how = (source, question.number, answer.log_p, answer.steps, None, history)
        found.append(Candidate(question.key, grid, answer.q, *how))
    return found


def to_refine(questions: Sequence[Question], drafts: Drafts | None) -> list[tuple[Question, Asked]]:
    """What TRM is asked, question by question; see `refine`."""
    found = []
    for question, draft in zip(questions, drafts or [None] * len(questions), strict=True):
        shape = question.shape if draft is None else draft.shape
        prompt = layout.prompt(question.query, question.condition)
        for way in [None] if draft is None else [draft, None]:
            one = Asked(question.query, prompt, shape, way, question.pairs)
            found.append((question, one))
    return found
