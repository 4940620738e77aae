"""The `arctrm` command: runs the app and turns every error into one sentence and an exit code.

A traceback appears only with `--debug` or `ARCTRM_DEBUG=1`.  Nothing here or in the option parsing
imports torch, numpy or pydantic, so that `--help` is instant.
"""

import atexit
import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from math import ceil
from pathlib import Path
from typing import NoReturn

from arctrm.errors import ArctrmError, Interrupted

DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "ARCTRM_DEBUG"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal
LONGEST = 640  # characters of a sentence

# How the threads of torch wait for each other on a CPU. On a busy machine a long spin makes small
# layers ten times slower; sleeping at once costs a quiet one a sixth; a short spin costs neither
# (`benchmarks/waiting.py`).
SPINS = 1000  # rounds of libgomp's waiting loop, some 20 microseconds; its default is 300,000
BLOCKTIME = 1
"""Milliseconds, the shortest spin of the OpenMP of LLVM and Intel; their default is 200."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; `arguments` are those of the process unless given."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal or file of another encoding than UTF-8 shows \u2580 instead of failing.
            stream.reconfigure(errors="backslashreplace")
    # The last collection would look at all objects of torch, which takes a second or more.
    atexit.register(gc.freeze)
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out before Typer parses, so that the flag works before and after the command's name.
    debug = DEBUG_FLAG in words or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    before = {number: signal.getsignal(number) for number in STOPS}
    waiting = _Waiting()
    try:
        for number in (n for n, handler in before.items() if handler is not signal.SIG_IGN):
            signal.signal(number, waiting)  # but for those that `nohup` and `&` ignore
        from arctrm.cli.app import run_app

        code = run_app([word for word in words if word != DEBUG_FLAG])
        stop_at_once()
    except BrokenPipeError:  # the reader of a pipe has seen enough, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sentence, code = describe_error(error)
        with suppress(OSError):  # the terminal may be closed
            print(sentence, file=sys.stderr, flush=True)
    finally:
        for number, handler in before.items():
            # At its end the process has nothing left to say.
            signal.signal(number, signal.SIG_DFL if arguments is None else handler)
    raise SystemExit(code)


class _Waiting(list[int]):
    """Collects signals: an interrupt in the middle of an import may be lost, or leave half of it.
    A second one is not waited for.
    """

    def __call__(self, number: int, frame: object) -> None:
        self.append(number)
        if self[1:]:
            raise KeyboardInterrupt


def stop_at_once() -> None:
    """From now on a signal raises KeyboardInterrupt; so does one that came before."""
    waiting = [own for n in STOPS if isinstance(own := signal.getsignal(n), _Waiting)]
    for number in STOPS:
        if isinstance(signal.getsignal(number), _Waiting):
            signal.signal(number, signal.default_int_handler)
    if any(waiting):
        raise KeyboardInterrupt


def describe_error(error: BaseException) -> tuple[str, int]:
    """The line for stderr and the exit code."""
    from arctrm.console import printable

    text = printable(" ".join(str(error).split()), LONGEST)
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return text or "interrupted", Interrupted.exit_code
    if isinstance(error, ArctrmError):
        return f"error: {text}", error.exit_code
    name = (
        printable(error.filename, LONGEST) if isinstance(error, OSError) and error.filename else ""
    )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {name}" if name else ""
        return f"error: no space left on the disk{where}; free some or give another --out", 1
    if isinstance(error, OSError) and name and error.strerror:
        return f"error: {name}: {error.strerror.lower()}; check the path and its permissions", 2
    text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"internal error: {text}; run again with --debug", 1


def wait_politely() -> None:
    """Set, before torch is imported, what the user's environment leaves open: a short spin, no more
    threads than the quota.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
        os.environ.setdefault("KMP_BLOCKTIME", str(BLOCKTIME))
    quota = cpu_quota()
    if quota is not None and quota < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores that the container may use, rounded up; None without a limit."""
    try:
        if (cgroup / "cpu.max").is_file():
            limit, period = (cgroup / "cpu.max").read_text().split()
        else:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        return max(ceil(int(limit) / int(period)), 1) if int(limit) > 0 else None
    except (OSError, ValueError):  # no cgroups, no limit ("max"), or not readable
        return None
