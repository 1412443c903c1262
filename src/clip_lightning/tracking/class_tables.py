"""A classification's classes, confusions and pictures as W&B's own types."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image

from clip_lightning.reports.class_report import ClassReport
from clip_lightning.terminal import printable

MOST_CONFUSED = 200


def class_media(report: ClassReport, prefix: str = "") -> dict[str, Any]:
    """Name → table of classes, table of the most frequent confusions, and two pictures.

    Args:
        report: of the classification.
        prefix: of the names, as `val/`.
    """
    import wandb

    classes = wandb.Table(columns=["class", "images", "right", "accuracy"])
    for name, images, right, share in report.classes():
        classes.add_data(printable(name), images, right, share)
    confused = wandb.Table(columns=["class", "taken for", "images"])
    for true, taken, count in report.confused(MOST_CONFUSED):
        confused.add_data(printable(true), printable(taken), count)
    pictures = {
        f"{prefix}zero_shot_{name}": wandb.Image(Image.open(BytesIO(png)), caption=printable(report.title))
        for name, png in report.pictures().items()
    }
    return {
        f"{prefix}zero_shot_classes": classes,
        f"{prefix}zero_shot_confused": confused,
        **pictures,
    }
