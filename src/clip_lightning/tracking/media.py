"""Predictions, plots and classifications as W&B's own types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from clip_lightning.evaluation.diagnostics import Similarities
from clip_lightning.evaluation.predictions import Answer, Query
from clip_lightning.reports.class_report import ClassReport
from clip_lightning.reports.grids import thumbnail
from clip_lightning.reports.pages import Plot
from clip_lightning.terminal import printable

MOST_CONFUSED = 200


def prediction_table(queries: Sequence[Query], epoch: int) -> Any:
    """Make a `wandb.Table` with one row per query and its answers; right captions are marked with a ✓."""
    import wandb

    k = max((len(query.answers) for query in queries), default=0)
    of_images = any(isinstance(query.item, Path) for query in queries)
    names = ("image", "own captions") if of_images else ("query", "true image")
    columns: list[str | int] = ["epoch", names[0], "rank", f"hit@{k}", names[1]]
    table = wandb.Table(columns=[*columns, *(f"prediction {n + 1}" for n in range(k))])
    for query in queries:
        wanted = [_cell(item) for item in query.wanted]
        shown = "\n".join(wanted) if of_images else wanted[0]
        answers = [_cell(answer.item, answer) for answer in query.answers]
        table.add_data(epoch, _cell(query.item), query.rank, query.hit, shown, *answers)
    return table


def _cell(item: Path | str, answer: Answer | None = None) -> Any:
    import wandb

    similarity = f"{answer.similarity:.3f}" if answer else ""
    if isinstance(item, Path):
        return wandb.Image(thumbnail(item), caption=similarity or item.name, file_type="jpg")
    return f"{similarity} {'✓ ' if answer.right else ''}{printable(item)}" if answer else printable(item)


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
        for name, png in report.plots().items()
    }
    return {
        f"{prefix}zero_shot_classes": classes,
        f"{prefix}zero_shot_confused": confused,
        **pictures,
    }
