"""A classification told class by class: for a terminal, as files, and as rows for whoever shows tables."""

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
    """How well images were classified, with what the classes are called.

    Attributes:
        title: of pictures and in the terminal.
        names: of the classes, one each.
        result: what came of the classification.
    """

    title: str
    names: Sequence[str]
    result: Classification

    def classes(self) -> list[tuple[str, int, int, float | None]]:
        """(name, images, right, percent or None where there are no images) of each class, in order."""
        return [
            (name, asked, right, 100 * right / asked if asked else None)
            for name, (right, asked) in zip(self.names, self.result.per_class(), strict=True)
        ]

    def confused(self, most: int) -> list[tuple[str, str, int]]:
        """(true class, taken for, images) of the most frequent mistakes."""
        pairs = self.result.confused(most)
        return [(self.names[true], self.names[taken], count) for true, taken, count in pairs]

    def summary(self) -> str:
        """The worst classes and mistakes in a few lines."""
        shares = sorted((share, name) for name, _, _, share in self.classes() if share is not None)
        worst = ", ".join(f"{name} {share:.0f} %" for share, name in shares[:5])
        pairs = ", ".join(f"{true} for {taken} ({count})" for true, taken, count in self.confused(5))
        return f"{self.title}\n  worst classes: {worst}\n  most often taken for another: {pairs or 'none'}"

    def pictures(self) -> dict[str, bytes]:
        """`confusion` and `reliability`, PNG."""
        return {
            "confusion": plot_confusion(self.result.confusion, self.names, self.title),
            "reliability": plot_calibration(self.result.calibration, self.title),
        }

    def write(self, folder: Path) -> None:
        """Write `classes.csv`, `confused.csv`, `calibration.csv` and the pictures into the folder."""
        shares = [
            (name, asked, right, "" if share is None else f"{share:.2f}")
            for name, asked, right, share in self.classes()
        ]
        found = self.result.calibration
        bins = zip(found.images.tolist(), found.confidence.tolist(), found.accuracy.tolist(), strict=True)
        texts = {
            "classes.csv": csv_text(("class", "images", "right", "accuracy"), shares),
            "confused.csv": csv_text(("class", "taken_for", "images"), self.confused(len(self.names) ** 2)),
            "calibration.csv": csv_text(
                ("images", "mean_probability", "accuracy"),
                [(images, f"{100 * mean:.2f}", f"{100 * right:.2f}") for images, mean, right in bins],
            ),
        }
        for name, text in texts.items():
            write_atomically(folder / name, text.encode())
        for name, picture in self.pictures().items():
            write_atomically(folder / f"{name}.png", picture)
