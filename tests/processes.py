"""Runs of `clip-lightning` in processes of their own, what ends them, and what they leave."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


def clip_lightning(
    *words: object, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "clip_lightning", *map(str, words)]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=timeout)


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


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that is killed at the given one of all changes to the disk; whether it was."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        changes = 0

        def counted(change: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object, **options: object) -> object:
                nonlocal changes
                changes += 1
                if changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return counting

        for name in ("fsync", "replace", "link", "mkdir", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


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


class At(Callback):
    """At a step, stops now, or presses Ctrl-C, also in a validation, or while gradients are accumulated."""

    def __init__(self, step: int, press: str = "now") -> None:
        self.step, self.press = step, press

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self.step or self.press in ("validation", "window"):
            return
        if self.press == "step":
            signal.raise_signal(signal.SIGINT)
        else:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self.press == "window" and trainer.global_step == self.step and ready == 4:
            signal.raise_signal(signal.SIGINT)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.press == "validation":
            raise KeyboardInterrupt


class Linger(Callback):
    """Once a step is reached, says so in a file, and waits to be killed, or for the file to be removed."""

    def __init__(self, step: int, note: str) -> None:
        self.step, self.note = step, note

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            time.sleep(2)  # what was logged is on its way
            Path(self.note).touch()
            while Path(self.note).exists():
                time.sleep(0.05)


def ends_at(notes: Path, **options: Any) -> dict[str, Any]:
    """Return the options of `fit` for this callback."""
    given = {"notes": notes, **options}
    arguments = {f"trainer__callbacks__{name}": value for name, value in given.items()}
    return {"trainer__callbacks+": "processes.EndsAt", **arguments}


class Loop:
    """As much of a trainer as the callbacks for signals and checkpoints ask for."""

    is_global_zero, global_step, world_size, received_sigterm = True, 3, 1, False

    def __init__(
        self, started: int = 3, processed: int = 3, accumulated: int = 1, last: bool = False
    ) -> None:
        self.fit_loop = self.epoch_loop = self.batch_progress = self.current = self._signal_connector = self
        self.started = self.ready = started
        self.processed, self.accumulate_grad_batches, self.is_last_batch = processed, accumulated, last
