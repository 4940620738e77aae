"""arctrm: solve ARC-AGI tasks with a reader and a Tiny Recursive Model (TRM).

    import arctrm

    solver = arctrm.Solver.from_pretrained()
    solution = solver.solve(arctrm.load_task("arc1:45737921"), budget="60s")
    solution.attempts[0]  # attempt_1 and attempt_2 at the first test input

Nothing heavy is imported before it is used: a public name is found in its module when it is asked
for.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from arctrm.config import EvalConfig as EvalConfig
    from arctrm.config import JointModelConfig as JointModelConfig
    from arctrm.data.sources import load_task as load_task
    from arctrm.data.sources import load_tasks as load_tasks
    from arctrm.data.task import Pair as Pair
    from arctrm.data.task import Task as Task
    from arctrm.errors import ArctrmError as ArctrmError
    from arctrm.model.adapters import AlignedAdapter as AlignedAdapter
    from arctrm.model.adapters import LatentToTextAdapter as LatentToTextAdapter
    from arctrm.model.adapters import TextToLatentAdapter as TextToLatentAdapter
    from arctrm.model.hybrid import HybridModel as HybridModel
    from arctrm.model.trm import Refiner as Refiner
    from arctrm.planner import ARCPlanner as ARCPlanner
    from arctrm.planner import GridVerifier as GridVerifier
    from arctrm.planner import PlannerResult as PlannerResult
    from arctrm.planner import Verdict as Verdict
    from arctrm.reader.protocol import Reader as Reader
    from arctrm.reader.text import grid_text as grid_text
    from arctrm.reader.text import parse_grid_text as parse_grid_text
    from arctrm.reader.text_module import LatentOutput as LatentOutput
    from arctrm.reader.text_module import TextReasoningModule as TextReasoningModule
    from arctrm.solve.evaluate import evaluate as evaluate
    from arctrm.solve.rank import Ranked as Ranked
    from arctrm.solve.scoring import Scores as Scores
    from arctrm.solve.solution import Answer as Answer
    from arctrm.solve.solution import Certainty as Certainty
    from arctrm.solve.solution import Event as Event
    from arctrm.solve.solution import Progress as Progress
    from arctrm.solve.solution import Solution as Solution
    from arctrm.solve.solve import Stopped as Stopped
    from arctrm.solve.weights import Solver as Solver

# The imports above are for type checkers; here they say in which module a name is found.
_IMPORT = r"^    from (\S+) import (\w+) as"
_LINES = re.findall(_IMPORT, Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
_HOME_OF = {name: home for home, name in _LINES}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'arctrm' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
