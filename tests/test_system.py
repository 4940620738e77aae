"""Files are written as a whole, a run says where it came from, and `auto` means one arithmetic."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import arctrm
from arctrm.config import HubConfig, InferenceConfig, PretrainConfig
from arctrm.errors import CheckpointError, ResourceError
from arctrm.model.attention import has_packed_kernel
from arctrm.reader.last_token import has_kernel
from arctrm.solve.weights import here_and_now
from arctrm.system import (
    LOCK,
    clear_abandoned,
    compute_dtype,
    disk_errors,
    hold,
    temporary,
    write_bytes_atomically,
    write_run_record,
)

PACKAGE = Path(arctrm.__file__).parent
CPU = torch.device("cpu")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_bytes_atomically(path, b"old")

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Permission denied\)"):
        write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_dead_processes_left_is_cleared(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = temporary(tmp_path / "file")
    own.write_text("mine")
    (tmp_path / f".tmp-{ended.pid}-file").write_text("half")
    (tmp_path / f".tmp-{ended.pid}-folder").mkdir()
    (tmp_path / ".tmp-step_00000001").mkdir()
    (tmp_path / "file").write_text("whole")
    clear_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {own, tmp_path / "file"}


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_is_told_from_other_refusals(tmp_path, kind):
    told = {
        OSError: (OSError(28, "No space left on device"), OSError(13, "Permission denied")),
        SafetensorError: (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            SafetensorError("I/O error: Permission denied (os error 13)"),
        ),
    }[kind]
    folder = tmp_path / "not" / "there"
    with pytest.raises(ResourceError, match=r"disk is full \(.* MiB free\)"), disk_errors(folder):
        raise told[0]
    with pytest.raises(CheckpointError, match="Permission denied"), disk_errors(folder):
        raise told[1]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def revision_seen_from(source: Path) -> str:
    code = "from arctrm.system import git_revision; print(git_revision())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=source,
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with what the revision needs of the package in it, not yet tracked."""
    (tmp_path / "arctrm").mkdir()
    for name in ("__init__.py", "errors.py", "system.py"):
        shutil.copy(PACKAGE / name, tmp_path / "arctrm" / name)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    return tmp_path


def test_the_revision_is_the_commit_and_says_when_tracked_files_differ(repository):
    assert revision_seen_from(repository) == "unknown"  # somebody else's repository
    git(repository, "add", "arctrm")
    git(repository, "commit", "-q", "-m", "package")
    head = git(repository, "rev-parse", "HEAD")
    (repository / "notes.txt").write_text("untracked")
    assert revision_seen_from(repository) == head
    with (repository / "arctrm" / "errors.py").open("a") as file:
        file.write("\n# changed\n")
    assert revision_seen_from(repository) == f"{head}+dirty"


def test_the_record_holds_config_versions_and_hardware(tmp_path):
    config = PretrainConfig(seed=3, out=tmp_path)
    write_run_record(tmp_path, config, data_fingerprint="abc")
    record = json.loads((tmp_path / "config.json").read_text())
    assert PretrainConfig.model_validate(record["config"]) == config
    assert record["data_fingerprint"] == "abc"
    assert record["versions"]["arctrm"] == arctrm.__version__
    assert record["versions"]["torch"]
    assert "cores" in record["hardware"]
    assert record["command"] == sys.argv
    with pytest.raises(CheckpointError, match=r"gone: cannot be written \(No such file"):
        write_run_record(tmp_path / "gone", config)


@pytest.mark.parametrize(
    ("capability", "training", "answering"),
    [
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((7, 5), torch.float32, torch.float16),  # T4
        ((6, 0), torch.float32, torch.float16),  # P100
    ],
)
def test_auto_on_a_gpu_goes_by_its_generation(monkeypatch, capability, training, answering):
    """Arithmetic, the packed kernel of torch, Triton, and the arithmetic of a hub reader."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # triton is there
    gpu = torch.device("cuda")
    assert compute_dtype("auto", gpu) == training
    assert compute_dtype("auto", gpu, trains=False) == answering
    assert compute_dtype("float32", gpu) == torch.float32
    assert has_packed_kernel(gpu, torch.float16) == (capability >= (8, 0))
    assert has_kernel(gpu) == (capability >= (7, 0))
    for mode, expected in (("frozen", answering), ("lora", training)):
        here = here_and_now(HubConfig(mode=mode), InferenceConfig(), gpu)
        assert here.dtype == str(expected).removeprefix("torch.")


@pytest.mark.parametrize(
    ("can", "processor", "answering"),
    [
        ({"amx_bf16": True}, "Intel", torch.bfloat16),
        ({"avx512_bf16": True}, "Intel", torch.float32),
        ({"avx512_bf16": True}, "AMD", torch.bfloat16),
        ({}, "AMD", torch.float32),
    ],
)
def test_a_cpu_trains_in_float32_and_answers_in_what_is_faster(
    monkeypatch, can, processor, answering
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    monkeypatch.setattr("arctrm.system.processor", lambda: processor)
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("auto", CPU, trains=False) == answering
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_a_folder_is_held_by_one_process_and_not_by_a_dead_one(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from arctrm.system import hold\n"
        "file = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {other.pid} works there; wait for it"):
            hold(tmp_path / "out")
        other.kill()
    with hold(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).read_text() == str(os.getpid())
