"""The wheel alone, in an environment elsewhere, does what the clone does."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("src", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A folder with the wheel."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in PARTS:  # a build leaves files beside its sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    run(sys.executable, "-m", "pip", *build, cwd=folder)
    shutil.rmtree(source)
    return folder


def new_environment(folder: Path) -> Path:
    """The Python of a fresh environment that sees this one's dependencies, and not arctrm."""
    venv.create(folder / "venv", with_pip=False)
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    shown = folder / "dependencies"
    shown.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "arctrm" not in path.name:  # an installed one would do instead of the wheel
            (shown / path.name).symlink_to(path)
    (site / "dependencies.pth").write_text(str(shown))
    return folder / "venv/bin/python"


@pytest.fixture(scope="module")
def arctrm(tmp_path_factory, wheels) -> Path:
    """The command of a fresh environment that has the wheel."""
    folder = tmp_path_factory.mktemp("elsewhere")
    own = new_environment(folder)
    install = ("install", "-q", "--no-deps", *wheels.glob("*.whl"))
    run(sys.executable, "-m", "pip", "--python", own, *install, cwd=folder)
    return own.with_name("arctrm")


@pytest.mark.slow
def test_the_wheel_solves_a_task_and_knows_the_shipped_configurations(arctrm, tmp_path):
    where = run(arctrm.with_name("python"), "-c", "import arctrm; print(*arctrm.__path__)", cwd="/")
    assert Path(where.strip()).is_relative_to(arctrm.parents[1])
    example = shutil.copy(ROOT / "examples/45737921.json", tmp_path)
    said = run(arctrm, "solve", example, "--check", "--report", "page.html", cwd=tmp_path)
    assert "1 of 1 test inputs with a known answer solved" in " ".join(said.split())
    planned = run(arctrm, "joint", "--config", "arc1_1h", "--dry-run", cwd=tmp_path)
    assert "dry run" in planned
    assert "45737921</title>" in (tmp_path / "page.html").read_text().replace(" · arctrm", "")
    assert {path.name for path in tmp_path.iterdir()} == {"45737921.json", "page.html"}


# -- the notebook of a competition


def cells() -> list[dict]:
    return json.loads((ROOT / "examples/kaggle.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_has_no_outputs():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) >= 3
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_installs_from_the_wheels_and_leaves_a_submission(wheels, tmp_path):
    """Its cells in an environment without arctrm, where pip has no network to ask."""
    own = new_environment(tmp_path)
    places = {"/kaggle/input": tmp_path / "input", "/kaggle/working": tmp_path / "working"}
    shutil.copytree(wheels, places["/kaggle/input"] / "wheels")
    places["/kaggle/working"].mkdir()
    task = json.loads((ROOT / "examples/45737921.json").read_text())
    task["test"] = [{"input": pair["input"]} for pair in task["test"]]
    other = {"train": task["train"][1:], "test": task["test"]}  # which the weights do not know
    file = places["/kaggle/input"] / "arc/arc-agi_test_challenges.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"known": task, "new": other}))
    script = ["import re, subprocess", "def shell(line, names):"]
    script += ["    line = re.sub(r'{(.+?)}', lambda found: str(eval(found[1], names)), line)"]
    script += ["    subprocess.run(line, shell=True, check=True)"]
    for cell in cells():
        for line in "".join(cell["source"] * (cell["cell_type"] == "code")).splitlines():
            script.append(f"shell({line[1:]!r}, globals())" if line.startswith("!") else line)
    text = "\n".join(script).replace(" 11h ", " 40s ")
    for there, here in places.items():
        text = text.replace(there, str(here))
    (tmp_path / "cells.py").write_text(text)
    assert "2 tasks" in run(own, tmp_path / "cells.py", cwd=tmp_path)
    submission = json.loads((tmp_path / "working/submission.json").read_text())
    assert submission["known"][0]["attempt_1"] != task["test"][0]["input"]
