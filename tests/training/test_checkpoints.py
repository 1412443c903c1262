"""Checkpoint files through kills, full disks and damage."""

import errno
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import Loop, killed_at

from clip_lightning.errors import RunFailed, UserError
from clip_lightning.training import checkpoints
from clip_lightning.training.checkpoints import CheckpointOptions, SafeCheckpointIO, damage, find_checkpoint

Patch, Printed = pytest.MonkeyPatch, pytest.CaptureFixture[str]


def content(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((1000,), float(step))}


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a last checkpoint of step 2, and that of step 1 before it; its folder of checkpoints."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("trainer:\n")
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        SafeCheckpointIO().save_checkpoint(content(step), folder / "last.ckpt")
    SafeCheckpointIO().save_checkpoint(content(1), folder / "best.ckpt")
    return folder


def test_a_kill_at_any_moment_leaves_a_last_checkpoint(run: Path) -> None:
    kills = 0
    while killed_at(kills + 1, lambda: SafeCheckpointIO().save_checkpoint(content(3), run / "last.ckpt")):
        kills += 1
        assert damage(run / "last.ckpt") is None
        assert damage(run / "previous.ckpt") is None
        assert step_of(run / "last.ckpt") in (2, 3)
    assert kills >= 4
    SafeCheckpointIO().save_checkpoint(content(4), run / "last.ckpt")
    assert step_of(run / "last.ckpt") == 4
    assert not list(run.glob(".last*")), "nor is anything left of those that were killed"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(run: Path, monkeypatch: Patch, call: str) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoints.os, call, Mock(side_effect=full))
    with pytest.raises(RunFailed, match=r"cannot be written \(No space left on device\).*--ckpt_path last"):
        SafeCheckpointIO().save_checkpoint(content(3), run / "last.ckpt")
    monkeypatch.undo()
    assert step_of(run / "last.ckpt") == 2
    assert not [path for path in run.iterdir() if path.suffix == ".tmp"]


def test_a_damaged_last_checkpoint_is_replaced_by_the_previous_one(run: Path, capsys: Printed) -> None:
    last = run / "last.ckpt"
    assert sorted(path.name for path in run.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert (step_of(last), step_of(run / "previous.ckpt"), damage(last)) == (2, 1, None)
    whole = last.read_bytes()
    assert find_checkpoint("last", run.parents[1]) == last
    at = whole.index(torch.full((8,), 2.0).numpy().tobytes())
    for damaged in (whole[:-100], whole[:2000], b"", whole[:at] + b"\xff" + whole[at + 1 :]):
        last.write_bytes(damaged)
        assert find_checkpoint("last", run.parents[1]) == run / "previous.ckpt"
        assert f"{last} is damaged" in (said := capsys.readouterr().err)
        assert "using previous.ckpt instead" in said
    (run / "previous.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"last.ckpt is damaged .*; choose another checkpoint"):
        find_checkpoint("last", run.parents[1])
    (run / "best.ckpt").write_bytes(whole[:-1])
    for given in ("best", run / "best.ckpt"):
        with pytest.raises(UserError, match=r"best.ckpt is damaged"):
            find_checkpoint(given, run.parents[1])


@pytest.mark.parametrize(
    ("processed", "accumulated", "there", "saved"),
    [
        (3, 1, True, True),
        (3, 1, False, True),
        (2, 1, True, False),
        (2, 1, False, True),
        (3, 2, True, False),
        (3, 3, True, True),
    ],
)
def test_half_a_step_never_replaces_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: Patch, processed: int, accumulated: int, there: bool, saved: bool
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(ModelCheckpoint, "on_exception", lambda *given: asked.append(given))
    if there:
        (tmp_path / "last.ckpt").touch()
    last, loop = checkpoints.LastCheckpoint(tmp_path, "last"), Loop(3, processed, accumulated)
    last.on_exception(loop, None, MemoryError())
    assert bool(asked) == saved


def test_the_newest_run_is_resumed_and_other_folders_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "stray" / "checkpoints").mkdir(parents=True)
    for given in ("last", "best"):
        with pytest.raises(UserError, match=rf"--ckpt_path {given}: there is no .*/{given}\.ckpt; set"):
            find_checkpoint(given, tmp_path)
    with pytest.raises(UserError, match=r"stray is a folder; set"):
        find_checkpoint(tmp_path / "stray", tmp_path)
    for place in (tmp_path, tmp_path / "absent"):
        assert find_checkpoint("auto", place) is None
    newer, older = (tmp_path / name / "checkpoints" / "last.ckpt" for name in ("newer", "older"))
    for file, age in ((newer, 10), (older, 1000)):
        SafeCheckpointIO().save_checkpoint(content(age), file)
        config = file.parents[1] / "config.yaml"
        config.write_text("trainer:\n")
        for path in (file, config):
            os.utime(path, (time.time() - age, time.time() - age))
    assert find_checkpoint("last", tmp_path) == find_checkpoint("auto", tmp_path) == newer
    with pytest.raises(UserError, match=r"best: there is no .*newer/checkpoints/best\.ckpt; set"):
        find_checkpoint("best", tmp_path)
    os.utime(older)
    assert find_checkpoint("auto", tmp_path) == older
    # of another program: a run that resumes there would overwrite it
    (tmp_path / "newer" / "config.yaml").write_text("title: my pages\n")
    assert find_checkpoint("last", tmp_path) == older


def test_each_interval_has_a_callback_of_its_own(tmp_path: Path) -> None:
    counts = [len(CheckpointOptions(*given).callbacks(tmp_path)) for given in ((), (None, 5), (None,))]
    assert counts == [2, 2, 1]
    assert len(CheckpointOptions(float("inf")).callbacks(tmp_path)) == 2, "none is written in between"
    assert len({callback.state_key for callback in CheckpointOptions(10, 5).callbacks(tmp_path)}) == 3
