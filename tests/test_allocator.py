"""Kept memory, in a process of its own: it cannot be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREED = """
import resource, torch
from clip_lightning.allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)  # 40 MB, more than glibc would ever keep
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    faults = {}
    for keep in (False, True):
        script = FREED.format(keep=keep)
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        faults[keep] = int(result.stdout)
    assert faults[True] * 10 < faults[False]
