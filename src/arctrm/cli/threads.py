"""How the threads of torch wait for each other on a CPU; settled before torch is imported.

On a busy machine a long spin makes small layers ten times slower; sleeping at once costs a quiet
one a sixth; a short spin costs neither (`benchmarks/waiting.py`).
"""

import os
from math import ceil
from pathlib import Path

SPINS = 1000  # rounds of libgomp's waiting loop, some 20 microseconds; its default is 300,000
BLOCKTIME = 1
"""Milliseconds, the shortest spin of the OpenMP of LLVM and Intel; their default is 200."""


def wait_politely() -> None:
    """Set what the user's environment leaves open: a short spin, no more threads than the quota."""
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
