"""Memory on the CPU: let the next operation reuse what one operation frees.

glibc maps every allocation above 128 kB, as activations are, by itself and returns it to the kernel when it
is freed; each operation then waits for zeroed pages. With freed memory kept, frozen towers and training on
the CPU are 1.2 to 3 times as fast (docs/log.md).
"""

from __future__ import annotations

import ctypes
import sys

# parameters of mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process, and loader workers forked from it, keep freed memory, if its C library is glibc."""
    if sys.platform.startswith("linux") and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
