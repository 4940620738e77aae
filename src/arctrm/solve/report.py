"""What `solve` shows: the task, two attempts at each test input, and the evidence for each.

Test outputs are never read here: whether an attempt is right is told from outside.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arctrm.console import note, printable, progress_console
from arctrm.data.render import MAX_WIDE, grid_panel, pair_row, side_by_side
from arctrm.data.task import Grid, Task
from arctrm.invariants.task import broken
from arctrm.planner import PlannerResult
from arctrm.report.pages import evaluation_page, write_page
from arctrm.solve import scoring
from arctrm.solve.plan import PLANNER
from arctrm.solve.propose import JOINT, READER, TRM
from arctrm.solve.questions import keys_of
from arctrm.solve.rank import first_views
from arctrm.solve.results import ATTEMPT_NAMES, EVERYTHING, Rankings, predictions
from arctrm.solve.solution import Answer, Certainty, OnProgress, Progress, Solution

Verdicts = Sequence[Sequence[bool | None]]  # `scoring.verdicts`: test input -> attempt -> right
RIGHT = {True: [Text("right", "bold green")], False: [Text("wrong", "bold red")], None: []}
STYLES = {"likely right": "bold green", "a guess": "bold yellow", "no answer found": "bold red"}
VOICES = {TRM: "TRM", JOINT: "TRM", READER: "the reader", PLANNER: "the planner"}  # by source
NUMBERS = {
    "confidence": "mean_q",
    "log p of the grid": "reader_score",
    "log p of the input": "inverse_score",
    "probe score": "probe",
}  # name -> attribute of a ranked grid
MOST_NAMED, MAX_TEXT = 3, 160  # broken invariants, characters of a text: shown at most


class _Bar(progress.Progress):
    """A bar that moves with the time, and the best grids so far below it."""

    best: Sequence[Grid | None] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            task.completed = task.elapsed or 0.0
        yield from super().get_renderables()
        grids = [(n, grid) for n, grid in enumerate(self.best, 1) if grid is not None]
        title = ("best so far, test {}" if self.best[1:] else "best so far").format
        yield side_by_side([grid_panel(grid, title(n)) for n, grid in grids])


@contextmanager
def progress_bar(budget: float) -> Iterator[OnProgress]:
    """What is done, for how long of `budget` seconds, and the best grids, for `solve_task` to tell;
    where stderr is no terminal, a line for each stage.
    """
    whole = f"{round(budget, 1):g} s"
    time = progress.TextColumn(f"{{task.completed:.0f}} of {whole}")
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(30), time)
    out, stage = progress_console(), ""
    with _Bar(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        bar = bars.add_task("begin", total=budget)

        def on_progress(now: Progress) -> None:
            nonlocal stage
            bars.best = now.best
            bars.update(bar, description=f"{now.stage}, {now.detail}".rstrip(", "))
            if now.stage != stage and not out.is_terminal:
                out.print(f"{now.seconds:.1f} of {whole}: {now.stage}")
            stage = now.stage

        yield on_progress


def solution_report(
    solution: Solution,
    correct: Verdicts | None = None,
    *,
    verbose: bool = False,
) -> RenderableType:
    """Both attempts at each test input and what speaks for them in words; `correct`:
    `scoring.verdicts`. `verbose` adds the numbers, the time line and the demonstrations.
    """
    task, answers = solution.task, solution.answers
    grids = [grid for pair in task.demonstrations for grid in (pair.input, pair.output)]
    grids += [grid for one in answers for grid in (one.test_input, *one.attempts)]
    wide = max(grid.shape[1] for grid in grids if grid is not None) <= MAX_WIDE
    parts: list[RenderableType] = [Text(task.id, "bold underline")]
    for index, (answer, certainty) in enumerate(_answers(solution)):
        title = f"test {index + 1}" if len(task.test) > 1 else "test"
        # One row for both: a narrow terminal moves the pair, not one of them.
        row = Table.grid(padding=(0, 3, 0, 0))
        known = (None, None) if correct is None else correct[index]
        panels = []
        for n, (grid, right) in enumerate(zip(answer.attempts, known, strict=True), 1):
            panels.append(Group(grid_panel(grid, f"attempt_{n}", wide), *RIGHT[right]))
        row.add_row(*panels)
        shown_input = grid_panel(answer.test_input, title, wide)
        level, _, reason = str(certainty).partition(":")
        said = Text.assemble((level, STYLES[certainty.level]), f":{reason}")
        parts += [side_by_side([shown_input, row]), said, *_words(solution, answer)]
        if verbose:
            parts += [_numbers(answer), Text()] if answer.ranked else []
            if answer.history is not None:
                parts.append(attempts_table(answer.history, f"{title}: attempts of the planner"))
    steps = f"adapted in {solution.adaptation_steps} steps, " * bool(solution.adaptation_steps)
    known_task = "known to the model, " * solution.known
    parts.append(Text(f"{known_task}{steps}{solution.seconds:.1f} s", "dim"))
    if verbose:
        spent = ", ".join(f"{one.stage} {one.seconds:.1f} s" for one in solution.events)
        if solution.leave_one_out is not None:
            spent += f"; leave-one-out score {solution.leave_one_out:.2f}"
        pairs = enumerate(task.demonstrations, 1)
        shown = [pair_row(pair, f"demonstration {number}", wide) for number, pair in pairs]
        parts += [Text(spent, "dim"), Text(), side_by_side(shown)]
    return Group(*parts)


def _answers(solution: Solution) -> Iterator[tuple[Answer, Certainty]]:
    return zip(solution.answers, solution.certainties, strict=True)


def _broken(solution: Solution, answer: Answer, grid: Grid) -> list[str]:
    """What a grid breaks of what all demonstrations keep, the heaviest first."""
    return [name for name, nats in broken(solution.task, answer.test_input, grid) if nats]


def _words(solution: Solution, answer: Answer) -> Iterator[Text]:
    """The evidence of both attempts."""
    voices = {VOICES[source] for one in answer.ranked for source in one.votes_by}
    for name, entry in zip(ATTEMPT_NAMES, answer.ranked, strict=False):
        said = [f"{entry.num_proposals} of {answer.num_candidates} proposals"]
        own = sorted({VOICES[source] for source in entry.votes_by})
        if not own:
            said = [
                f"proposed {'before' if solution.adaptation_steps else 'after'} adaptation only"
            ]
        elif len(voices) > 1:
            said.append(f"{' and '.join(own)} {'agree' if own[1:] else 'alone'}")
        names = _broken(solution, answer, entry.grid)
        more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
        but = f" but: {', '.join(names[:MOST_NAMED] + more)}" if names else ""
        said.append(f"keeps everything that the demonstrations keep{but}")
        yield Text.assemble((name, "bold"), f": {'; '.join(said)}")
    if len(answer.ranked) == 1:
        yield Text.assemble((ATTEMPT_NAMES[1], "bold"), ": the same; no other grid was proposed")


def _numbers(answer: Answer) -> Table:
    """The evidence of both attempts as numbers."""
    table = Table("", *ATTEMPT_NAMES, box=None, header_style="dim", style="dim")
    two = answer.ranked[:2]
    total = sum(one.votes for one in answer.ranked)
    votes = lambda one: ", ".join(f"{source} {n:g}" for source, n in one.votes_by.items())
    table.add_row(f"votes of {total:g}", *(f"{one.votes:g} ({votes(one)})" for one in two))
    for name, key in NUMBERS.items():
        values = [getattr(one, key) for one in two]
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in values))
    return table


def solution_json(solution: Solution, correct: Verdicts | None = None) -> str:
    """A line of JSON, for scripts; null: not measured."""
    finite = lambda value: value if value is not None and isfinite(value) else None
    answers = []
    for index, (answer, certainty) in enumerate(_answers(solution)):
        grids = zip(ATTEMPT_NAMES, (grid.tolist() for grid in answer.attempts), strict=True)
        found: dict[str, object] = dict(grids)
        found |= {"certainty": certainty.level, "reason": certainty.reason}
        found |= {"proposals": answer.num_candidates, "evidence": []}
        found["evidence"] = [
            {"proposals": one.num_proposals, "votes": dict(one.votes_by)}
            | {key: finite(getattr(one, key)) for key in NUMBERS.values()}
            | {"broken": _broken(solution, answer, one.grid)}
            for one in answer.ranked[:2]
        ]
        answers.append(found if correct is None else found | {"right": list(correct[index])})
    keys = ("known", "adaptation_steps", "leave_one_out", "seconds")
    head = {"task": solution.task.id} | {key: getattr(solution, key) for key in keys}
    return json.dumps(head | {"answers": answers}, allow_nan=False)


def attempts_table(result: PlannerResult, title: str, max_text: int = MAX_TEXT) -> Table:
    """The planner's attempts, for `solve --verbose`; the kept one is green."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", show_lines=True)
    for name in ("attempt", "score", "tokens", "text", "feedback"):
        table.add_column(name, overflow="fold")
    for attempt in result.reasoning_history:
        kept = attempt is result.best
        table.add_row(
            f"{attempt.number}{' *' if kept else ''}",
            f"{attempt.score:.2f}",
            "-" if attempt.new_tokens is None else f"{attempt.new_tokens:,}",
            Text(printable(" ".join(attempt.text.split()), max_text)),
            Text(printable(attempt.feedback)),
            style="green" if kept else None,
        )
    kept_one = f"* kept: attempt {result.best.number} of {result.total_attempts}"
    right = "every" if result.success else "not every"
    table.caption = f"{kept_one}, {right} held-out demonstration right"
    return table


