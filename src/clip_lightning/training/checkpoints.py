"""Writes checkpoints that are always complete, keeps the previous one, and detects damaged files."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from clip_lightning.errors import AgreedStop, RunFailed, UserError
from clip_lightning.run_folder import LAST, PREVIOUS


def within_a_step(trainer: Trainer) -> bool:
    """Return whether a step has begun and not finished, including the accumulation of its gradients.

    A checkpoint would contain a part of the step in its weights or statistics, but not the gradients.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.current.started > progress.current.processed) or is_accumulating(trainer)


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether gradients of finished batches are still to be added to those of later ones."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    at_end = progress.is_last_batch and done == progress.current.ready
    return bool(done % trainer.accumulate_grad_batches) and not at_end


def all_ranks_save(trainer: Trainer, exception: BaseException) -> bool:
    """Return whether all ranks save their weights after this exception.

    Sharded weights need every rank. If all ranks have agreed to stop, they all save; if one rank has failed,
    the others would wait for it forever.
    """
    agreed = isinstance(exception, AgreedStop | SIGTERMException)
    return agreed or not isinstance(trainer.strategy, ModelParallelStrategy)


class WhenInterrupted(ModelCheckpoint):
    """Saves when an exception ends training; half a step never replaces a complete checkpoint."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless it would replace a complete checkpoint by half a step."""
        loses_nothing = not within_a_step(trainer) or not Path(str(self.dirpath), LAST).is_file()
        if loses_nothing and all_ranks_save(trainer, exception):
            super().on_exception(trainer, pl_module, exception)


class WithinEpoch(ModelCheckpoint):
    """Saves between steps, except after the last batch of an epoch, which a resumed run would repeat."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save if the interval has passed."""
        if not (trainer.is_last_batch or is_accumulating(trainer)):
            super().on_train_batch_end(trainer, pl_module, *args)


@dataclass(frozen=True)
class CheckpointOptions:
    """When to write `last.ckpt`, in addition to the end of every epoch and an interruption.

    Attributes:
        every_minutes: minutes between two checkpoints, the most that a killed run loses.
        every_n_steps: optimizer steps between two checkpoints.
    """

    every_minutes: float | None = 30.0
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.every_minutes is not None and not 0 < self.every_minutes < math.inf:
            raise UserError(
                f"--checkpoint.every_minutes {self.every_minutes}: expected a number greater than 0, or null"
            )
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise UserError(f"--checkpoint.every_n_steps {self.every_n_steps}: expected 1 or more, or null")

    def callbacks(self, folder: Path) -> list[Callback]:
        """Return the callbacks that write `last.ckpt` into a folder."""
        intervals: list[dict[str, Any]] = []
        if self.every_minutes is not None:
            intervals.append({"train_time_interval": timedelta(minutes=self.every_minutes)})
        if self.every_n_steps is not None:
            intervals.append({"every_n_train_steps": self.every_n_steps})
        name = LAST.removesuffix(".ckpt")
        return [WithinEpoch(folder, name, enable_version_counter=False, **kind) for kind in intervals]


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary name and renames it; `previous.ckpt` is the replaced `last.ckpt`.

    Lightning's class collects the complete file in memory, and moves it from the folder of temporary files.
    On another file system, the move is a copy, and a kill leaves half of the file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file.

        Raises:
            RunFailed: the disk is full or the folder cannot be written; existing files do not change.
        """
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                leftover.unlink()
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                _link(path, path.with_name(PREVIOUS))
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:  # torch wraps the errors of the file system
            reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
            raise RunFailed(
                f"the checkpoint {path} cannot be written ({reason}); earlier checkpoints are intact: free "
                "disk space, and resume with --ckpt_path last"
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the file on the CPU, without executing code from it."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint


def _link(path: Path, name: Path) -> None:
    """Link a second name to the file, which atomically replaces the file of that name."""
    draft = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without links has no `previous.ckpt`
        return
    try:
        os.replace(draft, name)
    finally:
        draft.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """Return why the file is not a complete checkpoint, or None if it is; its checksums are verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        return f"it is truncated or not a checkpoint: {error}"
    return None if damaged is None else f"{damaged} in it does not match its checksum"
