"""What one set of weights says of a task: answers view by view, then the reader's judgement.

Work is done in chunks that are expected to end in time. What each chunk costs is learned by
`Pace`, for reading, refining and judging apart.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from arctrm.config import SolveConfig
from arctrm.data.task import Grid, Task
from arctrm.hybrid import READER
from arctrm.planner import PlannerResult
from arctrm.reader.decoding import Decoded, follows_drafts
from arctrm.solving.candidates import Key, batch_of, by_key
from arctrm.solving.checked import Checker
from arctrm.solving.costs import (
    JUDGE_SHARE,
    asking_seconds,
    cells,
    explaining_work,
    judging_seconds,
    judging_work,
    reading_work,
    too_slow,
)
from arctrm.solving.inverse import (
    explained,
    inverse_readings,
    is_asked,
    judge_inputs,
    knows_inverse,
    to_explain,
)
from arctrm.solving.pace import Pace
from arctrm.solving.pool import (
    Question,
    proposals,
    questions,
    readers_candidates,
    trm_candidates,
)
from arctrm.solving.reading import (
    batch_size,
    judge,
    reranked,
    task_readings,
    to_judge,
)
from arctrm.solving.vote import Candidate, Ranked, vote
from arctrm.solving.weights import Solver

LONG_FIRST = 300
"""Output tokens above which TRM, where there is one, gives the first answer: it writes all cells
at once."""
SAMPLE_TOKENS = 16
"""Output tokens of a reading that only learns the pace."""
LONGER = 1.5
"""A token of a long answer costs so many times one of the sample: its cache is longer."""
Tell = Callable[[str], None]


@dataclass
class Round:
    """What one set of weights answered."""

    candidates: dict[Key, list[Candidate]] = field(default_factory=dict)
    judged: list[tuple[Key, list[float]]] = field(default_factory=list)
    """The reader's log-probabilities of the best grids of a test input, one entry per view."""
    explained: list[tuple[Key, list[float]]] = field(default_factory=list)
    """Those of the input, given each of the first grids of that ranking, one entry per view."""
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

    def rankings(self, task: Task, config: SolveConfig) -> dict[Key, list[Ranked]]:
        """Each test input's grids, best first: as `judgement` has them, and by what they break of
        what all demonstrations keep.
        """
        ranked, weight = self.judgement(task, config), config.inference.invariant_weight
        return Checker().checked(ranked, [task], weight)

    def judgement(self, task: Task, config: SolveConfig) -> dict[Key, list[Ranked]]:
        """Each test input's grids, best first: by the reader where it judged, else by votes."""
        keys = [(task.id, index) for index in range(len(task.test))]
        ranked = {key: vote(self.candidates.get(key, []), config.seed) for key in keys}
        if self.judged:
            ranked = reranked(ranked, self.judged)
        return explained(ranked, self.explained, config.reader) if self.explained else ranked


@dataclass
class Views:
    """The questions of a task, view by view; how many of them are read, and are refined."""

    asked: Sequence[Question]
    drafts: list[list[Decoded]] = field(default_factory=list)
    """What the first reader, which TRM hears, proposed for the first of them: those that are read.
    """
    num_refined: int = 0

    @property
    def unread(self) -> Sequence[Question]:
        """Those that are not read."""
        return self.asked[len(self.drafts) :]

    @property
    def unrefined(self) -> Sequence[Question]:
        """Those that are not refined."""
        return self.asked[self.num_refined :]


def answer_first(
    result: Round, solver: Solver, task: Task, config: SolveConfig, pace: Pace
) -> None:
    """One view of every test input, whatever the time: by the reader where it is quick, or TRM."""
    solver = solver.without_ensemble()  # the quickest answer
    asked = questions(solver, [task], 1, config.seed)
    long = max((q.reading.max_output_tokens for q in asked if q.reading is not None), default=0)
    if solver.reader is None or (long > LONG_FIRST and solver.has_trm):
        _refine(result, solver, asked, [[] for _ in asked], config, pace)
    else:
        # Without drafts: what reading costs at most is learned from it.
        _read(result, solver, asked, config, pace, with_drafts=False)
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


def read_views(
    result: Round, solver: Solver, task: Task, config: SolveConfig, pace: Pace, tell: Tell
) -> Views:
    """Let the readers answer view by view, into `result`, until the views or the time are used up,
    but for the time of the judgement; what they proposed.
    """
    views = Views(questions(solver, [task], config.inference.views, config.seed))
    kept, step = judging_seconds(solver, task, config, pace), len(task.test)
    cost = lambda part: asking_seconds(solver, part, pace)
    while solver.reader is not None and views.unread:
        # The first view is read to its end: an answer comes before a judgement, and before that.
        seconds, deadline = pace.left(), math.inf
        if views.drafts:
            seconds, deadline = seconds - kept, pace.end
        size = batch_size(solver.reader, config.reader)
        if follows_drafts(solver.reader) and not views.drafts:
            size = step  # which the others are likely to follow
        chunk = _next_chunk(views.unread, step, size, seconds, cost)
        if not chunk:
            break
        views.drafts += _read(result, solver, chunk, config, pace, deadline=deadline)[0]
        tell(f"answering, view {-(-len(views.drafts) // step)} of {config.inference.views}")
    return views


