"""What `solve` shows: the task, two attempts at each test input, and the evidence for each.

Test outputs are never read here: whether an attempt is right is told from outside.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import progress
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arctrm.console import plain, printable, progress_console
from arctrm.data.render import MAX_WIDE, grid_panel, pair_row, side_by_side
from arctrm.invariants.task import COPY, weights
from arctrm.planner import PlannerResult
from arctrm.solve.rank import Ranked
from arctrm.solve.solution import Answer, OnProgress, Progress, Solution

VERDICT = {True: [Text("right", "bold green")], False: [Text("wrong", "bold red")], None: []}
MOST_NAMED, MAX_TEXT = 3, 160  # broken invariants, characters of a text: shown at most


@contextmanager
def progress_bar(budget: float, *, show_first: bool) -> Iterator[OnProgress]:
    """A bar over `budget` seconds that `solve_task` moves; `show_first`: print the first grids."""
    with progress.Progress(console=progress_console(), transient=True) as bars:
        bar, is_shown = bars.add_task("answering", total=budget), not show_first

        def on_progress(now: Progress) -> None:
            nonlocal is_shown
            done, text = min(now.seconds, budget), f"{now.stage}, {now.detail}".rstrip(", ")
            bars.update(bar, completed=done, description=text)
            if not is_shown and now.best:
                bars.console.print(f"first answer after {now.seconds:.1f} s:")
                shown = [(i, grid) for i, grid in enumerate(now.best, 1) if grid is not None]
                bars.console.print(side_by_side([grid_panel(g, f"test {i}") for i, g in shown]))
                is_shown = True

        yield on_progress


def solution_report(
    solution: Solution,
    correct: Sequence[Sequence[bool | None]] | None = None,
) -> RenderableType:
    """Demonstrations, then each test input with both attempts; `correct`: `scoring.verdicts`."""
    task, answers = solution.task, solution.answers
    grids = [grid for pair in task.demonstrations for grid in (pair.input, pair.output)]
    grids += [grid for one in answers for grid in (one.test_input, *one.attempts)]
    wide = max(grid.shape[1] for grid in grids if grid is not None) <= MAX_WIDE
    demonstrations = enumerate(task.demonstrations, 1)
    shown = [pair_row(pair, f"demonstration {number}", wide) for number, pair in demonstrations]
    parts: list[RenderableType] = [Text(task.id, "bold underline"), side_by_side(shown)]
    for index, answer in enumerate(answers):
        title = f"test {index + 1}" if len(task.test) > 1 else "test"
        # One row for both: a narrow terminal moves the pair, not one of them.
        row = Table.grid(padding=(0, 3, 0, 0))
        verdicts = (None, None) if correct is None else correct[index]
        both = zip(answer.attempts, verdicts, answer.evidence, strict=True)
        panels = []
        for n, (grid, right, entry) in enumerate(both, 1):
            panel = grid_panel(grid, f"attempt_{n}", wide)
            panels.append(Group(panel, *VERDICT[right], _evidence(entry, answer, solution)))
        row.add_row(*panels)
        shown_input = grid_panel(answer.test_input, title, wide)
        effort = "known to the model, " if solution.known else ""
        effort += f"{solution.adaptation_steps} adaptation steps, {solution.seconds:.1f} s"
        parts += [Text(), side_by_side([shown_input, row]), Text(effort, "dim")]
    return Group(*parts)


def _evidence(entry: Ranked | None, answer: Answer, solution: Solution) -> Text:
    if entry is None:
        return Text(f"no grid in {answer.num_candidates} answers\nthe input stands in", "dim")
    sources = ", ".join(f"{source} {votes:g}" for source, votes in entry.votes_by.items())
    numbers = {
        "confidence": entry.mean_q,
        "log p of the grid": entry.reader_score,
        "log p of the input": entry.inverse_score,
        "probe score": entry.probe,
        "leave-one-out score": solution.leave_one_out,
    }
    all_votes = sum(one.votes for one in answer.ranked)
    lines = [f"votes: {entry.votes:g} of {all_votes:g} ({sources})"]
    lines += [f"{name}: {value:.2f}" for name, value in numbers.items() if value is not None]
    broken = [name for name in entry.broken if name == COPY or name in weights()]
    more = [f"and {len(broken) - MOST_NAMED} more"] if len(broken) > MOST_NAMED else []
    if broken:
        lines += ["unlike all demonstrations in:", *(f"  {n}" for n in broken[:MOST_NAMED] + more)]
    return Text("\n".join(lines), "dim")


def attempts_table(result: PlannerResult, title: str, max_text: int = MAX_TEXT) -> Table:
    """The planner's attempts, for `solve --trace`; the kept one is green."""
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


def dry_run_table(command: str, rows: Mapping[str, object]) -> Table:
    """What a command would do, for `--dry-run`."""
    table = Table(title=f"{command} (dry run)", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, plain(value))
    return table
