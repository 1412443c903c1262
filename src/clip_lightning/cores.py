"""Count the CPU cores that this process may use."""

from __future__ import annotations

import math
import os
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
