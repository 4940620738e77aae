"""The wheel alone, in an environment elsewhere, does what the clone does."""

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
def arctrm(tmp_path_factory) -> Path:
    """The command of a fresh environment that has the wheel, and sees this one's dependencies."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("elsewhere")
    for name in PARTS:  # a build leaves files beside its sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip")
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    run(*pip, *build, cwd=folder)
    shutil.rmtree(source)
    venv.create(folder / "venv", with_pip=False)
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    own = folder / "venv/bin/python"
    run(*pip, "--python", own, "install", "-q", "--no-deps", *folder.glob("*.whl"), cwd=folder)
    return folder / "venv/bin/arctrm"


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
