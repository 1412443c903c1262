"""Define the names of the files in a run folder."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

LAST, BEST, PREVIOUS = "last.ckpt", "best.ckpt", "previous.ckpt"


@dataclass
class RunFolder:
    """Paths in a run folder, whose name is the run's id, whether or not the files exist."""

    path: Path

    def __post_init__(self) -> None:
        self.config = self.path / "config.yaml"  # the complete configuration
        self.metrics = self.path / "metrics.json"  # of the best epoch, with durations, versions, data digest
        self.broken = self.path / "broken.json"  # the images that could not be read, with the reasons
        self.model = self.path / "model"  # the bundle
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / LAST  # the checkpoint that a run is resumed from
        self.best = self.checkpoints / BEST  # the checkpoint of the best epoch
        self.predictions = self.path / "predictions"  # plots and the results for fixed queries
        self.predictions_page = self.path / "predictions.html"
        self.zero_shot = self.path / "zero_shot"  # the last zero-shot classification
        self.wandb = self.path / "wandb"  # W&B's own files

    @classmethod
    def new(cls, root: Path) -> RunFolder:
        """Return a folder with a unique name that sorts by time."""
        return cls(root / (time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(4)))

    @classmethod
    def of_checkpoint(cls, file: Path) -> RunFolder:
        """Return the folder of the run that wrote a checkpoint."""
        return cls(file.parent.parent)

    @classmethod
    def runs(cls, root: Path) -> list[RunFolder]:
        """List the runs in a folder, the newest last."""
        runs = [run for path in root.glob("*") if (run := cls(path)).is_run()]
        return sorted(runs, key=lambda run: run.config.stat().st_mtime)

    def is_run(self) -> bool:
        """Return whether the folder has a run's configuration; other programs also write `config.yaml`."""
        return self.config.is_file() and bool(re.search(rb"(?m)^trainer:", self.config.read_bytes()))
