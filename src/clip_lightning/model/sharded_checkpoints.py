"""Checkpoints of sharded runs: the file that every run has, and beside it a folder with each rank's shards.

The file names the folder and its checksums, and takes its place when all is written. What is in the folder
stands in the file as tensors without values ("meta"). The folder is torch's distributed checkpoint, as
safetensors: no pickle, and any number of ranks can read it.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from clip_lightning.errors import RunFailed, UserError

SHARDS = "shards"
SUFFIX = ".shards"
_FOLDER = re.compile(r"[^/\\\0]*-[0-9a-f]{8}\.shards")
_LEFT = re.compile(rf"{_FOLDER.pattern}|\.{_FOLDER.pattern}\.tmp")
_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")
_BLOCK = 1 << 24  # bytes
# What torch raises for a file that is no checkpoint, beside OSError.
_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError),
    *(AttributeError, LookupError, TypeError, ValueError),
)


def write_shards(checkpoint: dict[str, Any], file: Path) -> Path:
    """Move the sharded tensors of a checkpoint into a folder beside `file`. On all ranks.

    Args:
        checkpoint: of Lightning, `state_dict` and `optimizer_states` among its keys; afterwards it names the
            folder, and can be saved as any other.
        file: where it will be saved.

    Returns:
        The folder.

    Raises:
        OSError: a rank has no room, or cannot write into the folder; on all ranks.
        RunFailed: ranks do not see the same folder.
    """
    names = [f"{file.stem}-{secrets.token_hex(4)}{SUFFIX}"]
    torch.distributed.broadcast_object_list(names)
    draft = file.with_name(f".{names[0]}.tmp")
    tensors = {}
    for name, holder, key in _places(checkpoint):
        value = holder[key]
        if isinstance(value, DTensor):
            tensors[name] = value.detach()
            holder[key] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
    try:
        distributed_checkpoint.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        reason, _ = next(iter(error.failures.values()))
        raise OSError(
            getattr(reason, "errno", None), getattr(reason, "strerror", None) or str(reason)
        ) from error
    own = draft.glob(f"shard-{torch.distributed.get_rank() + 1:05d}-*")
    sums: list[dict[str, int]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(sums, {path.name: _checksum(path) for path in own})
    files = {name: checksum for each in sums for name, checksum in each.items()}
    folder = file.with_name(names[0])
    seen = [True]
    if torch.distributed.get_rank() == 0:
        seen = [all((draft / name).is_file() for name in files)]
        if seen[0]:
            os.replace(draft, folder)
    torch.distributed.broadcast_object_list(seen)
    if not seen[0]:
        shutil.rmtree(draft, ignore_errors=True)
        raise RunFailed(
            f"not all machines see the folder {file.parent}, which sharded checkpoints need; give a "
            "--trainer.default_root_dir that they share"
        )
    checkpoint[SHARDS] = {"folder": folder.name, "files": files}
    return folder


def remove_old_shards(folder: Path) -> None:
    """Remove what no `*.ckpt` in `folder` names any more, and what a process that was killed has left."""
    left = [place for place in folder.iterdir() if _LEFT.fullmatch(place.name)]
    if not left:
        return
    try:
        named = {_folder(file, _shards(file)) for file in folder.glob("*.ckpt")}
    except (OSError, UserError):  # what cannot be read now may name them
        return
    for place in left:
        if place not in named:
            shutil.rmtree(place, ignore_errors=True)


def shards_of(file: Path) -> dict[Path, int]:
    """The files beside the checkpoint `file` that belong to it, and their CRC-32.

    Raises:
        UserError: it is no checkpoint.
    """
    shards = _shards(file)
    folder = _folder(file, shards)
    return {} if folder is None else {folder / name: checksum for name, checksum in shards["files"].items()}


def read_checkpoint(file: Path, *, moments: bool = True) -> dict[str, Any]:
    """A checkpoint with whole tensors on the CPU, sharded or not.

    Args:
        file: of the checkpoint.
        moments: whether the optimiser's are wanted, too; of a sharded one they stay without values otherwise.

    Raises:
        UserError: it is no checkpoint, or its folder is not beside it or holds something else.
    """
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if SHARDS in checkpoint:
        places = {
            name: (holder, key)
            for name, holder, key in _places(checkpoint)
            if holder[key].is_meta and (moments or holder is checkpoint["state_dict"])
        }
        reader = _reader(file, checkpoint)
        stored = reader.read_metadata().state_dict_metadata
        targets = {}
        for name, (holder, key) in places.items():
            size = getattr(stored.get(name), "size", None)
            if size != holder[key].shape:  # before memory is taken for it
                raise UserError(
                    f"{file}: its shards have no {name} of shape {tuple(holder[key].shape)}; the two do not "
                    "belong together: copy both again"
                )
            targets[name] = holder[key] = torch.empty_like(holder[key], device="cpu")
        fill(targets, file, checkpoint)
    return checkpoint


def fill(targets: Mapping[str, Tensor], file: Path, checkpoint: Mapping[str, Any]) -> None:
    """Read tensors, whole ones or this rank's shards, from the folder that the checkpoint of `file` names.

    Args:
        targets: by the names of `weight_name` and `moment_name`; written in place.
        file: of the checkpoint.
        checkpoint: what it holds.

    Raises:
        UserError: the folder is not there.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is asked to be
        distributed_checkpoint.load(dict(targets), storage_reader=_reader(file, checkpoint), no_dist=True)


