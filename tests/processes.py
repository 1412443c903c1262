"""Runs of `clip-lightning` in processes of their own, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


def clip_lightning(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "clip_lightning", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout)


def the_run(root: Path) -> Path:
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    return folder


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints are equal bit for bit, including both moments of the optimizer."""
    assert one["global_step"] == other["global_step"]
    ours, theirs = (content["state_dict"] | content["adapters"] for content in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    (first,), (second,) = one["optimizer_states"], other["optimizer_states"]
    for key, state in first["state"].items():
        assert all(torch.equal(value, second["state"][key][name]) for name, value in state.items())


class EndsAt(Callback):
    """Notes process and step when a step begins, and sends a signal to one rank or all at a step."""

    def __init__(
        self, notes: str, step: int = -1, signum: int = 9, rank: int = 0, every_rank: bool = False
    ) -> None:
        self.notes, self.step, self.signum = Path(notes), step, signum
        self.rank, self.every_rank = rank, every_rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()} {trainer.global_step}\n")
        if trainer.global_step == self.step and (self.every_rank or trainer.global_rank == self.rank):
            os.kill(os.getpid(), self.signum)


def ends_at(notes: Path, **options: Any) -> dict[str, Any]:
    """Return the options of `fit` for this callback."""
    given = {"notes": notes, **options}
    arguments = {f"trainer__callbacks__{name}": value for name, value in given.items()}
    return {"trainer__callbacks+": "processes.EndsAt", **arguments}


class Loop:
    """As much of a trainer as the callbacks for signals and checkpoints ask for."""

    is_global_zero, global_step, world_size, received_sigterm = True, 3, 1, False
    strategy: object = None

    def __init__(
        self, started: int = 3, processed: int = 3, accumulated: int = 1, last: bool = False
    ) -> None:
        self.fit_loop = self.epoch_loop = self.batch_progress = self.current = self._signal_connector = self
        self.started = self.ready = started
        self.processed, self.accumulate_grad_batches, self.is_last_batch = processed, accumulated, last
