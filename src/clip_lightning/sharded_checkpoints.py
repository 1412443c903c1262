"""Checkpoints of sharded runs: the file that every run has, and beside it a folder with each rank's share.

The file names the folder and its checksums, and takes its place when all is written. What is in the folder
stands in the file as tensors without values ("meta"). The folder is torch's distributed checkpoint, as
safetensors: no pickle, and any number of ranks can read it.
"""

from __future__ import annotations

import logging
import os
import pickle
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

from clip_lightning.errors import UserError

SHARDS = "shards"
SUFFIX = ".shards"
_BLOCK = 1 << 24  # bytes


def write_shards(checkpoint: dict[str, Any], file: Path) -> None:
    """Take the tensors that are shared out out of a checkpoint, into a folder beside `file`. On all ranks.

    Args:
        checkpoint: of Lightning, `state_dict` and `optimizer_states` among its keys; afterwards it names the
            folder, and can be saved as any other.
        file: where it will be saved.

    Raises:
        OSError: a rank has no room, or cannot write into the folder; on all ranks.
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
    ranks = torch.distributed.get_world_size()
    own = draft.glob(f"shard-{torch.distributed.get_rank() + 1:05d}-*")
    sums: list[dict[str, int]] = [{} for _ in range(ranks)]
    torch.distributed.all_gather_object(sums, {path.name: _checksum(path) for path in own})
    if torch.distributed.get_rank() == 0:
        os.replace(draft, file.with_name(names[0]))
    files = {name: checksum for each in sums for name, checksum in each.items()}
    checkpoint[SHARDS] = {"folder": names[0], "files": files}


def remove_old_shards(folder: Path) -> None:
    """Remove what no checkpoint in `folder` names any more, and what a process that was killed has left."""
    places = [*folder.glob(f"*{SUFFIX}"), *folder.glob(f".*{SUFFIX}.tmp")]
    if not places:
        return
    try:
        named = {_shards(file).get("folder") for file in folder.iterdir() if file.is_file()}
    except OSError:  # a checkpoint that cannot be read now may name them
        return
    for place in places:
        if place.name not in named:
            shutil.rmtree(place, ignore_errors=True)


def shards_of(file: Path) -> list[Path]:
    """The files beside the checkpoint `file` that belong to it."""
    shards = _shards(file)
    return [file.with_name(Path(shards["folder"]).name) / Path(name).name for name in shards.get("files", ())]


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint with whole tensors on the CPU, sharded or not.

    Raises:
        UserError: its folder is not beside it.
    """
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if SHARDS in checkpoint:
        targets = {}
        for name, holder, key in _places(checkpoint):
            if holder[key].is_meta:
                targets[name] = holder[key] = torch.empty_like(holder[key], device="cpu")
        fill(targets, file, checkpoint)
    return checkpoint


def fill(targets: Mapping[str, Tensor], file: Path, checkpoint: Mapping[str, Any]) -> None:
    """Read tensors, whole or this rank's share of them, from the folder that the checkpoint of `file` names.

    Args:
        targets: by the names of `weight_name` and `moment_name`; written in place.
        file: of the checkpoint.
        checkpoint: what it holds.

    Raises:
        UserError: the folder is not there.
    """
    folder = file.with_name(Path(checkpoint[SHARDS]["folder"]).name)
    if not folder.is_dir():
        raise UserError(f"{file} is one part of a checkpoint, {folder} is the other and not there; get both")
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is asked to be
        distributed_checkpoint.load(dict(targets), storage_reader=reader, no_dist=True)


def damage_of_shards(file: Path) -> str | None:
    """Why what the checkpoint names is not whole, None if it is, or if it names nothing."""
    sums = _shards(file).get("files", {})
    for part in shards_of(file):
        try:
            wrong = _checksum(part) != sums[part.name]
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


def _shards(file: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        shards = checkpoint.get(SHARDS, {})
        return {"folder": str(shards["folder"]), "files": dict(shards["files"])} if shards else {}
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ):
        return {}  # what it is then is said elsewhere


def _checksum(file: Path) -> int:
    """CRC-32, as that of a checkpoint's own file."""
    checksum = 0
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum
