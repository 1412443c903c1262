"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cores() -> int:
    """Count the cores that this process may use: those of its CPU affinity, up to its control group's quota.

    A job that was given 8 of 128 cores, or a container that was given two, must not start 128 threads.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
        quota, period = Path(f"/sys/fs/cgroup{group}/cpu.max").read_text().split()
        return min(allowed, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is no quota, or no version 2 of control groups
        return allowed
