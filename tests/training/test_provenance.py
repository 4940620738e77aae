"""A run says where it came from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arctrm
from arctrm.config import PretrainConfig
from arctrm.errors import CheckpointError
from arctrm.training.provenance import run_record, write_run_record

PACKAGE = Path(arctrm.__file__).parent
REVISION = "from arctrm.training.provenance import git_revision; print(git_revision())"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def revision_seen_from(source: Path) -> str:
    command = [sys.executable, "-c", REVISION]
    env = {"PYTHONPATH": str(source), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=env, cwd=source
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with a copy of the package in it, not yet tracked."""
    shutil.copytree(PACKAGE, tmp_path / "arctrm", ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    return tmp_path


def test_the_revision_is_the_commit_and_says_when_tracked_files_differ(repository):
    git(repository, "add", "arctrm")
    git(repository, "commit", "-q", "-m", "package")
    head = git(repository, "rev-parse", "HEAD")
    (repository / "notes.txt").write_text("untracked")
    assert revision_seen_from(repository) == head
    (repository / "arctrm" / "console.py").open("a").write("\n# changed\n")
    assert revision_seen_from(repository) == f"{head}+dirty"


def test_the_revision_of_somebody_elses_repository_is_not_ours(repository):
    assert revision_seen_from(repository) == "unknown"


def test_the_record_holds_config_versions_and_hardware_and_survives_json(tmp_path):
    config = PretrainConfig(seed=3, out=tmp_path)
    path = write_run_record(tmp_path, run_record(config, data_fingerprint="abc"))
    record = json.loads(path.read_text())
    assert path == tmp_path / "config.json"
    assert PretrainConfig.model_validate(record["config"]) == config
    assert record["data_fingerprint"] == "abc"
    assert record["versions"]["arctrm"] == arctrm.__version__
    assert record["versions"]["torch"]
    assert "cores" in record["hardware"]
    assert record["command"] == sys.argv


def test_a_record_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    write_run_record(tmp_path, {"n": 1})
    write_run_record(tmp_path, {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"n": 2}


def test_a_record_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone: cannot be written \(No such file"):
        write_run_record(tmp_path / "gone", {})


def test_provenance_does_not_import_torch():
    code = "import sys, arctrm.training.provenance; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
