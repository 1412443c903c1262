"""If one of several processes dies, the others stop with one line, and the run can be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, Trainer
from processes import checkpoint, clip_lightning, the_run

pytestmark = pytest.mark.faults

EPOCH, EPOCHS, STEP = 8, 2, 11
TIMEOUT = 120


class Dies(Callback):
    """Writes down the processes, and ends that of one rank at a step."""

    def __init__(
        self, notes: str, rank: int | None = None, signum: int = 9, every_rank: bool = False
    ) -> None:
        self.notes, self.rank, self.signum, self.every_rank = Path(notes), rank, signum, every_rank

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()} {trainer.global_step}\n")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP and (self.every_rank or trainer.global_rank == self.rank):
            os.kill(os.getpid(), self.signum)


@pytest.fixture(params=["ddp", "fsdp"])
def fit(
    command: Callable[..., list[str]], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `fit` on two processes."""

    def run(*more: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        options = {
            "data__batch_size": 2,
            "data__cache": "off",
            "data__num_workers": 1,
            "model__freeze": "none",
            "predictions__queries": 0,
            "trainer__max_epochs": EPOCHS,
            "trainer__devices": 2,
            "trainer__strategy": request.param,
            "trainer__callbacks+": "test_rank_faults.Dies",
            "trainer__callbacks__notes": tmp_path / "processes",
        }
        words = [*command("fit", tmp_path / "runs", **options | changes), *more]
        return clip_lightning(*words, timeout=TIMEOUT)

    return run


def processes(tmp_path: Path) -> list[tuple[int, int]]:
    lines = (tmp_path / "processes").read_text().splitlines()
    return [(int(pid), int(step)) for pid, step in map(str.split, lines)]


def assert_all_gone(tmp_path: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while alive := [pid for pid, _ in processes(tmp_path) if psutil.pid_exists(pid)]:
        assert time.monotonic() < end, f"{alive} are still there"
        time.sleep(0.5)


def last_step(tmp_path: Path) -> int:
    return checkpoint(the_run(tmp_path / "runs"))["global_step"]


def test_the_other_rank_stops_with_one_line_and_a_checkpoint(fit: Callable[..., Any], tmp_path: Path) -> None:
    done = fit(trainer__callbacks__rank=1)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "clip-lightning: error: another process of this run has ended or cannot be reached; see its "
        "messages, then resume with --ckpt_path last"
    )
    assert_all_gone(tmp_path)
    reached = last_step(tmp_path)
    assert reached in (EPOCH, STEP)
    again = fit("--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    assert [step for _, step in processes(tmp_path)[2:]] == [reached] * 2, "it resumes from the checkpoint"
    assert last_step(tmp_path) == EPOCHS * EPOCH


def test_without_the_first_rank_the_others_stop_too(fit: Callable[..., Any], tmp_path: Path) -> None:
    assert fit(trainer__callbacks__rank=0).returncode == -signal.SIGKILL
    assert_all_gone(tmp_path)
    assert last_step(tmp_path) == EPOCH


@pytest.mark.parametrize("every_rank", [False, True])
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_all(
    fit: Callable[..., Any], tmp_path: Path, signum: signal.Signals, status: int, every_rank: bool
) -> None:
    done = fit(
        trainer__callbacks__rank=0,
        trainer__callbacks__signum=int(signum),
        trainer__callbacks__every_rank=str(every_rank).lower(),
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert_all_gone(tmp_path)
    assert last_step(tmp_path) in (STEP, STEP + 1)
