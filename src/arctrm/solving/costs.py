"""What work on a task costs: the amount of each kind of work, and the seconds by a `Pace`."""

from collections.abc import Sequence

from arctrm.config import SolveConfig
from arctrm.data.task import Grid, Task
from arctrm.reader.tokens import grid_length
from arctrm.solving.candidates import Key
from arctrm.solving.inverse import InverseReading, inverse_readings, is_asked
from arctrm.solving.pace import Pace
from arctrm.solving.pool import Question, questions
from arctrm.solving.reading import Reading, task_readings
from arctrm.solving.weights import Solver

ROWS_OF_A_STEP = 8
"""Every token decoded costs as much as so many rows, beside the rows themselves (measured)."""
PROMPT_TOKENS = 64
"""Tokens of a prompt, read at once, that cost as much as one that is decoded."""
JUDGE_SHARE = 0.25
"""Share of the time left that is kept for the judgement while answers are still read, at most."""


def answering_seconds(solver: Solver, task: Task, config: SolveConfig, pace: Pace) -> float | None:
    """What all views of the readers (of TRM, where there is none) and the judgement should take;
    None where it is not known.
    """
    if not pace.knows("refine" if solver.reader is None else "read"):
        return None
    asked = questions(solver, [task], config.inference.views, config.seed)
    return asking_seconds(solver, asked, pace) + judging_seconds(solver, task, config, pace)


def least_seconds(solver: Solver, task: Task, config: SolveConfig, pace: Pace) -> float:
    """What one view should take: of TRM, where there is one whose pace is known."""
    asked = questions(solver, [task], 1, config.seed)
    if solver.has_trm and pace.knows("refine"):
        return pace.seconds("refine", cells(asked))
    return asking_seconds(solver, asked, pace)


def asking_seconds(solver: Solver, asked: Sequence[Question], pace: Pace) -> float:
    """What the answers of the readers should take; of TRM, where there is no reader."""
    if solver.reader is None:
        return pace.seconds("refine", cells(asked))
    return pace.seconds("read", reading_work(asked, solver))


def judging_seconds(
    solver: Solver, task: Task, config: SolveConfig, pace: Pace, share: float = JUDGE_SHARE
) -> float:
    """What the judgement of the best candidates should take: at most `share` of the time left."""
    if solver.reader is None or config.reader.rank == "votes":
        return 0.0
    readings = task_readings(solver, task, config.reader.scoring_views, config.seed)
    candidates = config.reader.scored_candidates
    tokens = sum(len(r.prompt.tokens) + candidates * r.max_output_tokens for r in readings)
    tokens *= len(solver.readers)
    if is_asked(solver, config.reader):
        asked = inverse_readings(solver, [task], config.reader)
        room = max((r.max_output_tokens for r in readings), default=0)
        each = sum(room + grid_length(*one.query.shape) for one in asked)
        tokens += each * config.reader.inverse_candidates
    return min(pace.seconds("judge", tokens), pace.left() * share)


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


def judging_work(readings: Sequence[Reading], grids: dict[Key, list[Grid]]) -> int:
    """Tokens of prompts and candidates."""
    prompts = sum(len(reading.prompt.tokens) for reading in readings)
    return prompts + sum(grid.size + len(grid) for r in readings for grid in grids[r.key])


def explaining_work(asked: Sequence[tuple[InverseReading, Grid]]) -> int:
    """Tokens of inputs, and of the grids that are to explain them."""
    return sum(grid_length(*grid.shape) + grid_length(*one.query.shape) for one, grid in asked)


def too_slow(readings: Sequence[Reading], grids: dict[Key, list[Grid]], pace: Pace) -> bool:
    """Whether judging the grids under these readings is not expected to end in time."""
    return pace.seconds("judge", judging_work(readings, grids)) > pace.left()
