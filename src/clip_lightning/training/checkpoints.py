"""Writes checkpoints that are always complete, finds the one to resume, and checks that it fits."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import complete_file
from clip_lightning.model.checkpoint import fixed_towers, put_back_fixed_towers, read_checkpoint
from clip_lightning.run_folder import LAST, PREVIOUS, RunFolder
from clip_lightning.terminal import note
from clip_lightning.training.optim import param_groups


def within_a_step(trainer: Trainer) -> bool:
    """Return whether a step has begun and not finished, so that a checkpoint would contain a part of it."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.started > batches.processed or is_accumulating(trainer)


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether gradients of finished batches are still to be added to those of later ones."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    at_end = progress.is_last_batch and done == progress.current.ready
    return bool(done % trainer.accumulate_grad_batches) and not at_end


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` after an epoch, between steps, or when an exception ends training.

    Half a step never replaces a complete checkpoint. After the last batch of an epoch, it waits for the end
    of the epoch, which a resumed run would otherwise repeat.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        replaces = Path(str(self.dirpath), LAST).is_file()
        if not (replaces and within_a_step(trainer)):
            super().on_exception(trainer, pl_module, exception)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not (trainer.is_last_batch or is_accumulating(trainer)):
            super().on_train_batch_end(trainer, pl_module, *args)


@dataclass(frozen=True)
class CheckpointOptions:
    """When to write `last.ckpt`, in addition to the end of every epoch and an interruption.

    Attributes:
        every_minutes: minutes between two checkpoints, the most that a killed run loses.
        every_n_steps: optimizer steps between two checkpoints.
    """

    every_minutes: PositiveFloat | None = 30.0
    every_n_steps: PositiveInt | None = None

    def callbacks(self, folder: Path) -> list[Callback]:
        """Return the callbacks that write `last.ckpt` into a folder."""
        kinds: list[dict[str, Any]] = [{"save_on_train_epoch_end": True, "save_on_exception": True}]
        if self.every_minutes is not None:
            kinds.append({"train_time_interval": timedelta(minutes=min(self.every_minutes, 1e9))})
        if self.every_n_steps is not None:
            kinds.append({"every_n_train_steps": self.every_n_steps})
        return [LastCheckpoint(folder, "last", enable_version_counter=False, **kind) for kind in kinds]


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary name and renames it; `previous.ckpt` is the replaced `last.ckpt`.

    Lightning's class collects the complete file in memory, and moves it from the folder of temporary files.
    On another file system, the move is a copy, and a kill leaves half of the file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file; existing files do not change if the disk is full."""
        path = Path(path)
        link = path.with_name(f".{PREVIOUS}.{os.getpid()}.tmp")
        try:
            for leftover in path.parent.glob(".*.ckpt.*.tmp"):  # of a process that was killed
                leftover.unlink()
            with complete_file(path) as draft:
                with draft.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.name == LAST and path.exists():
                    with contextlib.suppress(OSError):  # a file system without links has no `previous.ckpt`
                        os.link(path, link)
                        os.replace(link, path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch wraps the errors of the file system
            reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
            raise RunFailed(
                f"the checkpoint {path} cannot be written ({reason}); earlier checkpoints are intact: free "
                "disk space, and resume with --ckpt_path last"
            ) from error
        finally:
            link.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """Return why the file is not a complete checkpoint, or None if it is; its checksums are verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        return f"it is truncated or not a checkpoint: {error}"
    return None if damaged is None else f"{damaged} in it does not match its checksum"


def find_checkpoint(given: Any, root: Path) -> Path | None:
    """Return the file that `--ckpt_path` names: a path, or `last` or `best` of the newest run under `root`.

    `auto` is the newest `last.ckpt`, or None if there is none, so that a job can be restarted with the same
    command. `previous.ckpt` takes the place of a damaged `last.ckpt`. A run never starts over silently.
    """
    if given is None:
        return None
    runs = RunFolder.runs(root)
    if given == "auto":
        runs = sorted((run for run in runs if run.last.is_file()), key=lambda run: run.last.stat().st_mtime)
        if not runs:
            return None
    if given in ("last", "best", "auto"):
        newest = runs[-1] if runs else RunFolder(root / "*")
        file = newest.best if given == "best" else newest.last
    else:
        file = Path(given)
    if not file.is_file():
        problem = f"{file} is a folder" if file.is_dir() else f"there is no {file}"
        raise UserError(
            f"--ckpt_path {given}: {problem}; set --trainer.default_root_dir to the folder of the "
            "runs, or --ckpt_path to a file, `last`, `best` or `auto`, or remove it to start a run"
        )
    reason, previous = damage(file), file.with_name(PREVIOUS)
    if reason is None:
        return file
    if file.name != LAST or not previous.is_file() or damage(previous) is not None:
        raise UserError(
            f"--ckpt_path {given}: {file} is damaged ({reason}); choose another checkpoint, or start again "
            "without --ckpt_path"
        )
    note(f"{file} is damaged ({reason}); using {previous.name} instead")
    return previous


def check_fits(file: str | Path, checkpoint: dict[str, Any], model: LightningModule) -> None:
    """Reject the checkpoint of a different model, and complete one that fits by its fixed towers."""
    put_back_fixed_towers(checkpoint, model.clip, model.lora)
    stored, own = checkpoint["frozen_towers"], fixed_towers(model.clip)
    there, here = (
        {"frozen": sorted(fixed), **{name: tuple(tensor.shape) for name, tensor in state.items()}}
        for fixed, state in ((stored, checkpoint["state_dict"]), (own, model.state_dict()))
    )
    for name in {**there, **here}:
        then, now = there.get(name, "absent"), here.get(name, "absent")
        if then != now:
            raise UserError(
                f"{file} is of a different model ({name} is {then} there and {now} here); set the same "
                "--model options as in training"
            )


def check_resumes(file: Path, model: LightningModule, data: LightningDataModule, ranks: int) -> None:
    """Reject a resume with different data, batches or parameter groups, before anything is computed."""
    checkpoint = read_checkpoint(file)
    data.check_resumes(checkpoint.get(type(data).__qualname__, {}), ranks)
    own = param_groups(model.clip, model.optimizer)
    for optimizer in checkpoint.get("optimizer_states", ()):
        then, now = (
            {group["name"]: len(group["params"]) for group in groups}
            for groups in (optimizer["param_groups"], own)
        )
        if then != now:
            raise UserError(
                f"{file} was trained with the parameter groups {then}, and the model has {now}; set "
                "--model.optimizer.layer_decay and freeze_below as in training"
            )
