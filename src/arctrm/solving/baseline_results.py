"""results.json of `baseline`: what it holds, and how a run is begun, interrupted and resumed.

The file is replaced as a whole after every task, so that it is always complete JSON; a task that is
in it is not answered again. It begins with the record of the run, and may only be continued by the
same model under the same configuration.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from arctrm.config import BaselineConfig
from arctrm.config.base import StrictModel
from arctrm.data.task import Task
from arctrm.errors import DataError
from arctrm.solving.resuming import check_same_tasks, check_same_weights
from arctrm.training.checkpoint_meta import check_same_config
from arctrm.training.files import disk_errors, write_text_atomically

MAY_DIFFER_ON_RESUME = (
    "out",
    "evaluation.tasks",
    "evaluation.max_tasks",
    "hub.device",
    "hub.device_map",
    "reader.batch_size",
)
"""Keys that change no answer."""
SUBMISSION = "submission.json"

Cells = tuple[tuple[int, ...], ...]
"""A grid, row by row."""


class CandidateRecord(StrictModel):
    """One answer to a prompt."""

    text: str
    """As the model gave it, in the view's colours and orientation."""
    grid: Cells | None
    """Parsed and turned back; null where there is none, or where it only repeats the input."""
    new_tokens: int
    log_probability: float | None
    """Of the grid (nats); null for free text."""


class PromptRecord(StrictModel):
    """One test input under one view."""

    dihedral: int
    colours: tuple[int, ...]
    """Colour c of the task was shown as colours[c]."""
    prompt: str
    prompt_tokens: int
    candidates: tuple[CandidateRecord, ...]


class AttemptRecord(StrictModel):
    """A grid that was kept, the best first."""

    grid: Cells
    votes: int
    """Candidates that were this grid."""
    mean_q: float
    """Mean logit of the model's probability of it, over its votes; 0 for free text."""
    reader_score: float | None
    """Mean log-probability over the scoring views; null when ranked by votes."""
    correct: bool | None
    """null where the answer is not known."""


class InputRecord(StrictModel):
    """One test input."""

    prompts: tuple[PromptRecord, ...]
    attempts: tuple[AttemptRecord, ...]


class TokenCounts(StrictModel):
    """Tokens of a task."""

    prompt: int
    new: int


class TaskRecord(StrictModel):
    """Everything about one task."""

    content: str
    """Fingerprint of demonstrations and test inputs."""
    seconds: float
    tokens: TokenCounts
    notes: tuple[str, ...]
    test: tuple[InputRecord, ...]


class ModelRecord(StrictModel):
    """Which model answered."""

    name: str
    how: str
    weights: str
    """Fingerprint of the weights."""


class _File(StrictModel):
    """The whole file; what else it holds is the record of the run, and the scores."""

    model_config = ConfigDict(extra="allow")

    config: dict[str, Any]
    model: ModelRecord
    tasks: dict[str, TaskRecord]


class Results:
    """The records so far, and the file that holds them."""

    def __init__(self, path: Path, saved: _File | None):
        self.path, self.saved = path, saved
        self.tasks = dict(saved.tasks) if saved else {}
        self._head: dict[str, Any] = {}
        self._texts = {name: record.model_dump_json() for name, record in self.tasks.items()}

    def begin(self, record: dict[str, Any], model: ModelRecord) -> None:
        """Write the file without tasks, or check that the one there is by the same model.

        Raises:
            DataError: it was written with other weights.
            ResourceError, CheckpointError: the folder cannot be written.
        """
        if self.saved is not None:
            began = self.saved.model
            check_same_weights(self.path, (began.name, began.weights), (model.name, model.weights))
            record = {**(self.saved.model_extra or {}), "config": record["config"]}
        first = {"config": record["config"], "model": model.model_dump(mode="json")}
        self._head = {**first, **record, "scores": None}
        with disk_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, task_id: str, record: TaskRecord) -> None:
        """Keep the record of a task, on the disk too."""
        self.tasks[task_id] = record
        self._texts[task_id] = record.model_dump_json()
        self._write()

    def finish(self, scores: dict[str, Any] | None) -> None:
        """Write the scores of a finished run."""
        self._head["scores"] = scores
        self._write()

    def _write(self) -> None:
        """The head, then one line for each task."""
        lines = [f"  {json.dumps(name)}: {self._texts[name]}" for name in sorted(self._texts)]
        head = json.dumps(self._head, indent=2)[:-2]
        tasks = "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"
        write_text_atomically(self.path, f'{head},\n  "tasks": {tasks}\n}}\n')


def open_results(path: Path, config: BaselineConfig, tasks: list[Task], resume: bool) -> Results:
    """The results to go on with; nothing is written yet.

    Raises:
        DataError: there are none to resume, or some that would be lost, or of other tasks.
        CheckpointError: they were made under another configuration.
    """
    if resume:
        return Results(path, _resumed(path, config, tasks))
    if path.name == SUBMISSION:
        raise DataError(f"{path}: is where the submission goes; name the results otherwise")
    if (path.parent / "checkpoints").is_dir():
        raise DataError(f"{path.parent}: is the folder of a training run; choose another --out")
    if path.exists():
        raise DataError(
            f"{path}: holds the results of an earlier run; add --resume to go on with it, or "
            "choose another --out"
        )
    if path.with_name(SUBMISSION).exists():
        raise DataError(
            f"{path.with_name(SUBMISSION)}: is the submission of another run; choose a --out in "
            "another folder"
        )
    return Results(path, None)


def _resumed(path: Path, config: BaselineConfig, tasks: list[Task]) -> _File:
    if not path.is_file():
        raise DataError(
            f"{path}: there are no results to resume; leave out --resume to start a run there"
        )
    try:
        saved = _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path}: is not a results file of baseline ({where}: {first['msg']}); choose another "
            "--out"
        ) from None
    check_same_config(
        saved.config, config.model_dump(mode="json"), MAY_DIFFER_ON_RESUME, where=str(path)
    )
    contents = {name: record.content for name, record in saved.tasks.items()}
    check_same_tasks(path, contents, tasks)
    return saved
