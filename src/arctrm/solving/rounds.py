"""What one set of weights says of a task: answers view by view, then the reader's judgement.

Work is done in chunks that are expected to end in time. What each chunk costs is learned by
`Pace`, for reading, refining and judging apart.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from arctrm.config import SolveConfig
from arctrm.data.task import Grid, Task
from arctrm.planner import PlannerResult
from arctrm.solving.candidates import Key, batch_of, by_key
from arctrm.solving.pace import Pace
from arctrm.solving.pool import Proposals, Question, pooled, proposals, questions
from arctrm.solving.reading import (
    READER,
    Reading,
    batch_size,
    judge,
    reranked,
    task_readings,
    to_judge,
)
from arctrm.solving.vote import Candidate, Ranked, vote
from arctrm.solving.weights import Solver

ROWS_OF_A_STEP = 8
"""Every token decoded costs as much as so many rows, beside the rows themselves (measured)."""
PROMPT_TOKENS = 64
"""Tokens of a prompt, read at once, that cost as much as one that is decoded."""
LONG_FIRST = 300
"""Output tokens above which TRM, where there is one, gives the first answer: it writes all cells
at once."""
SAMPLE_TOKENS = 16
"""Output tokens of a reading that only learns the pace."""
LONGER = 1.5
"""A token of a long answer costs so many times one of the sample: its cache is longer."""
JUDGE_SHARE = 0.25
"""Share of the time left that is kept for the reader's judgement, at most."""

Tell = Callable[[str], None]


@dataclass
class Round:
    """What one set of weights answered."""

    candidates: dict[Key, list[Candidate]] = field(default_factory=dict)
    judged: list[tuple[Key, list[float]]] = field(default_factory=list)
    """The reader's log-probabilities of the best grids of a test input, one entry per view."""
    histories: tuple[PlannerResult, ...] = ()
    """The planner's attempts at each test input, where it made some."""
    adaptation_steps: int = 0
    seconds: float = 0.0
    """From the start of the task to these answers."""

    def complete(self, task: Task) -> bool:
        """Whether every test input has a candidate."""
        return all((task.id, index) in self.candidates for index in range(len(task.test)))

    def add(self, found: Sequence[tuple[Key, Candidate]]) -> None:
        """Take in more candidates."""
        for key, own in by_key(found).items():
            self.candidates.setdefault(key, []).extend(own)

    def read(self, seed: int) -> dict[Key, Grid]:
        """The grid that readers wrote under most views, of every test input that has one."""
        ranked = {
            key: vote([one for one in own if one.source.startswith(READER)], seed)
            for key, own in self.candidates.items()
        }
        return {key: own[0].grid for key, own in ranked.items() if own}

    def rankings(self, task: Task, seed: int) -> dict[Key, list[Ranked]]:
        """Each test input's grids, best first: by the reader where it judged, else by votes."""
        keys = [(task.id, index) for index in range(len(task.test))]
        by_votes = {key: vote(self.candidates.get(key, []), seed) for key in keys}
        return reranked(by_votes, self.judged) if self.judged else by_votes


def answer_first(
    result: Round, solver: Solver, task: Task, config: SolveConfig, pace: Pace
) -> None:
    """One view of every test input, whatever the time: by the reader where it is quick, or TRM."""
    solver = solver.without_ensemble()  # the quickest answer
    asked = questions(solver, [task], 1, config.seed)
    long = max((q.reading.max_output_tokens for q in asked if q.reading is not None), default=0)
    if solver.reader is None or (long > LONG_FIRST and solver.has_trm):
        _ask(result, solver, asked, config, pace, reading=False)
    else:
        # Without drafts: what reading costs at most is learned from it.
        _ask(result, solver, asked, config, pace, refining=False, with_drafts=False)
    judge_best(result, solver, task, config, pace, views=1)
    if solver.reader is not None and not pace.knows("read") and pace.left():
        _sample_reading(solver, asked[0], config, pace)


def _sample_reading(solver: Solver, question: Question, config: SolveConfig, pace: Pace) -> None:
    """Learn the pace of reading from the first tokens of an answer."""
    assert question.reading is not None
    short = replace(question.reading, max_output_tokens=SAMPLE_TOKENS)
    sample, begin = [replace(question, reading=short)], time.monotonic()
    proposals(solver, sample, config, with_drafts=False)
    pace.record(
        "read", reading_work(sample, solver), LONGER * (time.monotonic() - begin), warm=True
    )


def answer_views(
    result: Round, solver: Solver, task: Task, config: SolveConfig, pace: Pace, tell: Tell
) -> None:
    """Answer view by view, into `result`, until the views or the time are used up.

    Where reading takes too long, TRM answers alone.
    """
    views = config.inference.views
    rest = questions(solver, [task], views, config.seed)
    done, kept = 0, judging_seconds(solver, task, config, pace)
    reading = solver.reader is not None
    while rest:
        seconds = pace.left() - (kept if done else 0.0)  # an answer comes before its judgement
        chunk = _next_chunk(rest, solver, len(task.test), config, pace, seconds, reading)
        if not chunk and reading and solver.has_trm:
            reading = False
            continue
        if not chunk:
            break
        _ask(result, solver, chunk, config, pace, reading=reading)
        rest, done = rest[len(chunk) :], done + len(chunk)
        tell(f"answering, view {-(-done // len(task.test))} of {views}")


def answering_seconds(solver: Solver, task: Task, config: SolveConfig, pace: Pace) -> float | None:
    """What all views and the judgement should take; None where it is not known."""
    works = ("read",) * (solver.reader is not None) + ("refine",) * solver.has_trm
    if not all(pace.knows(work) for work in works):
        return None
    asked = questions(solver, [task], config.inference.views, config.seed)
    return asking_seconds(solver, asked, pace) + judging_seconds(solver, task, config, pace)


