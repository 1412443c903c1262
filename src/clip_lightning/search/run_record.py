"""What the run that made a model has left beside it, for the page: figures and predictions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_lightning.run_folder import RunFolder

_PICTURES = ("recall-history.png", "recall.png", "similarities.png", "misses.png")


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, as far as the page shows it.

    Attributes:
        name: the run's id.
        metrics: of `metrics.json`, numbers and words by their names.
        files: path on the page, `/run/...` → file; only these are served.
    """

    name: str
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def predictions(self) -> str | None:
        """The path of `predictions.html`."""
        return next((path for path in self.files if path.endswith(".html")), None)

    @property
    def pictures(self) -> list[str]:
        """The paths of pictures, for a run without that page."""
        return [path for path in self.files if path.endswith(".png")]


def read_run(model: str | Path | None) -> RunRecord | None:
    """The run whose `model/` this is; None if it is no bundle in a run's folder.

    A file that leads out of the folder, as links may, is not among its files.
    """
    if model is None or not Path(model).is_dir():
        return None
    folder = Path(model).resolve().parent
    try:
        metrics = json.loads(RunFolder(folder).metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(metrics, dict) or not RunFolder(folder).config.is_file():
        return None
    wanted = ["predictions.html"]
    if not _within(folder / "predictions.html", folder):
        wanted = [f"predictions/{name}" for name in _PICTURES]
    files = {f"/run/{name}": folder / name for name in wanted if _within(folder / name, folder)}
    return RunRecord(folder.name, metrics, files)


def _within(file: Path, folder: Path) -> bool:
    return file.is_file() and file.resolve().is_relative_to(folder)
