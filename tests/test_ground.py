"""The flat modules: memory, cores, names of runs, and text for the terminal."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from clip_lightning.commands.search import search
from clip_lightning.cpu import cores
from clip_lightning.run_folder import RunFolder
from clip_lightning.search.index import FoundImage, ImageIndex
from clip_lightning.terminal import json_line, one_line, printable

Printed = pytest.CaptureFixture[str]
FREED = """
import resource, torch
from clip_lightning.cpu import keep_freed_memory
if {keep}:
    keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)  # 40 MB, more than glibc would ever keep
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HARMFUL = "a\x1b[2J\x9b2J\nclip-lightning: error"
SHOWN = "a\ufffd[2J\ufffd2J clip-lightning: error"


def test_json_for_a_terminal_has_no_control_characters() -> None:
    record = {"caption": f"{HARMFUL} 狗 é \udc80 \u202e", "image": Path("a.jpg")}
    line = json_line(record)
    assert line.isprintable() and "狗 é" in line
    assert json.loads(line) == record | {"image": "a.jpg"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    faults = {}
    for keep in (False, True):  # each in a process of its own, as it cannot be undone
        script = FREED.format(keep=keep)
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        faults[keep] = int(result.stdout)
    assert faults[True] * 10 < faults[False]


@pytest.mark.parametrize("output", ["1>&2", "1>&-"])  # `sys.stdout` is None if it is closed
def test_a_process_ends_with_its_files_written(tmp_path: Path, output: str) -> None:
    program = "import sys, clip_lightning.__main__ as main; left_open = open(sys.argv.pop(), 'w')"
    program += "; print('kept', end='', file=left_open); sys.exit(main.run_process())"
    words = shlex.join([sys.executable, "-c", program, "--version", str(tmp_path / "file")])
    done = subprocess.run(f"{words} {output}", shell=True, capture_output=True, check=False)
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "kept"), done.stderr


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


def test_the_newest_run_is_last_and_other_programs_configurations_are_not_runs(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "older", "oldest", "other")):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        run.config.write_text("server: x\n" if name == "other" else "model: {}\ntrainer: {}\n")
        os.utime(run.config, (1000 - age, 1000 - age))
    assert [run.path.name for run in RunFolder.runs(tmp_path)] == ["oldest", "older", "newest"]
    assert RunFolder.of_checkpoint(run.last) == RunFolder.of_checkpoint(run.best) == run
    # new ones have names of their own in the order of time
    runs = [RunFolder.new(tmp_path) for _ in range(50)]
    assert len({run.path for run in runs}) == 50
    assert [run.path.name[:15] for run in runs] == sorted(run.path.name[:15] for run in runs)


def test_control_characters_are_replaced() -> None:
    assert one_line(HARMFUL) == SHOWN
    assert printable("a\nb\tc\x07") == "a\nb\tc\ufffd"
    assert printable("\ud83d") == "?"


def test_search_output_is_harmless(capsys: Printed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = FoundImage(Path(HARMFUL), 0.5, (HARMFUL,), 1, 1, missing=True)
    index = MagicMock(search=lambda queries, k: [[image]])
    monkeypatch.setattr(ImageIndex, "load", lambda *_: index)
    search(tmp_path, HARMFUL)
    assert capsys.readouterr().out == f"0.500  {SHOWN} (missing)  {SHOWN}\n"