def refine_views(
    result: Round,
    views: Views,
    solver: Solver,
    task: Task,
    config: SolveConfig,
    pace: Pace,
    tell: Tell,
    most: int | None = None,
) -> None:
    """Let TRM, where there is one, refine what was read, view by view (`most` of them), in the time
    that is left before the judgement. What was not read, as it took too long, TRM answers without
    a draft.
    """
    step, share = len(task.test), 1.0 if views.drafts else JUDGE_SHARE
    kept = judging_seconds(solver, task, config, pace, share)
    cost = lambda part: pace.seconds("refine", cells(part))
    while solver.has_trm and (rest := views.unrefined[: most and most * step]):
        seconds = pace.left() - (kept if result.complete(task) else 0.0)
        size = step  # where TRM's pace is still to be learned
        if pace.knows("refine"):
            queries = [question.query for question in rest if question.query is not None]
            size = batch_of(solver, queries, config.inference)
        chunk = _next_chunk(rest, step, size, seconds, cost)
        if not chunk:
            break
        own = views.drafts[views.num_refined :][: len(chunk)]
        drafts = own + [[] for _ in chunk[len(own) :]]
        _refine(result, solver, chunk, drafts, config, pace)
        views.num_refined += len(chunk)
        tell(f"refining, view {-(-views.num_refined // step)} of {config.inference.views}")


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
    grids = to_judge(result.judgement(task, config), decoding)
    readings = task_readings(solver, task, views or decoding.scoring_views, config.seed)
    step = len(task.test)
    groups = [
        (reader, readings[begin : begin + step])
        for begin in range(0, len(readings), step)
        for reader in solver.readers
    ]
    while too_slow(groups[0][1], grids, pace) and max(map(len, grids.values())) > 1:
        grids = {key: own[: -(-len(own) // 2)] for key, own in grids.items()}
    for number, (reader, group) in enumerate(groups):
        if too_slow(group, grids, pace):
            break
        view = 1 + number // len(solver.readers)
        tell(f"judging, view {view} of {len(readings) // step}")
        begin = time.monotonic()
        result.judged += judge(reader, group, grids, decoding)
        pace.record("judge", judging_work(group, grids), time.monotonic() - begin)
        result.seconds = pace.elapsed()
    if is_asked(solver, decoding) and views is None:
        _ask_for_inputs(result, solver, task, config, pace, tell)


def _ask_for_inputs(
    result: Round, solver: Solver, task: Task, config: SolveConfig, pace: Pace, tell: Tell
) -> None:
    """Let the readers say how likely the inputs are, given the grids that they like best, view by
    view, while there is time.
    """
    grids = to_explain(result.judgement(task, config), config.reader)
    readings = inverse_readings(solver, [task], config.reader)
    step = len(task.test)
    for begin in range(0, len(readings), step):
        group = readings[begin : begin + step]
        asked = [(one, grid) for one in group for grid in grids[one.key]]
        work = explaining_work(asked)
        for reader in filter(knows_inverse, solver.readers):
            if pace.seconds("judge", work) > pace.left():
                return
            tell(f"judging, view {1 + begin // step} of the inputs")
            started = time.monotonic()
            result.explained += judge_inputs(reader, group, grids, config.reader)
            pace.record("judge", work, time.monotonic() - started)
            result.seconds = pace.elapsed()


def _read(
    result: Round,
    solver: Solver,
    asked: Sequence[Question],
    config: SolveConfig,
    pace: Pace,
    with_drafts: bool = True,
    deadline: float = math.inf,
) -> list[list[list[Decoded]]]:
    """What the readers propose, also into `result`, and what it cost into `pace`."""
    begin, expected = time.monotonic(), result.read(config.seed)
    drafts = proposals(
        solver,
        asked,
        config,
        expected=expected,
        with_drafts=with_drafts,
        deadline=deadline,
    )
    pace.record("read", reading_work(asked, solver), time.monotonic() - begin)
    result.add(readers_candidates(solver, asked, drafts))
    result.seconds = pace.elapsed()
    return drafts


def _refine(
    result: Round,
    solver: Solver,
    asked: Sequence[Question],
    drafts: list[list[Decoded]],
    config: SolveConfig,
    pace: Pace,
) -> None:
    """TRM's candidates into `result`, and what they cost into `pace`; `drafts` of the reader."""
    begin = time.monotonic()
    told = None if solver.reader is None else [drafts]
    result.add(trm_candidates(solver, asked, told, config))
    pace.record("refine", cells(asked), time.monotonic() - begin)
    result.seconds = pace.elapsed()


def _next_chunk(
    rest: Sequence[Question],
    step: int,
    size: int,
    seconds: float,
    cost: Callable[[Sequence[Question]], float],
) -> Sequence[Question]:
    """The next views, whole: as many as one batch of `size` questions holds and `seconds` allow;
    may be none.

    A view is `step` questions.
    """
    count = max(1, size // step)
    while count and cost(rest[: count * step]) > seconds:
        count //= 2
    return rest[: count * step]