def damage_of_shards(file: Path) -> str | None:
    """Why what the checkpoint names is not whole, None if it is, or if it names nothing."""
    try:
        parts = shards_of(file)
    except (UserError, OSError) as error:
        return str(error)
    for part, checksum in parts.items():
        try:
            wrong = _checksum(part) != checksum
        except OSError as error:
            return f"{part} cannot be read ({error.strerror})"
        if wrong:
            return f"{part} does not match its checksum"
    return None


def weight_name(name: str) -> str:
    """What a weight is called in the folder."""
    return f"state_dict/{name}"


def moment_name(optimizer: int, parameter: int, name: str) -> str:
    """What an optimiser's value for a parameter, by its number, is called in the folder."""
    return f"optimizer_states/{optimizer}/{parameter}/{name}"


def _places(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """Name, dictionary and key of each tensor among weights and moments."""
    weights = checkpoint["state_dict"]
    for key in list(weights):
        yield weight_name(key), weights, key
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        for parameter, moments in optimizer["state"].items():
            for key in [key for key, value in moments.items() if isinstance(value, Tensor)]:
                yield moment_name(number, parameter, key), moments, key


def _reader(file: Path, checkpoint: Mapping[str, Any]) -> HuggingFaceStorageReader:
    folder = _folder(file, _sound(file, checkpoint[SHARDS]))
    if folder is None or not folder.is_dir():
        raise UserError(f"{file} is one part of a checkpoint, {folder} is the other and not there; get both")
    return HuggingFaceStorageReader(str(folder))


def _folder(file: Path, shards: Mapping[str, Any]) -> Path | None:
    return file.with_name(shards["folder"]) if shards else None


def _shards(file: Path) -> dict[str, Any]:
    """What the checkpoint names, empty where that is nothing.

    Raises:
        UserError: it is no checkpoint.
        OSError: it cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about damage, of which a line is said
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        shards = checkpoint.get(SHARDS, {})
    except _UNREADABLE as error:
        raise UserError(f"{file} is no checkpoint of `clip-lightning fit`") from error
    return _sound(file, shards) if shards else {}


def _sound(file: Path, shards: Any) -> dict[str, Any]:
    """The entry of a checkpoint that may be a stranger's: plain names, of files in a folder beside it."""
    try:
        folder, files = shards["folder"], dict(shards["files"])
        sound = bool(_FOLDER.fullmatch(folder)) and all(map(_FILE.fullmatch, files))
    except (TypeError, LookupError, ValueError):
        sound = False
    if not sound:
        raise UserError(
            f"{file} names shards as no checkpoint of `clip-lightning fit` does; copy it again, or name "
            "another"
        )
    return {"folder": folder, "files": files}


def _checksum(file: Path) -> int:
    """CRC-32, as that of a checkpoint's own file."""
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
