"""Ask everything of a test set, over all processes: questions, candidates, rankings."""

from collections.abc import Callable
from dataclasses import dataclass, field

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from arctrm.config import BaselineConfig, EvalConfig
from arctrm.console import note, progress_console
from arctrm.data.task import Task
from arctrm.solving.candidates import Key, by_key
from arctrm.solving.checked import Checker
from arctrm.solving.inverse import (
    explained,
    inverse_readings,
    is_asked,
    judge_inputs,
    knows_inverse,
    to_explain,
)
from arctrm.solving.pool import Proposals, Question, pooled, proposals, questions
from arctrm.solving.reading import judge, reranked, task_readings, to_judge
from arctrm.solving.vote import Candidate, Ranked, vote
from arctrm.solving.weights import Solver

Work = Callable[[list, Callable[[int], None]], list]
"""(items, told how many are done) -> results."""


@dataclass(frozen=True)
class Workers:
    """The processes that answer together; the main one shows how far they are."""

    accelerator: Accelerator
    in_parts: bool = False
    """Whether they are asked many times over: finished bars would fill the screen, and go."""
    checker: Checker = field(default_factory=Checker)

    def work(self, what: str, mine: list, work: Work, times: int = 1) -> list:
        """Results of this process's items, with a progress bar on the main one; `times`: how often
        each of them is told of.
        """
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        screen = progress_console()
        hidden = not self.accelerator.is_main_process or (self.in_parts and not screen.is_terminal)
        with Progress(
            *columns, console=screen, disable=hidden, transient=self.in_parts
        ) as progress:
            bar = progress.add_task("", total=len(mine) * times)
            return work(mine, lambda done: progress.advance(bar, done))

    def gathered(self, found: list) -> list:
        """What all processes found."""
        return gather_object(found) if self.accelerator.num_processes > 1 else found


@dataclass(frozen=True, eq=False)
class Asked:
    """This process's questions, and what the readers proposed for them."""

    questions: list[Question]
    drafts: Proposals | None


def ask(solver: Solver, tasks: list[Task], config: EvalConfig, workers: Workers) -> Asked:
    """This process's share of the questions; the readers answer them, if there are any."""
    everything = questions(solver, tasks, config.inference.views, config.seed)
    with workers.accelerator.split_between_processes(everything) as mine:
        if solver.reader is None:
            return Asked(mine, None)
        work: Work = lambda mine, told: proposals(solver, mine, config, told)
        return Asked(mine, workers.work("reading", mine, work, len(solver.readers)))


def answer_all(
    solver: Solver,
    asked: Asked,
    config: EvalConfig,
    workers: Workers,
    ablation: str | None = None,
) -> dict[Key, list[Candidate]]:
    """Candidates of every test input, from all processes."""
    if solver.has_trm and ablation != "no-trm":
        work: Work = lambda mine, told: pooled(solver, mine, asked.drafts, config, told, ablation)
        found = workers.work("answering", asked.questions, work)
    else:  # the reader has answered already
        found = pooled(solver, asked.questions, asked.drafts, config, ablation=ablation)
    return by_key(workers.gathered(found))


def rank_all(
    solver: Solver,
    tasks: list[Task],
    found: dict[Key, list[Candidate]],
    config: EvalConfig,
    workers: Workers,
    ablation: str | None = None,
) -> dict[Key, list[Ranked]]:
    """Each test input's grids, best first: by votes, or by the readers' log-probability, and by
    what they break of what all demonstrations keep.
    """
    ranked = _rank_all(solver, tasks, found, config, workers, ablation)
    return workers.checker.checked(ranked, tasks, config.inference.invariant_weight)


def _rank_all(
    solver: Solver,
    tasks: list[Task],
    found: dict[Key, list[Candidate]],
    config: EvalConfig,
    workers: Workers,
    ablation: str | None,
) -> dict[Key, list[Ranked]]:
    ranked = rank(tasks, found, config.seed)
    readers, decoding = solver.readers, config.reader
    if not readers or decoding.rank == "votes" or ablation == "no-reader":
        return ranked
    grids, views = to_judge(ranked, decoding), decoding.scoring_views
    readings = [r for task in tasks for r in task_readings(solver, task, views, config.seed)]
    work: Work = lambda mine, told: [
        one  # view by view, every reader under each
        for view in zip(*(judge(r, mine, grids, decoding, told) for r in readers), strict=True)
        for one in view
    ]
    with workers.accelerator.split_between_processes(readings) as mine:
        judged = workers.work("scoring", mine, work, len(readers))
    ranked = reranked(ranked, workers.gathered(judged))
    if not is_asked(solver, decoding):
        return ranked
    likely, inverse = to_explain(ranked, decoding), inverse_readings(solver, tasks, decoding)
    work = lambda mine, told: [
        one for r in readers for one in judge_inputs(r, mine, likely, decoding, told)
    ]
    with workers.accelerator.split_between_processes(inverse) as mine:
        judged = workers.work("scoring inputs", mine, work, sum(map(knows_inverse, readers)))
    return explained(ranked, workers.gathered(judged), decoding)


def say_what_is_unusual(
    solver: Solver, tasks: list[Task], config: EvalConfig | BaselineConfig, adapts: bool = False
) -> None:
    """Note tasks that the checkpoint does not know, and those it may know too well."""
    known = sum(solver.row_of(task) is not None for task in tasks)
    if known < len(tasks):
        begin = "adapted" if adapts else "answered"
        how = "not answered" if solver.views else f"{begin} from the mean embedding"
        note(f"{len(tasks) - known} of {len(tasks)} tasks are not in the id map: {how}")
    kept_out = 0 < config.evaluation.held_out <= solver.held_out
    if known and not kept_out and solver.test_set not in (None, config.evaluation.test_set):
        note(
            f"the checkpoint kept the test pairs of {solver.test_set} out of training, not those "
            f"of {config.evaluation.test_set}: {known} tasks may be scored on pairs it has seen"
        )


def rank(
    tasks: list[Task], found: dict[Key, list[Candidate]], seed: int
) -> dict[Key, list[Ranked]]:
    """The vote of every test input, best first."""
    keys = [(task.id, index) for task in tasks for index in range(len(task.test))]
    return {key: vote(found.get(key, []), seed) for key in keys}
