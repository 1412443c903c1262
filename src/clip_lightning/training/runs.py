"""Runs and their folders: names, the checkpoint to go on from, and whether it fits."""

from __future__ import annotations

import pickle
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule

from clip_lightning.errors import UserError
from clip_lightning.model.checkpoint import fixed_towers, preprocessing
from clip_lightning.training.checkpoints import LAST, PREVIOUS, damage


def new_run_id() -> str:
    """Sorts by time, and is unlikely to meet another run's."""
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(4)


def is_run(folder: Path) -> bool:
    """Return whether the folder holds the configuration of a run; other programs have a `config.yaml` too."""
    file = folder / "config.yaml"
    return file.is_file() and re.search(rb"^trainer:", file.read_bytes(), re.MULTILINE) is not None


def find_checkpoint(given: Any, root: Path) -> Path | None:
    """The file that `--ckpt_path` means: a path, or `last` or `best` of the newest run under `root`.

    `auto` is the newest `last` that there is, and None where there is none: for a job that is started again
    by the same command.

    Raises:
        UserError: there is no such file; a run never starts over silently.
    """
    if given is None:
        return None
    given = str(given)
    if given not in ("last", "best", "auto"):
        expected = "expected a checkpoint file, `last`, `best` or `auto`"
        if Path(given).is_dir():
            raise UserError(f"--ckpt_path {given} is a folder; {expected}")
        if not Path(given).is_file():
            raise UserError(f"--ckpt_path {given}: no such file; {expected}")
        return _sound(Path(given), given)
    runs = [folder for folder in root.glob("*") if is_run(folder)]
    if given == "auto":
        saved = [file for folder in runs if (file := folder / "checkpoints" / LAST).is_file()]
        return _sound(max(saved, key=lambda file: file.stat().st_mtime), given) if saved else None
    if not runs:
        raise UserError(
            f"--ckpt_path {given}: no run under {root}; start one without --ckpt_path, "
            "or give its --trainer.default_root_dir"
        )
    newest = max(runs, key=lambda folder: (folder / "config.yaml").stat().st_mtime)
    checkpoint = newest / "checkpoints" / f"{given}.ckpt"
    if not checkpoint.is_file():
        raise UserError(
            f"--ckpt_path {given}: the newest run, {newest}, has no {given}.ckpt; "
            "name the checkpoint of another run, or start anew without --ckpt_path"
        )
    return _sound(checkpoint, given)


def _sound(checkpoint: Path, given: Any) -> Path:
    """The checkpoint, or in place of a damaged last one the one before.

    Raises:
        UserError: it is damaged, and there is none to take in its place.
    """
    wrong = damage(checkpoint)
    if wrong is None:
        return checkpoint
    before = checkpoint.with_name(PREVIOUS)
    if checkpoint.name != LAST or not before.is_file() or damage(before) is not None:
        raise UserError(
            f"--ckpt_path {given}: {checkpoint} is damaged ({wrong}); name another checkpoint, or start anew"
        )
    print(f"{checkpoint} is damaged ({wrong}); the one before is taken, {before.name}", file=sys.stderr)
    return before


def check_fits(file: Path, model: LightningModule) -> None:
    """Refuse what is no checkpoint, or one of another model.

    Raises:
        UserError: says what is different.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        stored, frozen = checkpoint["state_dict"], checkpoint["frozen_towers"]
        then = checkpoint["preprocessing"]
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError) as error:
        raise UserError(f"--ckpt_path {file} is no checkpoint of `clip-lightning fit`") from error
    same = "give the same --model options as in training (they are in config.yaml of the run)"
    if frozen.keys() != fixed_towers(model.clip).keys():
        were = " and ".join(name.removeprefix("clip.") for name in frozen) or "no tower"
        raise UserError(f"--ckpt_path {file} was trained with {were} frozen; {same}")
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(f"{tower}." for tower in frozen))
    }
    if differing := _differing(stored, own):
        raise UserError(f"--ckpt_path {file} is of another model ({differing}); {same}")
    for what, now in preprocessing(model.clip, model.lora).items():
        if then.get(what) != now:
            raise UserError(f"--ckpt_path {file}: its {what} is {then.get(what)}, here {now}; {same}")


def _differing(stored: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """The first tensor that `own` lacks or has in another shape; nothing if there is none."""
    for name, tensor in stored.items():
        if name not in own:
            return f"it has {name}"
        if tensor.shape != own[name].shape:
            return f"{name} is {tuple(tensor.shape)} there, {tuple(own[name].shape)} here"
    for name in own:
        if name not in stored:
            return f"it lacks {name}"
    return ""


def place_logger(logger: Namespace, folder: Path) -> None:
    """Let a logger write into the run's folder, under the run's id."""
    settings = logger.init_args
    kind = logger.class_path.rpartition(".")[2]
    if kind in ("RunLogger", "WandbLogger"):
        settings.update(Namespace(save_dir=str(folder), id=settings.get("id") or folder.name))
    elif kind in ("CSVLogger", "TensorBoardLogger"):
        # Lightning's CSVLogger deletes what it finds: a resumed run gets a folder of its own
        earlier = (folder / "metrics.csv").exists()
        version = f"resumed-{len(list(folder.glob('resumed-*'))) + 1}" if earlier else ""
        settings.update(Namespace(save_dir=str(folder), name="", version=version))
