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
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from clip_lightning.cores import cores
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, write_atomically

SHARD_ROWS = 512
IN_USE_SECONDS = 3600
DTYPE = np.float16
Compute = Callable[[range], np.ndarray]
"""Maps rows of an entry to features (len(range), D); a row of NaN stands for an unreadable image."""


class Features:
    """The memory-mapped rows (R, D) of a finished entry."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._paths = list(shards)
        # Mapped now, so that they stay readable if another run removes the entry.
        self._shards: list[np.ndarray] | None = [_map(path) for path in self._paths]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle only the paths, so that loader workers map the files themselves."""
        return {"_paths": self._paths, "_shards": None}

    def rows(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Return the features (len(rows), D) in float32."""
        if self._shards is None:
            self._shards = [_map(path) for path in self._paths]
        shard, row = np.divmod(np.asarray(rows, dtype=np.int64), SHARD_ROWS)
        picked = np.empty((len(shard), self._shards[0].shape[1]), DTYPE)
        for number in np.unique(shard):
            places = np.flatnonzero(shard == number)
            picked[places] = self._shards[number][row[places]]
        return torch.from_numpy(picked).float()


def default_cache() -> Path:
    """Return the folder that is used unless `--data.cache` is another one."""
    return cache_folder("features")


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
        """Check the ranges."""
        if not self.gigabytes >= 0:
            raise UserError(f"--data.cache_options.gigabytes {self.gigabytes:g}: expected 0 or more")
        if self.views < 1:
            raise UserError(f"--data.cache_options.views {self.views}: expected 1 or more")


@dataclass(frozen=True)
class CacheEntry:
    """An entry, as `cache list` shows it."""

    path: Path
    key: dict[str, Any]
    rows: int
    bytes: int
    last_used: float
    """Seconds since the epoch."""


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
        """Return the entry for `key`, after computing its missing or damaged shards.

        Args:
            key: everything the values depend on, as plain JSON values.
            count: number of rows.
            compute: computes any range of rows, with the same values each time.
            title: title of the progress bar.

        Raises:
            UserError: the disk is full, or values are too large for half precision.
        """
        entry = self.root / _entry_name(key)
        ranges = [range(start, min(start + SHARD_ROWS, count)) for start in range(0, count, SHARD_ROWS)]
        try:
            entry.mkdir(parents=True, exist_ok=True)
            manifest = entry / "manifest.json"
            if not manifest.exists() or _read_manifest(manifest) != (json.loads(json.dumps(key)), count):
                write_atomically(manifest, json.dumps({"key": key, "rows": count}, indent=2).encode())
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
        """List the entries, the most recently used first; an entry with a damaged manifest is `unknown`.

        Other files and folders are ignored: an entry has the name that its key determines, or, if its
        manifest is damaged, a name of that form and shards.
        """
        damaged = {"kind": "unknown", "name": "(damaged manifest.json)"}
        entries = []
        for manifest in self.root.glob("[0-9a-f]" * 32 + "/manifest.json"):
            with contextlib.suppress(FileNotFoundError):  # another process may be removing the entry
                key, rows = _read_manifest(manifest) or (damaged, 0)
                if manifest.parent.name != _entry_name(key) and not _shard_files(manifest.parent):
                    continue
                size = sum(file.stat().st_size for file in manifest.parent.glob("*.npy"))
                entries.append(CacheEntry(manifest.parent, key, rows, size, manifest.stat().st_mtime))
        return sorted(entries, key=lambda entry: -entry.last_used)

    def used(self) -> list[CacheEntry]:
        """List the entries that this object has returned."""
        return [entry for entry in self.entries() if entry.path in self._in_use]

    def prune(self, budget_bytes: float, keep: set[Path] | None = None) -> list[CacheEntry]:
        """Remove the least recently used entries until the others fit the budget; return the removed ones."""
        removed, total = [], 0
        for entry in self.entries():
            total += entry.bytes
            if total > budget_bytes and entry.path not in (keep or set()):
                total -= entry.bytes
                shutil.rmtree(entry.path, ignore_errors=True)
                removed.append(entry)
        return removed


def _complete(entry: Path, ranges: list[range], compute: Compute, title: str) -> list[Path]:
    """Return the path of every shard; compute shards that nobody else computes, then wait for the rest."""
    files = _shard_files(entry)
    with ThreadPoolExecutor(cores()) as pool:
        intact = pool.map(lambda i: _intact(files.get(i, [])), range(len(ranges)))
        shards = {i: shard for i, shard in enumerate(intact) if shard is not None}
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
            present = list(entry.glob(f"{i:06d}-*.npy"))
            if (done := _intact(present)) is not None:
                return done
            for damaged in present:
                damaged.unlink()
            values = compute(rows)
            with np.errstate(over="ignore"):  # checked below
                half = values.astype(DTYPE)
            if np.isinf(half).any():
                raise UserError(
                    "the features of the tower exceed the range of half precision; use --data.cache off"
                )
            _touch(entry)
            return _write_shard(entry, i, half)
    except Timeout:
        return None


def _entry_name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _read_manifest(manifest: Path) -> tuple[dict[str, Any], int] | None:
    """Return the key and the number of rows of an entry, or None if the file is damaged."""
    try:
        content = json.loads(manifest.read_text())
        return dict(content["key"]), int(content["rows"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _write_shard(entry: Path, i: int, values: np.ndarray) -> Path:
    draft = entry / f".{i:06d}.tmp"  # the writer holds the shard's lock
    with draft.open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    return draft.replace(entry / f"{i:06d}-{_checksum(draft)}.npy")


def _shard_files(entry: Path) -> dict[int, list[Path]]:
    """Return the files of each shard, whose number is in their names."""
    files: dict[int, list[Path]] = {}
    for file in entry.glob("[0-9]" * 6 + "-" + "[0-9a-f]" * 32 + ".npy"):
        files.setdefault(int(file.name.partition("-")[0]), []).append(file)
    return files


def _intact(files: Iterable[Path]) -> Path | None:
    """Return the first file whose content has the checksum in its name."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another process removed it as damaged
            if file.stem.partition("-")[2] == _checksum(file):
                return file
    return None


def _touch(entry: Path) -> None:
    """Mark the entry as used; a finished entry may be in a read-only folder."""
    with contextlib.suppress(OSError):
        os.utime(entry / "manifest.json")


def _map(shard: Path) -> np.ndarray:
    """Return the rows of a shard, memory-mapped.

    Unlike numpy's map, torch's keeps no file open: large data has more shards than a process may open.
    """
    with shard.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        header = file.tell() // dtype.itemsize  # a multiple of 64 bytes
    size = header + math.prod(shape)
    rows = torch.from_file(str(shard), size=size, dtype=torch.float16)[header:]
    mapped: np.ndarray = rows.view(shape).numpy()
    return mapped


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
