"""A process starts no more threads than it may use cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from clip_lightning.cores import cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_cores_that_the_process_may_not_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    files = {"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": "max 100000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert cores() == 8
    files["/sys/fs/cgroup/job/cpu.max"] = "250000 100000\n"
    assert cores() == 3
    monkeypatch.undo()
    assert 1 <= cores() <= len(os.sched_getaffinity(0))


def test_only_one_function_counts_cores() -> None:
    package = Path(sys.modules["clip_lightning"].__file__ or "").parent
    asking = [path.name for path in package.rglob("*.py") if "cpu_count" in path.read_text(encoding="utf-8")]
    assert asking == ["cores.py"]
