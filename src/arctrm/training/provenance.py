"""Where a run came from: revision, versions, command line, hardware. Torch-free."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from arctrm import __version__
from arctrm.training.files import write_text_atomically

_PACKAGES = ("torch", "numpy", "safetensors", "transformers", "accelerate")


def git_revision() -> str:
    """Commit of the checkout that this package runs from, "+dirty" when tracked files differ.

    "unknown" when the package is installed outside its repository, even if the environment lies
    inside someone else's repository.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    revision = _git("rev-parse", "HEAD")
    if tracked is None or revision is None:
        return "unknown"
    dirty = _git("status", "--porcelain", "--untracked-files=no", ":/")
    return revision + ("+dirty" if dirty else "")


def hardware() -> str:
    """The machine in one line: processor, cores, memory in GiB, GPUs with their memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"]
    return "; ".join(parts + _gpus())


def run_record(config: BaseModel, *, data_fingerprint: str | None = None) -> dict[str, Any]:
    """Everything needed to say what a run was; JSON can hold it.

    Args:
        config: the resolved configuration of the command.
        data_fingerprint: fingerprint of the data set, once it is known.
    """
    return {
        "config": config.model_dump(mode="json"),
        "data_fingerprint": data_fingerprint,
        "git_revision": git_revision(),
        "versions": _versions(),
        "command": sys.argv,
        "hardware": hardware(),
    }


def write_run_record(run: Path, record: dict[str, Any]) -> Path:
    """Write `config.json` into the run folder in one step; returns its path.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: the folder cannot be written.
    """
    path = run / "config.json"
    write_text_atomically(path, json.dumps(record, indent=2) + "\n")
    return path


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"arctrm": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git(*arguments: str) -> str | None:
    """Output of a git command in the package's folder, or None where it fails."""
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _gpus() -> list[str]:
    rows = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return rows.splitlines() if rows else []


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
