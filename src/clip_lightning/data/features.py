"""Cache the pooled features of frozen towers on disk, so that each tower runs over the data only once.

An entry is a folder named by a digest of everything its values depend on: the tower's weights, the
preprocessing, the images or captions, and the view. A change to any of them leads to a new entry, never to a
stale one. An entry is written in shards. Each shard is written under a temporary name and then renamed to a
name with its checksum, so a killed run resumes where it stopped, and a damaged shard is detected and computed
again. A lock per shard lets ranks, and other runs that need the same entry, share the work.

R is the number of rows of an entry, D the width of the tower.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from clip_lightning.cpu import cores
from clip_lightning.errors import UserError, check_option
from clip_lightning.files import write_atomically

SHARD_ROWS = 512
IN_USE_SECONDS = 3600
LEAST_FREE = 32
"""Rows are kept in memory if this many times their size is free, since each rank keeps its own."""
DTYPE = np.float16
Compute = Callable[[range], np.ndarray]
"""Maps rows of an entry to features (len(range), D); a row of NaN stands for an unreadable image."""


class Features:
    """The rows (R, D) of a finished entry, which stay readable if the entry is removed.

    They are copied to memory if they take little of what is free, and memory-mapped otherwise.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._paths, parts = shards, [*map(_map, shards)] or [torch.empty(0, 0)]
        self._parts = parts
        if self.nbytes * LEAST_FREE < psutil.virtual_memory().available:
            self.move_to(torch.device("cpu"))

    def __reduce__(self) -> tuple[type[Features], tuple[Sequence[Path]]]:
        """Pickle only the paths, so that loader workers map the files themselves."""
        return Features, (self._paths,)

    @property
    def nbytes(self) -> int:
        """Size of the rows in bytes."""
        return sum(part.nbytes for part in self._parts)

    @property
    def device(self) -> torch.device:
        """The device on which the rows are."""
        return self._parts[0].device

    def move_to(self, device: torch.device) -> None:
        """Copy all rows to a device."""
        self._parts = [torch.cat([part.to(device) for part in self._parts])]

    @cached_property
    def broken(self) -> np.ndarray:
        """(R,) whether the row is NaN: its image could not be decoded when it was cached."""
        return torch.cat([part.isnan().any(dim=1) for part in self._parts]).cpu().numpy()

    def rows(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Return the features (len(rows), D) in float32, on the device of all rows."""
        wanted = torch.as_tensor(rows, dtype=torch.int64)
        if len(self._parts) == 1:
            return self._parts[0].index_select(0, wanted.to(self.device, non_blocking=True)).float()
        picked = torch.empty(len(wanted), self._parts[0].shape[1])
        for number in (shards := wanted // SHARD_ROWS).unique().tolist():
            places = shards == number
            picked[places] = self._parts[number][wanted[places] % SHARD_ROWS].float()
        return picked


@dataclass(frozen=True)
class CacheOptions:
    """Options of the feature cache.

    Attributes:
        gigabytes: largest size of the cache in gigabytes (10^9 bytes); the least recently used entries are
            removed first. Copies of remote tars have a budget of the same size.
        views: number of cached views per training image: the image itself, mirrored, then augmented at
            random.
    """

    gigabytes: float = 50
    views: int = 2

    def __post_init__(self) -> None:
        check_option("data.cache_options.gigabytes", self.gigabytes, self.gigabytes >= 0, "0 or more")
        check_option("data.cache_options.views", self.views, self.views >= 1, "1 or more")


class CacheEntry(NamedTuple):
    """An entry, as `cache list` shows it; `last_used` is in seconds since the epoch."""

    path: Path
    key: dict[str, Any]
    rows: int
    bytes: int
    last_used: float


class FeatureCache:
    """A folder of entries whose total size is limited; the least recently used are removed first.

    Args:
        root: the folder.
        budget_bytes: largest total size; entries that this process uses, or that were used within the last
            hour, are kept even if they exceed it.
    """

    def __init__(self, root: Path, budget_bytes: float = 50e9) -> None:
        self.root = root
        self.budget_bytes = budget_bytes
        self._in_use: set[Path] = set()

    def get(self, key: dict[str, Any], count: int, compute: Compute, title: str) -> Features:
        """Return the entry of `count` rows, after computing its missing or damaged shards.

        The `key` contains everything that the rows depend on, as plain JSON values. `compute` returns the
        same values each time.
        """
        entry = self.root / _entry_name(key)
        ranges = [range(start, min(start + SHARD_ROWS, count)) for start in range(0, count, SHARD_ROWS)]
        try:
            manifest, content = entry / "manifest.json", json.dumps({"key": key, "rows": count}, indent=2)
            if not manifest.exists() or manifest.read_bytes() != content.encode():
                write_atomically(manifest, content.encode())
            _touch(entry)
            features = Features(_complete(entry, ranges, compute, title))
        except OSError as error:
            raise UserError(
                f"the feature cache in {self.root} cannot be written ({error.strerror or error}); free some "
                "space, give another --data.cache FOLDER, or use --data.cache off"
            ) from error
        self._in_use.add(entry)
        just_now = time.time() - IN_USE_SECONDS
        recent = {entry.path for entry in self.entries() if entry.last_used > just_now}
        self.prune(self.budget_bytes, keep=self._in_use | recent)
        return features

    def entries(self) -> list[CacheEntry]:
        """List the entries, whose names are determined by their keys, the most recently used first."""
        entries = []
        for manifest in self.root.glob("[0-9a-f]" * 32 + "/manifest.json"):
            # It may be damaged, or another process may be removing the entry.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(manifest.read_bytes())
                if manifest.parent.name == _entry_name(content["key"]):
                    size = sum(file.stat().st_size for file in manifest.parent.glob("*.npy"))
                    last_used = manifest.stat().st_mtime
                    entry = CacheEntry(manifest.parent, content["key"], content["rows"], size, last_used)
                    entries.append(entry)
        return sorted(entries, key=lambda entry: -entry.last_used)

    def used(self) -> list[CacheEntry]:
        """List the entries that this object has returned."""
        return [entry for entry in self.entries() if entry.path in self._in_use]

    def prune(self, budget_bytes: float, keep: Collection[Path] = ()) -> list[CacheEntry]:
        """Remove the least recently used entries until the others fit the budget; return the removed ones."""
        removed, total = [], 0
        for entry in self.entries():
            total += entry.bytes
            if total > budget_bytes and entry.path not in keep:
                total -= entry.bytes
                shutil.rmtree(entry.path, ignore_errors=True)
                removed.append(entry)
        return removed


def _complete(entry: Path, ranges: list[range], compute: Compute, title: str) -> list[Path]:
    """Return the path of every shard; compute shards that nobody else computes, then wait for the rest."""
    shards = _intact(entry.glob("*-*.npy"))
    missing = [i for i in range(len(ranges)) if i not in shards]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    quiet = not missing or (distributed and torch.distributed.get_rank() > 0)
    rows = sum(len(ranges[i]) for i in missing)
    with tqdm(total=rows, desc=title, unit="row", disable=quiet) as bar:
        for timeout in (0, -1):  # first without waiting for locks, then waiting for them
            for i in missing:
                if i not in shards and (shard := _compute_shard(entry, i, ranges[i], compute, timeout)):
                    shards[i] = shard
                    bar.update(len(ranges[i]))
    return [shards[i] for i in range(len(ranges))]


def _compute_shard(entry: Path, i: int, rows: range, compute: Compute, timeout: float) -> Path | None:
    """Compute shard `i`; return None if another process holds it longer than the timeout."""
    try:
        with FileLock(entry / f"{i:06d}.lock", timeout=timeout):
            present = [*entry.glob(f"{i:06d}-*.npy")]
            if i in (done := _intact(present)):
                return done[i]
            for damaged in [*present, *entry.glob(f".{i:06d}*")]:  # or the draft of a killed process
                damaged.unlink()
            values = compute(rows)
            with np.errstate(over="ignore"):  # checked below
                half = values.astype(DTYPE)
            if np.isinf(half).any():
                raise UserError(
                    "the features of the tower exceed the range of half precision; use --data.cache off"
                )
            _touch(entry)
            np.save(content := io.BytesIO(), half)
            digest = hashlib.sha256(content.getbuffer()).hexdigest()[:32]
            write_atomically(shard := entry / f"{i:06d}-{digest}.npy", content.getvalue())
            return shard
    except Timeout:
        return None


def _entry_name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _intact(files: Iterable[Path]) -> dict[int, Path]:
    """Return the shards whose content has the checksum in their names, by number."""

    def is_intact(file: Path) -> bool:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:  # another process removed it as damaged
            return False
        return file.stem.partition("-")[2] == digest[:32]

    files = sorted(files)
    intact = thread_map(is_intact, files, max_workers=cores(), disable=True)
    return {int(file.name.partition("-")[0]): file for file in compress(files, intact)}


def _touch(entry: Path) -> None:
    """Mark the entry as used; a finished entry may be in a read-only folder."""
    with contextlib.suppress(OSError):
        os.utime(entry / "manifest.json")


def _map(shard: Path) -> Tensor:
    """Return the rows of a shard, memory-mapped.

    Unlike numpy's map, torch's keeps no file open: large data has more shards than a process may open.
    """
    array = np.load(shard, mmap_mode="r")
    header = array.offset // array.itemsize  # a multiple of 64 bytes
    size = header + array.size
    return torch.from_file(str(shard), size=size, dtype=torch.float16)[header:].view(array.shape)
