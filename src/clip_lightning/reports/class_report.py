"""Reports a classification per class: in a terminal, as files, and as rows of tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_lightning.evaluation.zero_shot import Classification
from clip_lightning.files import write_atomically
from clip_lightning.reports.plots import plot_calibration, plot_confusion
from clip_lightning.reports.tables import csv_text


@dataclass(frozen=True)
class ClassReport:
    """A classification with the names of its classes, and a title for plots and the summary."""

    title: str
    names: Sequence[str]
    result: Classification

    def classes(self) -> list[tuple[str, int, int, float | None]]:
        """Return (name, images, right, percentage or None without images) of each class, in order."""
        confusion = self.result.confusion
        counts = zip(self.names, confusion.sum(1).tolist(), confusion.diag().tolist(), strict=True)
        return [(name, asked, right, 100 * right / asked if asked else None) for name, asked, right in counts]

    def confused(self, most: int | None = None) -> list[tuple[str, str, int]]:
        """Return (true class, predicted class, images) of the most frequent mistakes, in that order."""
        wrong = self.result.confusion.clone().fill_diagonal_(0)
        pairs = wrong.nonzero()
        counts = wrong[pairs[:, 0], pairs[:, 1]]
        order = counts.argsort(descending=True, stable=True)[:most]
        found = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
        return [(self.names[true], self.names[taken], count) for (true, taken), count in found]

    def summary(self) -> str:
        """Summarize the worst classes and mistakes in a few lines."""
        ranked = sorted((percent, name) for name, _, _, percent in self.classes() if percent is not None)
        worst = ", ".join(f"{name} {percent:.0f} %" for percent, name in ranked[:5])
        pairs = ", ".join(f"{true} as {taken} ({count})" for true, taken, count in self.confused(5))
        return f"{self.title}\n  worst classes: {worst}\n  most frequent confusions: {pairs or 'none'}"

    def plots(self) -> dict[str, bytes]:
        """Draw `confusion` and `reliability` as PNG."""
        return {
            "confusion": plot_confusion(self.result.confusion, self.names, self.title),
            "reliability": plot_calibration(self.result.calibration, self.title),
        }

    def write(self, folder: Path) -> None:
        """Write `classes.csv`, `confused.csv`, `calibration.csv` and the plots into the folder."""
        bins = self.result.calibration
        columns = bins.images, 100 * bins.confidence, 100 * bins.accuracy
        rows = zip(*(column.tolist() for column in columns), strict=True)
        classes = [(*row, "" if percent is None else f"{percent:.2f}") for *row, percent in self.classes()]
        calibration = [(images, f"{mean:.2f}", f"{right:.2f}") for images, mean, right in rows]
        for name, header, table in (
            ("classes", "class images right accuracy", classes),
            ("confused", "class taken_for images", self.confused()),
            ("calibration", "images mean_probability accuracy", calibration),
        ):
            write_atomically(folder / f"{name}.csv", csv_text(header.split(), table).encode())
        for name, png in self.plots().items():
            write_atomically(folder / f"{name}.png", png)
