"""The machine: files read through a limit and written as a whole, where a run came from, devices;
loads no torch itself.
"""

import errno
import fcntl
import gzip
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil
from safetensors import SafetensorError

from arctrm import __version__
from arctrm.errors import CheckpointError, ResourceError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from pydantic import BaseModel

TEMPORARY = ".tmp-"  # begins the name of what is being written: .tmp-<process>-<name>
LOCK = ".lock"  # holds the number of the process that works in the folder
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "accelerate")
# Compute capability from which a GPU has bfloat16 and torch's packed attention, and Triton; from
# which arctrm's attention by tiles was measured.
PACKED, COMPILED, TILED = (8, 0), (7, 0), (9, 0)
_FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_BYTES = 256 * 2**20  # in one file, unpacked: five times RE-ARC at 40 pairs a task
MAX_GROWTH, FREE_BYTES = 48, 8 * 2**20
"""Unpacked bytes of a packed one, and how many more are free; ARC's sets grow 12 to 46 times."""
MEMORY = {b"[": 96, b"{": 200, b'"': 30, b",": 8}  # bytes of what each byte of a JSON text begins
OTHER_MEMORY = 14  # of a byte that is none of these, no space and no cell: as in 999
MEMORY_OF_BYTE, MEMORY_OF_PACKED, FREE_MEMORY = 12, 160, 64 * 2**20
"""Bytes of memory that a byte of JSON may take, unpacked and packed; ARC's sets take 9 and 130."""


def read_limited(path: Path) -> bytes:
    """The bytes of a file, unpacked where they are gzipped; OSError beyond the limits above."""
    if path.is_fifo():  # reading would wait for a writer that may never come
        raise OSError("a pipe")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    most = MAX_BYTES
    if data.startswith(b"\x1f\x8b"):
        most = min(most, FREE_BYTES + MAX_GROWTH * len(data))
        try:
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(most + 1)
        except (EOFError, zlib.error) as error:
            raise OSError(str(error)) from error
    if len(data) > most:
        raise OSError(f"more than {most // 2**20} MiB; split it into several files")
    return data


def read_json(path: Path) -> Any:
    """JSON of a file from outside, which may be gzipped; OSError or ValueError as below."""
    return parse_json(read_limited(path), path.stat().st_size)


def parse_json(text: bytes | str, packed: int = MAX_BYTES) -> Any:
    """JSON from outside, of so many bytes on the disk; ValueError where it is deep, would take too
    much memory, or has a number that is not finite.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    spaces, most = sum(map(data.count, (b" ", b"\n"))), len(data) * MEMORY_OF_BYTE
    others = max(0, len(data) - spaces - 2 * data.count(b","))
    takes = OTHER_MEMORY * others + sum(data.count(byte) * n for byte, n in MEMORY.items())
    if takes > FREE_MEMORY + min(most, packed * MEMORY_OF_PACKED):
        raise ValueError("too many small parts; split it into several files")
    try:
        return json.loads(data, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Replace `path` in one step: whenever the process dies, the old or the new file is there."""
    aside = temporary(path)
    with disk_errors(path.parent):
        try:
            aside.write_bytes(data)
            flush_to_disk(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        flush_to_disk(path.parent)


def temporary(path: Path) -> Path:
    """Where this process writes what `path` will name."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def clear_abandoned(folder: Path) -> None:
    """Remove what processes that are dead have left half-written in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        process, _, _ = path.name.removeprefix(TEMPORARY).partition("-")
        if not (process.isdecimal() and psutil.pid_exists(int(process))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def hold(folder: Path) -> TextIO:
    """Keep a folder for this process until the file is closed; the system lets go of it when the
    process dies. Raises CheckpointError where another process works.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        if (who := file.read().strip() or "?") != str(os.getpid()):  # its own was interrupted
            file.close()
            problem = f"process {who} works there; wait for it, or choose another --out"
            raise CheckpointError(f"{folder}: {problem}") from None
    else:
        with disk_errors(folder):
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
    clear_abandoned(folder)
    return file


def flush_to_disk(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def disk_errors(folder: Path, cure: str = "") -> Iterator[None]:
    """Turn refusals while writing in `folder` into a sentence; a full disk is a ResourceError.
    `cure`: advice of the command beside the usual.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells the system's errors as text
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        if number not in _FULL and not any(f"(os error {code})" in str(error) for code in _FULL):
            problem = f"{folder}: cannot be written ({reason or error}); choose another --out"
            raise CheckpointError(problem) from error
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise ResourceError(
            f"{folder}: the disk is full ({shutil.disk_usage(there).free / 2**20:.1f} MiB free); "
            f"free some space{cure} or choose another --out"
        ) from error


@contextmanager
def memory_errors(sentence: Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory, of a GPU or of the machine, into a ResourceError with a sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class for it on a GPU only
        told = "allocate memory" in str(error) or "not enough memory" in str(error)
        if told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise ResourceError(sentence()) from error
        raise


def git_revision() -> str:
    """Commit of the checkout that this runs from, "+dirty" when files differ; or "unknown"."""
    here = ("git", "-C", str(Path(__file__).parent))
    revision = _output(*here, "rev-parse", "HEAD")
    tracked = _output(*here, "ls-files", "--error-unmatch", Path(__file__).name)
    if revision is None or tracked is None:
        return "unknown"
    dirty = _output(*here, "status", "--porcelain", "--untracked-files=no", ":/")
    return revision + ("+dirty" if dirty else "")


def processor() -> str:
    """The processor's name."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    found = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def write_run_record(
    folder: Path, config: "BaseModel", *, data_fingerprint: str | None = None
) -> None:
    """Write `config.json`: the resolved configuration, revision, versions, command, hardware."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader") or ""
    machine = f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    own = {"arctrm": __version__, "python": platform.python_version()}
    record = {
        "config": config.model_dump(mode="json"),
        "data_fingerprint": data_fingerprint,
        "git_revision": git_revision(),
        "versions": own | {name: version(name) for name in PACKAGES},
        "command": sys.argv,
        "hardware": "; ".join([machine, *gpus.splitlines()]),
    }
    write_bytes_atomically(folder / "config.json", (json.dumps(record, indent=2) + "\n").encode())


def new_accelerator() -> "Accelerator":
    """The processes and the device: CUDA or CPU (others lack float64 and packed attention)."""
    import torch
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def is_gpu(device: "torch.device", least: tuple[int, int]) -> bool:
    """Whether it is a GPU of compute capability `least` or more: PACKED, COMPILED or TILED."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= least


def compute_dtype(name: str, device: "torch.device", *, trains: bool = True) -> "torch.dtype":
    """The arithmetic that `dtype` names; auto: bfloat16 on a newer GPU, else float32; without a
    gradient also what else is faster: float16 on an older GPU, bfloat16 on some CPUs.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        older = torch.float32 if trains else torch.float16
        return torch.bfloat16 if is_gpu(device, PACKED) else older
    can: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    # With AMX it is faster; with AVX-512 alone on AMD (nearly twice), not on Intel (both measured).
    faster = can.get("amx_bf16") or (can.get("avx512_bf16") and "Intel" not in processor())
    return torch.bfloat16 if faster and not trains else torch.float32


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