def write_gallery(
    path: Path,
    told: Mapping[str, Any],
    tasks: Sequence[Task],
    ranked: Rankings,
    known: scoring.Answers,
    by_row: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """The page of many tasks: `told` is its heading, `by_row` scores as in ablations.json (default:
    those of `ranked`).
    """
    known = {task.id: known.get(task.id, [None] * len(task.test)) for task in tasks}
    own = {task.id: [ranked.get(key, ()) for key in keys_of([task])] for task in tasks}
    grids = {name: [[one.grid for one in best] for best in inputs] for name, inputs in own.items()}
    right = {name: scoring.verdicts(inputs, known[name]) for name, inputs in grids.items()}
    curves: dict[str, dict[int, float]] = {}
    if scoring.num_known(known):
        all_grids = [one for inputs in own.values() for best in inputs for one in best]
        most = 1 + max((max(v) for one in all_grids for v in one.views_by.values()), default=0)
        for count in sorted({most, *(2**i for i in range(most.bit_length()))}):
            voted = {key: first_views(ranked.get(key, ()), count) for key in keys_of(tasks)}
            shares = scoring.score(predictions(tasks, voted), known).task_fraction
            for allowed, name in ((2, "two grids"), (10, "ten grids")):
                curves.setdefault(f"{name}, by votes alone", {})[count] = shares[allowed]
        scores = scoring.score(grids, known)
        curves["two grids, by the whole ranking"] = {most: scores.task_fraction[2]}
        by_row = by_row or {EVERYTHING: scoring.scores_dict(scores)}
    page = evaluation_page(told, by_row or {}, tasks, own, known, right, curves)
    write_page(path, page)
    note(f"the page is {path}")
