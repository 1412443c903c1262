"""A loader process is killed: one line, a checkpoint, and the run goes on to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, Trainer

pytestmark = pytest.mark.faults

STEP, EPOCH, EPOCHS = 11, 8, 3


class KillsWorker(Callback):
    """Ends a loader process when a step begins."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP:
            loaders = [c for c in psutil.Process().children() if "clip_lightning" in " ".join(c.cmdline())]
            loaders[0].send_signal(signal.SIGKILL)


def test_a_loader_process_is_killed(command: Callable[..., list[str]], tmp_path: Path) -> None:
    def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        options = {"data__cache": "off", "model__freeze": "none", "data__num_workers": 2}
        options |= {"predictions__queries": 0, "trainer__max_epochs": EPOCHS}
        words = command("fit", folder, **options)
        path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
        line = [sys.executable, "-m", "clip_lightning", *words, *more]
        env = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)

    def last(folder: Path) -> dict[str, Any]:
        (file,) = folder.glob("*/checkpoints/last.ckpt")
        return torch.load(file, weights_only=True)

    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", "--trainer.callbacks+=test_worker_faults.KillsWorker")
    assert killed.returncode == 1
    assert "Traceback" not in killed.stderr
    said = killed.stderr.splitlines()[-1]
    assert "a loader process has ended (exited unexpectedly)" in said and "--ckpt_path last" in said
    assert EPOCH <= last(tmp_path / "killed")["global_step"] <= STEP + 5
    again = run(tmp_path / "killed", "--ckpt_path=last")
    assert again.returncode == 0, again.stderr
    one, other = last(tmp_path / "whole"), last(tmp_path / "killed")
    assert one["global_step"] == other["global_step"] == EPOCH * EPOCHS
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
