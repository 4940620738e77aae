"""What one set of weights says of a task: answers view by view, then the reader's judgement.

Work is done in chunks that are expected to end in time. What each chunk costs is learned by
`Pace`, for reading, refining and judging apart.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from arctrm.config import SolveConfig
from arctrm.data.task import Grid, Task
from arctrm.planner import PlannerResult
from arctrm.solving.candidates import Key, batches, by_key
from arctrm.solving.pace import Pace
from arctrm.solving.pool import Question, pooled, proposals, questions
from arctrm.solving.reading import Reading, batch_size, judge, reranked, task_readings, to_judge
from arctrm.solving.vote import Candidate, Ranked, vote
from arctrm.solving.weights import Solver

LEAST_ROWS = 4
"""Reading one prompt takes nearly as long as reading so many side by side."""
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

    def rankings(self, task: Task, seed: int) -> dict[Key, list[Ranked]]:
        """Each test input's grids, best first: by the reader where it judged, else by votes."""
        keys = [(task.id, index) for index in range(len(task.test))]
        by_votes = {key: vote(self.candidates.get(key, []), seed) for key in keys}
        return reranked(by_votes, self.judged) if self.judged else by_votes


def answer_first(
    result: Round, solver: Solver, task: Task, config: SolveConfig, pace: Pace
) -> None:
    """One view of every test input, whatever the time: by the reader, else by TRM."""
    asked = questions(solver, [task], 1, config.seed)
    _ask(result, solver, asked, config, pace, "no-trm" if solver.reader is not None else None)
    judge_best(result, solver, task, config, pace, views=1)


def answer_views(
    result: Round, solver: Solver, task: Task, config: SolveConfig, pace: Pace, tell: Tell
) -> None:
    """Answer view by view, into `result`, until the views or the time are used up."""
    views = config.inference.views
    rest = questions(solver, [task], views, config.seed)
    done, kept = 0, judging_seconds(solver, task, config, pace)
    while rest:
        chunk = _next_chunk(rest, solver, len(task.test), config, pace, pace.left() - kept)
        if not chunk:
            break
        _ask(result, solver, chunk, config, pace)
        rest, done = rest[len(chunk) :], done + len(chunk)
        tell(f"answering, view {-(-done // len(task.test))} of {views}")


def answering_seconds(solver: Solver, task: Task, config: SolveConfig, pace: Pace) -> float | None:
    """What all views and the judgement should take; None where it is not known."""
    works = ("read",) * (solver.reader is not None) + ("refine",) * solver.has_trm
    if not all(pace.knows(work) for work in works):
        return None
    asked = questions(solver, [task], config.inference.views, config.seed)
    return asking_seconds(asked, pace) + judging_seconds(solver, task, config, pace)


def asking_seconds(asked: Sequence[Question], pace: Pace) -> float:
    """What reading and refining should take."""
    return pace.seconds("read", reading_work(asked)) + pace.seconds("refine", cells(asked))


def judging_seconds(solver: Solver, task: Task, config: SolveConfig, pace: Pace) -> float:
    """What the judgement of the best candidates should take."""
    if solver.reader is None or config.reader.rank == "votes":
        return 0.0
    readings = task_readings(solver, task, config.reader.scoring_views, config.seed)
    candidates = config.reader.scored_candidates
    tokens = sum(len(r.prompt.tokens) + candidates * r.max_output_tokens for r in readings)
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
    """Let the reader judge the best candidates, view by view, while there is time.

    Where not even one view of all would end in time, fewer candidates are judged.
    """
    reader, decoding = solver.reader, config.reader
    if reader is None or decoding.rank == "votes" or pace.left() == 0:
        return
    grids = to_judge(result.rankings(task, config.seed), decoding)
    readings = task_readings(solver, task, views or decoding.scoring_views, config.seed)
    step = len(task.test)
    groups = [readings[begin : begin + step] for begin in range(0, len(readings), step)]
    while _too_slow(groups[0], grids, pace) and max(map(len, grids.values())) > 1:
        grids = {key: own[: -(-len(own) // 2)] for key, own in grids.items()}
    for number, group in enumerate(groups, 1):
        if _too_slow(group, grids, pace):
            break
        tell(f"judging, view {number} of {len(groups)}")
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
    ablation: str | None = None,
) -> None:
    """The candidates of some questions into `result`, and what they cost into `pace`."""
    drafts, begin = None, time.monotonic()
    if solver.reader is not None:
        drafts = proposals(solver, asked, config)
        pace.record("read", reading_work(asked), time.monotonic() - begin)
    begin = time.monotonic()
    result.add(pooled(solver, asked, drafts, config, ablation=ablation))
    if solver.has_trm and ablation != "no-trm":
        pace.record("refine", cells(asked), time.monotonic() - begin)
    result.seconds = pace.elapsed()


def _next_chunk(
    rest: Sequence[Question],
    solver: Solver,
    step: int,
    config: SolveConfig,
    pace: Pace,
    seconds: float,
) -> Sequence[Question]:
    """The next questions: as many as one batch holds and `seconds` allow; may be none."""
    chunk = rest[: _batch(rest, solver, step, config, pace)]
    while chunk and asking_seconds(chunk, pace) > seconds:
        chunk = chunk[: len(chunk) // 2]
    return chunk


def _batch(
    rest: Sequence[Question], solver: Solver, step: int, config: SolveConfig, pace: Pace
) -> int:
    """Questions of a batch; `step` where TRM's pace is still to be learned."""
    if solver.reader is None:
        queries = [question.query for question in rest if question.query is not None]
        return len(next(batches(solver, queries, config.inference)))
    if solver.has_trm and not pace.knows("refine"):
        return step
    return batch_size(solver.reader, config.reader)


def reading_work(asked: Sequence[Question]) -> int:
    """Tokens of the reader's batch, padding included."""
    lengths = [
        len(question.reading.prompt.tokens) + question.reading.max_output_tokens
        for question in asked
        if question.reading is not None
    ]
    return max(LEAST_ROWS, len(lengths)) * max(lengths, default=0)


def cells(asked: Sequence[Question]) -> int:
    """Cells of TRM's canvases."""
    return sum(question.query.codes.size for question in asked if question.query is not None)


def _judging_work(readings: Sequence[Reading], grids: dict[Key, list[Grid]]) -> int:
    """Tokens of prompts and candidates."""
    prompts = sum(len(reading.prompt.tokens) for reading in readings)
    return prompts + sum(grid.size + len(grid) for r in readings for grid in grids[r.key])


def _too_slow(readings: Sequence[Reading], grids: dict[Key, list[Grid]], pace: Pace) -> bool:
    return pace.seconds("judge", _judging_work(readings, grids)) > pace.left()
