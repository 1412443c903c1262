"""Predictions, plots and classifications as W&B's own types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from clip_lightning.evaluation.diagnostics import Similarities
from clip_lightning.evaluation.predictions import PictureRow, PredictionRow
from clip_lightning.reports.class_report import ClassReport
from clip_lightning.reports.grids import thumbnail
from clip_lightning.reports.pages import Plot
from clip_lightning.terminal import printable

MOST_CONFUSED = 200


def pictures_table(rows: Sequence[PredictionRow], epoch: int) -> Any:
    """A `wandb.Table` with one row a sentence and the pictures found for it."""
    import wandb

    k = max((len(row.predictions) for row in rows), default=0)
    columns: list[str | int] = ["epoch", "query", "rank", f"hit@{k}", "true image"]
    table = wandb.Table(columns=[*columns, *(f"prediction {n + 1}" for n in range(k))])
    for row in rows:
        found = [_picture(each.path, f"{each.similarity:.3f}") for each in row.predictions]
        wanted = _picture(row.true_path, row.true_path.name)
        table.add_data(epoch, printable(row.text), row.rank, row.hit, wanted, *found)
    return table


def captions_table(rows: Sequence[PictureRow], epoch: int) -> Any:
    """A `wandb.Table` with one row a picture and the sentences found for it, its own ones with a ✓."""
    import wandb

    k = max((len(row.predictions) for row in rows), default=0)
    columns: list[str | int] = ["epoch", "image", "rank", f"hit@{k}", "own captions"]
    table = wandb.Table(columns=[*columns, *(f"prediction {n + 1}" for n in range(k))])
    for row in rows:
        found = [
            f"{each.similarity:.3f} {'✓ ' if each.right else ''}{printable(each.text)}"
            for each in row.predictions
        ]
        own = printable("\n".join(row.own))
        table.add_data(epoch, _picture(row.path, row.path.name), row.rank, row.hit, own, *found)
    return table


def histograms(found: Similarities) -> dict[str, Any]:
    """Name → `wandb.Histogram` of the bins that are not empty at either end."""
    import wandb

    edges = found.edges.numpy()
    drawn = {}
    for name, counts in (("matched", found.matched), ("unmatched", found.unmatched)):
        filled = counts.nonzero().flatten().tolist()
        if filled:
            first, last = filled[0], filled[-1] + 1
            drawn[f"val/similarity_{name}"] = wandb.Histogram(
                np_histogram=(counts[first:last].numpy(), edges[first : last + 1])
            )
    return drawn


def plot_images(plots: Mapping[str, Plot]) -> dict[str, Any]:
    """Name → `wandb.Image`."""
    import wandb

    return {
        f"val/{name.replace('-', '_')}": wandb.Image(Image.open(BytesIO(plot.png)), caption=plot.words)
        for name, plot in plots.items()
    }


def _picture(path: Path, caption: str) -> Any:
    import wandb

    return wandb.Image(thumbnail(path), caption=caption, file_type="jpg")


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
