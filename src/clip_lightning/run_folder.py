"""Define the names of the files in a run folder."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

LAST, BEST, PREVIOUS = "last.ckpt", "best.ckpt", "previous.ckpt"


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder, whether or not the files exist.

    Attributes:
        path: the folder, whose name is the run's id.
    """

    path: Path

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
        return self.config.is_file() and bool(
            re.search(rb"^trainer:", self.config.read_bytes(), re.MULTILINE)
        )

    @property
    def config(self) -> Path:
        """The complete configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The metrics of the best epoch, durations, versions and the digest of the data."""
        return self.path / "metrics.json"

    @property
    def broken(self) -> Path:
        """The images that could not be read, with the reasons."""
        return self.path / "broken.json"

    def non_finite(self, rank: int = 0) -> Path:
        """Return the file of batches with non-finite gradients of one rank."""
        return self.path / ("non-finite.json" if rank == 0 else f"non-finite-rank{rank}.json")

    @property
    def model(self) -> Path:
        """The bundle."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The folder of `last.ckpt`, `best.ckpt` and `previous.ckpt`."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The checkpoint that a run is resumed from."""
        return self.checkpoints / LAST

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.checkpoints / BEST

    @property
    def predictions(self) -> Path:
        """The folder with plots and the results for fixed queries."""
        return self.path / "predictions"

    @property
    def predictions_page(self) -> Path:
        """The page with the results for fixed queries."""
        return self.path / "predictions.html"

    @property
    def zero_shot(self) -> Path:
        """The folder of the last zero-shot classification."""
        return self.path / "zero_shot"

    @property
    def wandb(self) -> Path:
        """The folder of W&B's own files."""
        return self.path / "wandb"
