"""Durable writing of small files, and one sentence for a full disk. Torch-free."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from arctrm.errors import CheckpointError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def flush_to_disk(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step: whenever the process dies, the old or the new text is there.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: the folder cannot be written for another reason.
    """
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """`write_text_atomically` for what is no text."""
    with disk_errors(path.parent):
        replace_bytes(path, content)


def replace_bytes(path: Path, content: bytes) -> None:
    """`write_bytes_atomically` for who has a sentence of their own for what the system refuses.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    aside = path.with_name(f".tmp-{path.name}")
    try:
        aside.write_bytes(content)
        flush_to_disk(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    flush_to_disk(path.parent)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses while writing in `folder` into one sentence.

    safetensors reports the operating system's errors as text of its own exception type.

    Raises:
        ResourceError: the disk (or the quota) is full; names the folder and the free space.
        CheckpointError: any other refusal, such as a read-only folder.
    """
    try:
        yield
    except OSError as error:
        raise _sentence(folder, error.errno in _FULL, error.strerror or str(error)) from error
    except SafetensorError as error:
        full = any(f"(os error {code})" in str(error) for code in _FULL)
        raise _sentence(folder, full, str(error)) from error


def _sentence(folder: Path, full: bool, reason: str) -> ResourceError | CheckpointError:
    if not full:
        return CheckpointError(f"{folder}: cannot be written ({reason}); choose another --out")
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return ResourceError(
        f"{folder}: the disk is full ({free / 2**20:.1f} MiB free); "
        "free some space, lower training.keep_last or choose another --out"
    )
