"""Stores what a run has logged on disk, so that a resumed run neither repeats nor loses a row.

Every row is written here before it is passed to W&B, which may lose the last ones in a kill. A row that a
resumed run repeats (the same metrics at the same step) is not logged again. Several rows of one step, even
with the same metrics, are all logged.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_lightning.run_folder import RunFolder


def history_file(folder: Path, run_id: str) -> Path:
    """Return the file with the history of a run that writes to `folder`."""
    return RunFolder(folder).wandb / f"history-{run_id}.jsonl"


def go_back(file: Path) -> None:
    """Mark that the run resumes from an earlier checkpoint, so that all further rows are new."""
    if file.exists():
        _append(file, {})


class History:
    """Stores the rows of one run, in the order in which they were logged.

    Args:
        file: `history-ID.jsonl` with one line per row: `step`, and the metrics by name (null if not a
            number). An empty object marks that the run was resumed from an earlier checkpoint.

    Attributes:
        rows: step and metrics of every row of the earlier parts of the run.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self._earlier: Counter[tuple[int, frozenset[str]]] = Counter()
        for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
            with contextlib.suppress(ValueError):  # truncated by a kill or a full disk
                row = json.loads(line)
                if row:
                    step = row.pop("step")
                    self.rows.append((step, row))
                    self._earlier[step, frozenset(row)] += 1
                else:
                    self._earlier.clear()

    def is_new(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Return whether no earlier part of the run has logged this row, and store it if so."""
        row = step, frozenset(metrics)
        if self._earlier[row]:
            self._earlier[row] -= 1
            return False
        numbers = {n: value if isinstance(value, int | float) else None for n, value in metrics.items()}
        with contextlib.suppress(OSError):  # the disk is full, and W&B may write to another one
            _append(self._file, {"step": step, **numbers})
        return True


def _append(file: Path, row: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write("\n" + json.dumps(row))  # first the line break, so that a truncated row spoils no other
