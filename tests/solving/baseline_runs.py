"""What the tests of `baseline` share."""

import json
from pathlib import Path

from arctrm.config import BaselineConfig
from arctrm.solving.baseline import run


def config(test_set, **settings) -> BaselineConfig:
    evaluation = {"test_set": str(test_set), **settings.pop("evaluation", {})}
    return BaselineConfig.model_validate({"views": 3, "evaluation": evaluation, **settings})


def answered(settings: BaselineConfig, path: Path, resume: bool = False) -> dict:
    """What a run writes."""
    run(settings, path, resume)
    return json.loads(path.read_text())


def prompts_of(results: dict):
    """(task id, index of the test input, prompt record) of every prompt."""
    for task_id, record in results["tasks"].items():
        for index, test in enumerate(record["test"]):
            for prompt in test["prompts"]:
                yield task_id, index, prompt
