"""Use CPU cores and memory as a job is allowed to, and as fast as possible."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path


def cores() -> int:
    """Return the number of cores in the process's CPU affinity, up to the quota of its control group.

    A job with 8 of 128 cores, or a container with two, must not start 128 threads.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
        quota, period = Path(f"/sys/fs/cgroup{group}/cpu.max").read_text().split()
        return min(allowed, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is no quota, or no control groups of version 2
        return allowed


def keep_freed_memory() -> None:
    """Let this process, and loader workers forked from it, keep freed memory, if its C library is glibc.

    glibc maps every allocation above 128 kB, as activations are, by itself and returns it to the kernel when
    it is freed; each operation then waits for zeroed pages. With freed memory kept, frozen towers and
    training on the CPU are 1.2 to 3 times as fast (docs/log.md).
    """
    if sys.platform.startswith("linux") and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
