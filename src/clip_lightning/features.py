"""The feature cache: a frozen tower runs once over the data, its pooled features lie on disk.

An entry is a folder named by a digest of everything its values depend on: the tower's weights, the
preprocessing, the pictures or captions, the view. So a change to any of them is another entry, never a stale
hit. An entry is written in shards, each under a temporary name and then renamed to one that carries its own
checksum: a run killed half-way goes on where it was, and a damaged shard is found and computed again. A lock
on each shard lets ranks, and runs that happen to want the same entry, share the work.

R rows of an entry, D the tower's width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from clip_lightning.errors import UserError

SHARD_ROWS = 512
DTYPE = np.float16
Compute = Callable[[range], np.ndarray]
"""Rows of an entry → their features (len(range), D); a row of NaN is a picture that cannot be read."""


class Features:
    """One finished entry as memory-mapped rows (R, D)."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._paths = list(shards)
        self._shards: list[np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Loader workers map the files themselves instead of receiving their content."""
        return {"_paths": self._paths, "_shards": None}

    def rows(self, rows: Sequence[int]) -> Tensor:
        """The features (len(rows), D) in float32."""
        if self._shards is None:
            self._shards = [np.load(path, mmap_mode="r") for path in self._paths]
        picked = [self._shards[row // SHARD_ROWS][row % SHARD_ROWS] for row in rows]
        width = self._shards[0].shape[1]
        return torch.from_numpy(np.stack(picked) if picked else np.empty((0, width), DTYPE)).float()


def default_cache() -> Path:
    """Where features lie unless `--data.cache` says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "clip-lightning" / "features"


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
        budget_bytes: what all entries together may take; only those not in use now are removed.
    """

    def __init__(self, root: Path, budget_bytes: float = 50e9) -> None:
        self.root = root
        self.budget_bytes = budget_bytes

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
        text = json.dumps(key, sort_keys=True)
        entry = self.root / hashlib.sha256(text.encode()).hexdigest()[:32]
        ranges = [range(start, min(start + SHARD_ROWS, count)) for start in range(0, count, SHARD_ROWS)]
        try:
            entry.mkdir(parents=True, exist_ok=True)
            manifest = entry / "manifest.json"
            if not manifest.exists():
                self._write(manifest, json.dumps({"key": key, "rows": count}, indent=2).encode())
            os.utime(manifest)
            shards = self._complete(entry, ranges, compute, title)
        except OSError as error:
            raise UserError(
                f"the feature cache at {self.root} cannot be written ({error.strerror or error}); "
                "give another --data.cache FOLDER, free some space, or --data.cache off"
            ) from error
        self.prune(self.budget_bytes, keep={entry})
        return Features(shards)

    def entries(self) -> list[CacheEntry]:
        """All entries, the most recently used first."""
        found = []
        for manifest in self.root.glob("*/manifest.json"):
            size = sum(file.stat().st_size for file in manifest.parent.glob("*.npy"))
            content = json.loads(manifest.read_text())
            found.append(
                CacheEntry(manifest.parent, content["key"], content["rows"], size, manifest.stat().st_mtime)
            )
        return sorted(found, key=lambda entry: -entry.last_used)

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
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            shards: list[Path | None] = list(pool.map(lambda i: _intact_shard(entry, i), range(len(ranges))))
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
                if (done := _intact_shard(entry, i)) is not None:
                    return done
                values = compute(rows)
                half = values.astype(DTYPE)
                if np.isinf(half).any():
                    raise UserError(
                        "the tower gives features beyond the range of half precision; use --data.cache off"
                    )
                return _write_shard(entry, i, half)
        except Timeout:
            return None

    @staticmethod
    def _write(file: Path, content: bytes) -> None:
        draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        draft.write_bytes(content)
        os.replace(draft, file)


def _write_shard(entry: Path, i: int, values: np.ndarray) -> Path:
    draft = entry / f".{i:06d}.tmp"  # whoever writes holds the shard's lock
    with draft.open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    shard = entry / f"{i:06d}-{_checksum(draft)}.npy"
    os.replace(draft, shard)
    return shard


def _intact_shard(entry: Path, i: int) -> Path | None:
    """The file of shard `i` if its content is what its name promises; a damaged one is removed."""
    for shard in entry.glob(f"{i:06d}-*.npy"):
        if shard.stem.partition("-")[2] == _checksum(shard):
            return shard
        shard.unlink(missing_ok=True)
    return None


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def _is_other_rank() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_rank() > 0
    )
