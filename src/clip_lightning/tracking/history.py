"""What a run has logged so far, on its own disk, so that a resumed run neither repeats nor loses a row.

Every row that W&B is given is first a line here. After a kill, W&B has the first so many of them: the rest is
given again. A row that a resumed run makes a second time (the same metrics at the same step) is not logged a
second time. Several rows of one step, also with the same metrics, are all logged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_lightning.run_folder import RunFolder


class History:
    """The rows of one run, in the order in which they were logged.

    Args:
        file: `history-ID.jsonl`, one line a row: `step`, and the metrics by name (null for no number);
            an empty object where the run went back to an earlier checkpoint.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._earlier: Counter[tuple[int, frozenset[str]]] = Counter()
        content = file.read_bytes() if file.exists() else b""
        if content and not content.endswith(b"\n"):  # cut off when the run was killed
            with file.open("rb+") as stream:
                stream.truncate(content.rfind(b"\n") + 1)
        for row in self._lines():
            if row:
                self._earlier[row.pop("step"), frozenset(row)] += 1
            else:
                self._earlier.clear()

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Step and metrics of every row so far."""
        for row in self._lines():
            if row:
                yield row.pop("step"), row

    def _lines(self) -> Iterator[dict[str, Any]]:
        lines = self._file.read_text(errors="replace").splitlines() if self._file.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # torn on a disk that was full
                row = json.loads(line)
                if isinstance(row, dict) and ("step" in row or not row):
                    yield row

    def is_new(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Return whether an earlier part of the run has not logged this row, which is then noted."""
        row = step, frozenset(metrics)
        if self._earlier[row]:
            self._earlier[row] -= 1
            return False
        numbers = {n: value if isinstance(value, int | float) else None for n, value in metrics.items()}
        self._append(json.dumps({"step": step, **numbers}) + "\n")
        return True

    def _append(self, line: str) -> None:
        """Write the line, or nothing where the disk is full: W&B may have room elsewhere."""
        size = self._file.stat().st_size if self._file.exists() else 0
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._file, size)


def history_file(folder: Path, run_id: str) -> Path:
    """Where a run that writes into `folder` says what it has logged."""
    return RunFolder(folder).wandb / f"history-{run_id}.jsonl"


def go_back(file: Path) -> None:
    """Note that the run goes on from an earlier checkpoint: what comes is new, whatever its step."""
    if file.exists():
        with file.open("a") as stream:
            stream.write("{}\n")


# W&B's own files -----------------------------------------------------------------------------------------


def mend_parts(folder: Path, run_id: str) -> int:
    """Make W&B's files under `folder` of the earlier parts of a run readable to the end.

    A kill leaves the last record half written, or no record at all; `wandb sync` would stop there, before the
    parts that follow.

    Returns:
        How many rows they hold.

    Raises:
        RuntimeError: `wandb leet inspect`, which tells, does not work.
    """
    rows = 0
    for part in sorted(RunFolder(folder).wandb.glob(f"*run-*-{run_id}")):
        for log in part.glob("*.wandb"):
            end = _end_of_records(log.read_bytes())
            if end <= LOG_HEADER:
                shutil.rmtree(part)
                break
            if end < log.stat().st_size:
                os.truncate(log, end)
            rows += sum('"type":"history"' in line for line in _records(log))
    return rows


LOG_HEADER, CHUNK_HEADER, BLOCK = 7, 7, 32768
WHOLE, LAST = 1, 4


def _end_of_records(content: bytes) -> int:
    """Where the last whole record ends, in LevelDB's log format behind a header of W&B's.

    https://github.com/google/leveldb/blob/main/doc/log_format.md: blocks of chunks, each with a checksum (4
    bytes), length (2) and kind (1).
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
        if kind in (WHOLE, LAST):
            end = at
    return min(end, len(content))


def _records(log: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"`wandb leet inspect` ended with status {process.returncode}")
