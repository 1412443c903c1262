"""The feature cache: a frozen tower runs once over the data, its pooled features lie on disk.

An entry is a folder named by a digest of everything its values depend on: the tower's weights, the
preprocessing, the pictures or captions, the view. So a change to any of them is another entry, never a stale
hit. An entry is written in shards, each under a temporary name and then renamed to one that carries its own
checksum: a run killed half-way goes on where it was, and a damaged shard is found and computed again. A lock
on each shard lets ranks, and runs that happen to want the same entry, share the work.

R rows of an entry, D the tower's width.
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
DAMAGED = {"kind": "unknown", "name": "(damaged manifest.json)"}
Compute = Callable[[range], np.ndarray]
"""Rows of an entry → their features (len(range), D); a row of NaN is a picture that cannot be read."""


class Features:
    """One finished entry as memory-mapped rows (R, D)."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._paths = list(shards)
        # mapped at once, so that they stay readable should another run remove the entry
        self._shards: list[np.ndarray] | None = [_map(path) for path in self._paths]

    def __getstate__(self) -> dict[str, Any]:
        """Loader workers map the files themselves instead of receiving their content."""
        return {"_paths": self._paths, "_shards": None}

    def rows(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """The features (len(rows), D) in float32."""
        if self._shards is None:
            self._shards = [_map(path) for path in self._paths]
        shard, row = np.divmod(np.asarray(rows, dtype=np.int64), SHARD_ROWS)
        picked = np.empty((len(shard), self._shards[0].shape[1]), DTYPE)
        for number in np.unique(shard):
            places = np.flatnonzero(shard == number)
            picked[places] = self._shards[number][row[places]]
        return torch.from_numpy(picked).float()


def default_cache() -> Path:
    """Where features lie unless `--data.cache` says otherwise."""
    return cache_folder("features")


@dataclass(frozen=True)
class CacheOptions:
    """What is kept in the feature cache.

    Attributes:
        gigabytes: size (of 10^9 bytes) to which the cache is cut back, the oldest entries first.
        views: cached versions of each training image: plain, mirrored, then as the augmentation says.
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
    """What `cache list` shows of one entry."""

    path: Path
    key: dict[str, Any]
    rows: int
    bytes: int
    last_used: float
    """Seconds since the epoch."""


class FeatureCache:
    """A folder of entries with a budget; the least recently used go first.

    Args:
        root: the folder.
        budget_bytes: what all entries together may take; those of this process, and what others used in the
            last hour, stay even so.
    """

    def __init__(self, root: Path, budget_bytes: float = 50e9) -> None:
        self.root = root
        self.budget_bytes = budget_bytes
        self._in_use: set[Path] = set()

    def get(self, key: dict[str, Any], count: int, compute: Compute, title: str) -> Features:
        """The entry for `key`, of which whatever is missing or damaged is computed first.

        Args:
            key: everything the values depend on, as plain JSON values.
            count: number of rows.
            compute: gives any range of rows; the same values whenever it is asked.
            title: for the progress bar.

        Raises:
            UserError: no room on the disk, or values too large for half precision.
        """
        entry = self.root / _entry_name(key)
        ranges = [range(start, min(start + SHARD_ROWS, count)) for start in range(0, count, SHARD_ROWS)]
        try:
            entry.mkdir(parents=True, exist_ok=True)
            manifest = entry / "manifest.json"
            if not manifest.exists() or _read_manifest(manifest) != (json.loads(json.dumps(key)), count):
                write_atomically(manifest, json.dumps({"key": key, "rows": count}, indent=2).encode())
            _touch(entry)
            features = Features(self._complete(entry, ranges, compute, title))
        except OSError as error:
            raise UserError(
                f"the feature cache at {self.root} cannot be written ({error.strerror or error}); "
                "give another --data.cache FOLDER, free some space, or --data.cache off"
            ) from error
        self._in_use.add(entry)
        just_now = time.time() - IN_USE_SECONDS
        recent = {entry.path for entry in self.entries() if entry.last_used > just_now}
        self.prune(self.budget_bytes, keep=self._in_use | recent)
        return features

    def entries(self) -> list[CacheEntry]:
        """List the entries, the most recently used first; one with a damaged manifest has kind `unknown`.

        The folder may hold other things too. An entry has the name that its key gives it, or, if its
        manifest is damaged, a name of that form and shards.
        """
        found = []
        for manifest in self.root.glob("[0-9a-f]" * 32 + "/manifest.json"):
            # another process may be removing it
            with contextlib.suppress(FileNotFoundError):
                key, rows = _read_manifest(manifest) or (DAMAGED, 0)
                if manifest.parent.name != _entry_name(key) and not _shard_files(manifest.parent):
                    continue
                size = sum(file.stat().st_size for file in manifest.parent.glob("*.npy"))
                found.append(CacheEntry(manifest.parent, key, rows, size, manifest.stat().st_mtime))
        return sorted(found, key=lambda entry: -entry.last_used)

    def used(self) -> list[CacheEntry]:
        """The entries that this object has given."""
        return [entry for entry in self.entries() if entry.path in self._in_use]

    def prune(self, budget_bytes: float, keep: set[Path] | None = None) -> list[CacheEntry]:
        """Remove the least recently used entries until the rest fits the budget, and say which."""
        removed, total = [], 0
        for entry in self.entries():
            total += entry.bytes
            if total > budget_bytes and entry.path not in (keep or set()):
                total -= entry.bytes
                shutil.rmtree(entry.path, ignore_errors=True)
                removed.append(entry)
        return removed

    def _complete(self, entry: Path, ranges: list[range], compute: Compute, title: str) -> list[Path]:
        """Every shard's path; first computes what nobody else is computing, then waits for the others."""
        files = _shard_files(entry)
        with ThreadPoolExecutor(cores()) as pool:
            found = pool.map(lambda i: _intact(files.get(i, [])), range(len(ranges)))
            shards: list[Path | None] = list(found)
        missing = [i for i, shard in enumerate(shards) if shard is None]
        if not missing:
            return [shard for shard in shards if shard is not None]
        rows = sum(len(ranges[i]) for i in missing)
        with tqdm(total=rows, desc=title, unit="row", mininterval=1, disable=_is_other_rank()) as bar:
            for wait in (False, True):
                for i in missing:
                    if shards[i] is None:
                        shards[i] = self._compute_shard(entry, i, ranges[i], compute, wait)
                        bar.update(len(ranges[i]) if shards[i] is not None else 0)
        return [shard for shard in shards if shard is not None]

    def _compute_shard(self, entry: Path, i: int, rows: range, compute: Compute, wait: bool) -> Path | None:
        """Compute shard `i`; None when somebody else holds it and we do not wait."""
        try:
            with FileLock(entry / f"{i:06d}.lock", timeout=-1 if wait else 0):
                present = list(entry.glob(f"{i:06d}-*.npy"))
                if (done := _intact(present)) is not None:
                    return done
                for damaged in present:
                    damaged.unlink()
                values = compute(rows)
                with np.errstate(over="ignore"):  # asked of the result
                    half = values.astype(DTYPE)
                if np.isinf(half).any():
                    raise UserError(
                        "the tower gives features beyond the range of half precision; use --data.cache off"
                    )
                _touch(entry)
                return _write_shard(entry, i, half)
        except Timeout:
            return None


def _entry_name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _read_manifest(manifest: Path) -> tuple[dict[str, Any], int] | None:
    """Key and number of rows of an entry; None where the file does not say them."""
    try:
        content = json.loads(manifest.read_text())
        return dict(content["key"]), int(content["rows"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _write_shard(entry: Path, i: int, values: np.ndarray) -> Path:
    draft = entry / f".{i:06d}.tmp"  # whoever writes holds the shard's lock
    with draft.open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    shard = entry / f"{i:06d}-{_checksum(draft)}.npy"
    os.replace(draft, shard)
    return shard


def _shard_files(entry: Path) -> dict[int, list[Path]]:
    """Number of a shard → the files that say they are it."""
    files: dict[int, list[Path]] = {}
    for file in entry.glob("[0-9]" * 6 + "-" + "[0-9a-f]" * 32 + ".npy"):
        files.setdefault(int(file.name.partition("-")[0]), []).append(file)
    return files


def _intact(files: Iterable[Path]) -> Path | None:
    """The first file whose content is what its name promises."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another process found it damaged
            if file.stem.partition("-")[2] == _checksum(file):
                return file
    return None


def _touch(entry: Path) -> None:
    """Note that the entry is in use; a finished one may lie where nobody may write."""
    with contextlib.suppress(OSError):
        os.utime(entry / "manifest.json")


def _map(shard: Path) -> np.ndarray:
    """The rows of a shard, memory-mapped.

    Unlike numpy's own, torch's map keeps no file open, of which large data has more than a process may have.
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


def _is_other_rank() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_rank() > 0
    )