def least_seconds(solver: Solver, task: Task, config: SolveConfig, pace: Pace) -> float:
    """What one view should take: of TRM, where there is one."""
    asked = questions(solver, [task], 1, config.seed)
    return asking_seconds(solver, asked, pace, reading=not solver.has_trm)


def asking_seconds(
    solver: Solver, asked: Sequence[Question], pace: Pace, reading: bool = True
) -> float:
    """What reading (unless it is left out) and refining should take."""
    read = pace.seconds("read", reading_work(asked, solver)) if reading else 0.0
    return read + pace.seconds("refine", cells(asked))


def judging_seconds(solver: Solver, task: Task, config: SolveConfig, pace: Pace) -> float:
    """What the judgement of the best candidates should take."""
    if solver.reader is None or config.reader.rank == "votes":
        return 0.0
    readings = task_readings(solver, task, config.reader.scoring_views, config.seed)
    candidates = config.reader.scored_candidates
    tokens = sum(len(r.prompt.tokens) + candidates * r.max_output_tokens for r in readings)
    tokens *= len(solver.readers)
    return min(pace.seconds("judge", tokens), pace.left() * JUDGE_SHARE)


def judge_best(
    result: Round,
    solver: Solver,
    task: Task,
    config: SolveConfig,
    pace: Pace,
    tell: Tell = lambda text: None,
    views: int | None = None,
) -> None:
    """Let the readers judge the best candidates, view by view, while there is time.

    Where not even one view of all would end in time, fewer candidates are judged.
    """
    decoding = config.reader
    if not solver.readers or decoding.rank == "votes" or pace.left() == 0:
        return
    grids = to_judge(result.rankings(task, config.seed), decoding)
    readings = task_readings(solver, task, views or decoding.scoring_views, config.seed)
    step = len(task.test)
    groups = [
        (reader, readings[begin : begin + step])
        for begin in range(0, len(readings), step)
        for reader in solver.readers
    ]
    while _too_slow(groups[0][1], grids, pace) and max(map(len, grids.values())) > 1:
        grids = {key: own[: -(-len(own) // 2)] for key, own in grids.items()}
    for number, (reader, group) in enumerate(groups):
        if _too_slow(group, grids, pace):
            break
        view = 1 + number // len(solver.readers)
        tell(f"judging, view {view} of {len(readings) // step}")
        begin = time.monotonic()
        result.judged += judge(reader, group, grids, decoding)
        pace.record("judge", _judging_work(group, grids), time.monotonic() - begin)
        result.seconds = pace.elapsed()


def _ask(
    result: Round,
    solver: Solver,
    asked: Sequence[Question],
    config: SolveConfig,
    pace: Pace,
    reading: bool = True,
    refining: bool = True,
    with_drafts: bool = True,
) -> None:
    """The candidates of some questions into `result`, and what they cost into `pace`."""
    drafts: Proposals | None = None
    if solver.reader is not None:
        drafts, begin = [[[] for _ in asked] for _ in solver.readers], time.monotonic()
        if reading:
            expected = result.read(config.seed)
            drafts = proposals(solver, asked, config, expected=expected, with_drafts=with_drafts)
            pace.record("read", reading_work(asked, solver), time.monotonic() - begin)
    begin = time.monotonic()
    ablation = None if refining else "no-trm"
    result.add(pooled(solver, asked, drafts, config, ablation=ablation))
    if solver.has_trm and refining:
        pace.record("refine", cells(asked), time.monotonic() - begin)
    result.seconds = pace.elapsed()


def _next_chunk(
    rest: Sequence[Question],
    solver: Solver,
    step: int,
    config: SolveConfig,
    pace: Pace,
    seconds: float,
    reading: bool,
) -> Sequence[Question]:
    """The next views, whole: as many as one batch holds and `seconds` allow; may be none.

    A view is `step` questions.
    """
    count = max(1, _batch(rest, solver, step, config, pace, reading) // step)
    while count and asking_seconds(solver, rest[: count * step], pace, reading) > seconds:
        count //= 2
    return rest[: count * step]


def _batch(
    rest: Sequence[Question],
    solver: Solver,
    step: int,
    config: SolveConfig,
    pace: Pace,
    reading: bool,
) -> int:
    """Questions of a batch; `step` where TRM's pace is still to be learned."""
    if solver.has_trm and not pace.knows("refine"):
        return step
    if solver.reader is None or not reading:
        queries = [question.query for question in rest if question.query is not None]
        return batch_of(solver, queries, config.inference)
    return batch_size(solver.reader, config.reader)


def reading_work(asked: Sequence[Question], solver: Solver) -> int:
    """What reading costs, in tokens of one row: a batch is as long as its longest answer. Every
    reader reads it.
    """
    readings = [question.reading for question in asked if question.reading is not None]
    lengths = [r.max_output_tokens + len(r.prompt.tokens) // PROMPT_TOKENS for r in readings]
    of_one = (ROWS_OF_A_STEP + len(lengths)) * max(lengths, default=0)
    return of_one * len(solver.readers)


def cells(asked: Sequence[Question]) -> int:
    """Cells of TRM's canvases."""
    return sum(question.query.codes.size for question in asked if question.query is not None)


def _judging_work(readings: Sequence[Reading], grids: dict[Key, list[Grid]]) -> int:
    """Tokens of prompts and candidates."""
    prompts = sum(len(reading.prompt.tokens) for reading in readings)
    return prompts + sum(grid.size + len(grid) for r in readings for grid in grids[r.key])


def _too_slow(readings: Sequence[Reading], grids: dict[Key, list[Grid]], pace: Pace) -> bool:
    return pace.seconds("judge", _judging_work(readings, grids)) > pace.left()
