"""`arctrm eval --submission`: score a submission that was written before. No model is loaded.

The way of a competition: answer challenges that come without solutions, score when these are there.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from arctrm.config import EvalConfig
from arctrm.console import console, note
from arctrm.data.task import Task
from arctrm.errors import DataError
from arctrm.solving import scoring
from arctrm.solving.evaluate import load, open_folder
from arctrm.solving.submission import Attempts, read_submission
from arctrm.training.files import write_text_atomically

SUBMISSION = "submission.json"


def run(config: EvalConfig, out: Path) -> scoring.Scores:
    """Score `config.submission`; scores.json and config.json go to `out`.

    Tasks of the test set that it does not answer count as not solved, and a note says how many.

    Raises:
        UserError: the submission or the tasks cannot be read, do not belong together, no answer is
            known, or `out` cannot be written.
    """
    tasks, known = load(config)
    attempts = _attempts(config, tasks)
    scores = scoring.score(attempts, known)
    open_folder(out, config)
    content = {
        "submission": str(config.submission),
        "test_set": config.evaluation.test_set,
        **scoring.scores_dict(scores, scoring.ATTEMPTS),
    }
    write_text_atomically(out / "scores.json", json.dumps(content, indent=1) + "\n")
    console().print(scoring.task_table(scores))
    console().print(scoring.scores_table(scores, scoring.ATTEMPTS))
    missing = sum(task.id not in attempts for task in tasks)
    if missing:
        note(f"{missing} of {len(tasks)} tasks are not in the submission: not solved")
    note(f"written to {escape(str(out))}")
    return scores


def describe(config: EvalConfig) -> Table:
    """What would be scored."""
    tasks, known = load(config)
    attempts = _attempts(config, tasks)
    table = Table(title="eval (dry run)", title_justify="left", show_header=False)
    table.add_row("submission", escape(str(config.submission)))
    table.add_row("tasks, answered there", f"{len(tasks)}, {len(attempts)}")
    table.add_row("answers known", str(sum(a is not None for g in known.values() for a in g)))
    return table


def _attempts(config: EvalConfig, tasks: Sequence[Task]) -> dict[str, list[Attempts]]:
    """What the submission says of `tasks`."""
    assert config.submission is not None
    path, test_set = config.submission, config.evaluation.test_set
    if path.is_dir():
        path = path / SUBMISSION
    content = read_submission(path)
    found = {task.id: content[task.id] for task in tasks if task.id in content}
    if not found:
        raise DataError(
            f"{path}: answers none of the {len(tasks)} tasks of {test_set}; give its own test set, "
            "for example --set evaluation.test_set=arc-agi_test_challenges.json"
        )
    for task in tasks:
        if task.id in found and len(found[task.id]) != len(task.test):
            raise DataError(
                f"{path}: task {task.id} has {len(found[task.id])} entries, but {len(task.test)} "
                f"test inputs in {test_set}; a submission has one entry for each, in their order"
            )
    return found
