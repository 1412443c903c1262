"""Checkpoint files: whole or not there, the one before kept, damage found before it is trained on."""

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
    """Return whether a step has begun and not finished: a batch of it, or the accumulation of its gradients.

    A checkpoint would hold part of it in its weights or statistics, and lack the gradients.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.current.started > progress.current.processed) or accumulates(trainer)


def accumulates(trainer: Trainer) -> bool:
    """Return whether gradients of finished batches wait for those of later ones."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    at_end = progress.is_last_batch and done == progress.current.ready
    return bool(done % trainer.accumulate_grad_batches) and not at_end


def all_ranks_save(trainer: Trainer, exception: BaseException) -> bool:
    """Whether weights can be saved after an exception.

    Where they are sharded all ranks have to give theirs: they do when they have agreed to stop, and if one
    alone has failed, waiting for it would never end.
    """
    agreed = isinstance(exception, AgreedStop | SIGTERMException)
    return agreed or not isinstance(trainer.strategy, ModelParallelStrategy)


class WhenInterrupted(ModelCheckpoint):
    """Saves at an exception between steps; half a step takes the place of no checkpoint that is whole."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless the last checkpoint is the better one."""
        no_better = not within_a_step(trainer) or not Path(str(self.dirpath), LAST).is_file()
        if no_better and all_ranks_save(trainer, exception):
            super().on_exception(trainer, pl_module, exception)


class WithinEpoch(ModelCheckpoint):
    """Saves between steps, except after the last batch of an epoch, from where Lightning would repeat it."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save, if it is time."""
        if not (trainer.is_last_batch or accumulates(trainer)):
            super().on_train_batch_end(trainer, pl_module, *args)


@dataclass(frozen=True)
class CheckpointOptions:
    """When `last.ckpt` is written, beside the end of every epoch and an interruption.

    Attributes:
        every_minutes: at most this long after the last time; a kill without warning costs no more.
        every_n_steps: after as many optimiser steps.
    """

    every_minutes: float | None = 30.0
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.every_minutes is not None and not 0 < self.every_minutes < math.inf:
            raise UserError(f"--checkpoint.every_minutes {self.every_minutes}: expected more than 0, or null")
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise UserError(f"--checkpoint.every_n_steps {self.every_n_steps}: expected 1 or more, or null")

    def callbacks(self, folder: Path) -> list[Callback]:
        """That write it."""
        name = LAST.removesuffix(".ckpt")
        kinds: list[Callback] = []
        if self.every_minutes is not None:
            interval = timedelta(minutes=self.every_minutes)
            kinds.append(
                WithinEpoch(folder, name, train_time_interval=interval, enable_version_counter=False)
            )
        if self.every_n_steps is not None:
            kinds.append(
                WithinEpoch(
                    folder, name, every_n_train_steps=self.every_n_steps, enable_version_counter=False
                )
            )
        return kinds


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames; `last.ckpt` that gives way becomes `previous.ckpt`.

    Lightning's own holds the whole file in memory first, and moves it over from the folder of temporary
    files, which copies it where that is another file system: a kill then leaves half of it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file.

        Raises:
            RunFailed: there is no room, or the folder cannot be written; what was there stays.
        """
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                left.unlink()
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                _link(path, path.with_name(PREVIOUS))
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:  # torch wraps what the file system says
            reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
            raise RunFailed(
                f"the checkpoint {path} cannot be written ({reason}); what was saved before is still there: "
                "make room and continue with --ckpt_path last"
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file on the CPU, and no code from it."""
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint


def _link(path: Path, name: Path) -> None:
    """Give the file a second name, in place of whatever has it; without a moment at which it has none."""
    draft = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without links: then there is none before
        return
    try:
        os.replace(draft, name)
    finally:
        draft.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """Why the file is not a whole checkpoint, None if it is one; its checksums are compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        return f"it is cut off or no checkpoint: {error}"
    return None if wrong is None else f"{wrong} in it does not match its checksum"
