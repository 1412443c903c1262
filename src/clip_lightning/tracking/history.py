"""Stores what a run has logged on disk, so that a resumed run neither repeats nor loses a row.

Every row is written here before it is passed to W&B. After a kill, W&B's server has the first of these rows,
and the resumed run logs the missing ones again; offline, at most the last second before the kill is lost. A
row that a resumed run repeats (the same metrics at the same step) is not logged again. Several rows of one
step, even with the same metrics, are all logged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_lightning.run_folder import RunFolder


class History:
    """Stores the rows of one run, in the order in which they were logged.

    Args:
        file: `history-ID.jsonl` with one line per row: `step`, and the metrics by name (null if not a
            number). An empty object marks that the run was resumed from an earlier checkpoint.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._earlier: Counter[tuple[int, frozenset[str]]] = Counter()
        content = file.read_bytes() if file.exists() else b""
        if content and not content.endswith(b"\n"):  # truncated when the run was killed
            with file.open("rb+") as stream:
                stream.truncate(content.rfind(b"\n") + 1)
        for row in self._lines():
            if row:
                self._earlier[row.pop("step"), frozenset(row)] += 1
            else:
                self._earlier.clear()

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield step and metrics of every row so far."""
        for row in self._lines():
            if row:
                yield row.pop("step"), row

    def _lines(self) -> Iterator[dict[str, Any]]:
        lines = self._file.read_text(errors="replace").splitlines() if self._file.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # incomplete if the disk was full
                row = json.loads(line)
                if isinstance(row, dict) and ("step" in row or not row):
                    yield row

    def is_new(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Return whether no earlier part of the run has logged this row, and store it if so."""
        row = step, frozenset(metrics)
        if self._earlier[row]:
            self._earlier[row] -= 1
            return False
        numbers = {n: value if isinstance(value, int | float) else None for n, value in metrics.items()}
        self._append(json.dumps({"step": step, **numbers}) + "\n")
        return True

    def _append(self, line: str) -> None:
        """Write the line, or nothing if the disk is full, since W&B may write to another disk."""
        size = self._file.stat().st_size if self._file.exists() else 0
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._file, size)


def history_file(folder: Path, run_id: str) -> Path:
    """Return the file with the history of a run that writes to `folder`."""
    return RunFolder(folder).wandb / f"history-{run_id}.jsonl"


def go_back(file: Path) -> None:
    """Mark that the run resumes from an earlier checkpoint, so that all further rows are new."""
    if file.exists():
        with file.open("a") as stream:
            stream.write("{}\n")


LOG_HEADER, CHUNK_HEADER, BLOCK = 7, 7, 32768
COMPLETE, LAST = 1, 4


def cut_torn_records(folder: Path, run_id: str) -> None:
    """Truncate the W&B files of the earlier parts of a run after the last complete record.

    A kill may leave an incomplete record or an empty file, at which `wandb sync` would stop and ignore the
    parts that follow.
    """
    for part in RunFolder(folder).wandb.glob(f"*run-*-{run_id}"):
        for log in part.glob("*.wandb"):
            end = _end_of_records(log.read_bytes())
            if end <= LOG_HEADER:
                shutil.rmtree(part)
                break
            if end < log.stat().st_size:
                os.truncate(log, end)


def _end_of_records(content: bytes) -> int:
    """Return where the last complete record ends, in LevelDB's log format after W&B's header.

    The file has blocks of chunks, each with a checksum (4 bytes), length (2) and kind (1); see
    https://github.com/google/leveldb/blob/main/doc/log_format.md.
    """
    at = end = LOG_HEADER
    while at + CHUNK_HEADER <= len(content):
        if at % BLOCK > BLOCK - CHUNK_HEADER:  # no room for a header: the next block
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        at += CHUNK_HEADER + length
        if kind == 0 or at > len(content):
            break
        if kind in (COMPLETE, LAST):
            end = at
    return min(end, len(content))
