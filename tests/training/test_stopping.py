"""Stopping and restarting a run in a job script; the fault tests cover kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from clip_lightning.__main__ import _status
from clip_lightning.errors import AgreedStop, RunFailed, UserError
from clip_lightning.training.checkpoints import CheckpointOptions
from clip_lightning.training.ranks import lost_rank
from clip_lightning.training.runs import find_checkpoint
from clip_lightning.training.stopping import GracefulStop, requeue, slurm_job


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Puts a program of that name on the path, which notes its arguments and ends with a status."""

    def install(status: int) -> Path:
        program, notes = tmp_path / "scontrol", tmp_path / "notes"
        program.write_text(f'#!/bin/sh\necho "$@" >> {notes}\necho refused >&2\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return notes

    return install


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "417"}, "417"),
        ({"SLURM_JOB_ID": "418", "SLURM_ARRAY_JOB_ID": "417", "SLURM_ARRAY_TASK_ID": "3"}, "417_3"),
        ({"SLURM_JOB_ID": "1; rm -rf ~"}, None),
    ],
)
def test_the_job_of_slurm(environment: dict[str, str], job: str | None) -> None:
    with mock.patch.dict(os.environ, environment, clear=True):
        assert slurm_job() == job


def test_a_job_is_requeued(scontrol: Callable[[int], Path], capfd: pytest.CaptureFixture[str]) -> None:
    notes = scontrol(0)
    requeue("417_3")
    assert notes.read_text() == "requeue 417_3\n"
    assert "417_3 was requeued" in capfd.readouterr().err
    scontrol(1)
    requeue("417")
    assert "417 could not be requeued: scontrol: refused" in capfd.readouterr().err
    with mock.patch.dict(os.environ, {"PATH": "/nowhere"}):
        requeue("417")
    assert "No such file" in capfd.readouterr().err


class Loop:
    """As much of a trainer as the callback asks."""

    def __init__(self, last: bool) -> None:
        self.fit_loop = self.epoch_loop = self.batch_progress = self.current = self._signal_connector = self
        self.started = self.processed = self.ready = 3
        self.accumulate_grad_batches = 1
        self.is_last_batch, self.received_sigterm = last, False
        self.is_global_zero, self.global_step = True, 3


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_stop_after_the_batch(number: signal.Signals, last: bool) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    stop, trainer = GracefulStop(), Loop(last)
    stop.setup(trainer, None, "fit")
    stop.on_train_start(trainer, None)
    try:
        stop.on_train_batch_end(trainer, None)
        signal.raise_signal(number)
        if number == signal.SIGINT and not last:
            with pytest.raises(AgreedStop):
                stop.on_train_batch_end(trainer, None)
        else:
            stop.on_train_batch_end(trainer, None)
        assert trainer.received_sigterm == (number != signal.SIGINT)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    finally:
        stop.teardown(trainer, None, "fit")
    assert before == {s: signal.getsignal(s) for s in before}


@pytest.mark.parametrize(("number", "calls"), [(signal.SIGUSR1, ["417"]), (signal.SIGTERM, [])])
def test_only_sigusr1_requeues_the_job(number: int, calls: list[str]) -> None:
    asked: list[str] = []
    stop = GracefulStop()
    stop._received = number
    with (
        mock.patch.dict(os.environ, {"SLURM_JOB_ID": "417"}),
        mock.patch("atexit.register", lambda function, job: asked.append(job)),
    ):
        stop.on_exception(Loop(False), None, SIGTERMException())
    assert asked == calls


@pytest.mark.parametrize(
    ("environment", "status"),
    [({}, 143), ({"SLURM_PROCID": "0"}, 143), ({"SLURM_PROCID": "3"}, 0), ({"LOCAL_RANK": "1"}, 0)],
)
def test_only_rank_0_exits_with_the_status_of_a_signal(environment: dict[str, str], status: int) -> None:
    with mock.patch.dict(os.environ, environment, clear=True):
        assert _status(SIGTERMException()) == status


def test_errors_of_a_lost_connection_and_others() -> None:
    gone = RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error [::1]: Connection reset by peer")
    assert isinstance(lost_rank(gone), RunFailed)
    assert isinstance(lost_rank(torch.distributed.DistNetworkError("x")), RunFailed)
    assert lost_rank(RuntimeError("size mismatch")) is None


def run_folder(root: Path, name: str, age: int, **files: str) -> Path:
    (root / name / "checkpoints").mkdir(parents=True)
    (root / name / "config.yaml").write_text("trainer:\n")
    for file in files:
        path = root / name / "checkpoints" / f"{file}.ckpt"
        torch.save({}, path)
        os.utime(path, (age, age))
    return root / name


def test_auto_is_the_newest_last_checkpoint_or_none(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path / "absent") is None
    assert find_checkpoint("auto", tmp_path) is None
    run_folder(tmp_path, "killed-at-once", 5)
    assert find_checkpoint("auto", tmp_path) is None
    old = run_folder(tmp_path, "old", 100, last="")
    new = run_folder(tmp_path, "new", 200, last="")
    assert find_checkpoint("auto", tmp_path) == new / "checkpoints" / "last.ckpt"
    os.utime(old / "checkpoints" / "last.ckpt", (300, 300))
    assert find_checkpoint("auto", tmp_path) == old / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    "options",
    [{"every_minutes": 0}, {"every_minutes": -1}, {"every_minutes": float("inf")}, {"every_n_steps": 0}],
)
def test_invalid_intervals(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--checkpoint\.every_"):
        CheckpointOptions(**options)


def test_each_interval_has_a_callback_of_its_own(tmp_path: Path) -> None:
    counts = [len(CheckpointOptions(*given).callbacks(tmp_path)) for given in ((), (None, 5), (None,))]
    assert counts == [1, 1, 0]
    assert len({callback.state_key for callback in CheckpointOptions(10, 5).callbacks(tmp_path)}) == 2
