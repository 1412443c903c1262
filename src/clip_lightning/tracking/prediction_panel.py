"""Shows the predictions for fixed held-out captions and images on a page, in plots and in W&B tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.errors import UserError
from clip_lightning.evaluation.diagnostics import Similarities, similarities, worst_queries
from clip_lightning.evaluation.predictions import (
    Answer,
    Query,
    choose_captions,
    find_captions,
    find_images,
    images_of,
)
from clip_lightning.evaluation.retrieval import Embeddings
from clip_lightning.files import write_atomically
from clip_lightning.reports.grids import thumbnail
from clip_lightning.reports.pages import Report, write_page
from clip_lightning.reports.plots import Plot, plots_of_split
from clip_lightning.terminal import printable
from clip_lightning.tracking.panel import Panel

History = Mapping[str, Mapping[int, Mapping[Any, Any]]]
"""`text_to_image`, `image_to_text`: epoch → row → rank; `recall`: epoch → metric → percent."""

MOST_MISSES = 8


@dataclass(frozen=True)
class _Validation:
    """Holds the results of the last validation for the end of training."""

    report: Report
    step: int
    recall: Mapping[int, Mapping[str, float]]
    embeddings: Embeddings
    images: Sequence[CaptionedImage]
    content: Sequence[int]


class PredictionTable(Panel):
    """Shows the predictions for fixed held-out captions and images, and diagnostics of the complete split.

    Every validation in training writes `predictions.html`, with the ranks of all epochs, and
    `predictions/history.json`. When training ends or is interrupted, the similarities, recall curves and
    worst misses of the last validation are added to the page. Histograms are logged to W&B as well, and at
    the end the plots and the tables `val/predictions`, `val/predictions_image_to_text` and
    `val/worst_misses`.

    A failure to show something is a warning and does not end the run.

    Args:
        queries: number of captions and of images to show, the same in every epoch; 0 to show nothing.
        top_k: number of images to show for each caption, and of captions for each image.
        seed: seed of the choice of captions and images.
        folder: folder of the page; by default the run's folder.
    """

    def __init__(self, queries: int = 16, top_k: int = 5, seed: int = 0, folder: Path | None = None) -> None:
        if queries < 0:
            raise UserError(f"--predictions.queries {queries}: expected 0 or more")
        if top_k < 1:
            raise UserError(f"--predictions.top_k {top_k}: expected 1 or more")
        super().__init__()
        self.queries, self.top_k, self.seed, self.folder = queries, top_k, seed, folder
        self._last: _Validation | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # on_validation_epoch_end of callbacks runs before that of the module, which collects the embeddings
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not (fitting and self.queries and trainer.is_global_zero):
            return
        data: Any = getattr(trainer, "datamodule", None)
        embeddings: Any = getattr(pl_module, "validation_embeddings", None)
        if data is None or embeddings is None:
            return
        with self.sparing("the predictions could not be shown"):
            self._show(trainer, embeddings, data.images("val"), data.content_ids("val"))

    def _show(
        self,
        trainer: Trainer,
        embeddings: Embeddings,
        images: Sequence[CaptionedImage],
        content: Sequence[int],
    ) -> None:
        """Write the page, and log the histograms."""
        epoch = trainer.current_epoch
        text_ids = choose_captions(images, self.queries, self.seed)
        of_captions = find_images(embeddings, images, content, text_ids, self.top_k)
        of_images = find_captions(embeddings, images, content, images_of(images, text_ids), self.top_k)
        run = self.run_folder(trainer)
        history = _add_epoch(
            run.predictions / "history.json",
            epoch,
            text_to_image={query.id: query.rank for query in of_captions},
            image_to_text={query.id: query.rank for query in of_images},
            recall={
                name.removeprefix("val/"): float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/") and "_R@" in name
            },
        )
        report = Report(epoch, of_captions, history["text_to_image"], of_images, history["image_to_text"])
        step = trainer.global_step - 1  # as Lightning counts the metrics of this validation
        self._last = _Validation(report, step, history["recall"], embeddings, images, content)
        write_page(report, run.predictions_page)
        self.log_media(trainer, step, lambda: histograms(similarities(embeddings, content)))

    def show_rest(self, trainer: Trainer) -> None:
        """Add the plots and the worst misses of the last validation."""
        last, self._last = self._last, None
        if last is None:
            return
        run, epoch = self.run_folder(trainer), last.report.epoch
        plots: dict[str, Plot] = {}
        with self.sparing("the plots could not be drawn"):
            plots = plots_of_split(last.embeddings, last.content, last.recall, epoch)
        with self.sparing("the worst misses could not be shown"):
            worst = worst_queries(last.embeddings, last.content, min(self.queries, MOST_MISSES))
            misses = find_images(last.embeddings, last.images, last.content, worst, self.top_k)
            write_page(replace(last.report, plots=list(plots.values()), misses=misses), run.predictions_page)
            self.log_media(
                trainer,
                last.step,
                lambda: {
                    "val/predictions": prediction_table(last.report.captions, epoch),
                    "val/predictions_image_to_text": prediction_table(last.report.images, epoch),
                    "val/worst_misses": prediction_table(misses, epoch),
                    **plot_images(plots),
                },
            )


def _add_epoch(file: Path, epoch: int, **parts: Mapping[Any, Any]) -> History:
    """Add an epoch to the file, and return all epochs.

    Later epochs are removed, since the run was then resumed from an earlier checkpoint.
    """
    try:
        saved = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):  # a damaged history is not worth ending the run
        saved = {}
    history: dict[str, dict[int, dict[Any, Any]]] = {}
    for part, new in parts.items():
        past = {int(number): values for number, values in saved.get(part, {}).items() if int(number) < epoch}
        history[part] = {**past, epoch: {str(key): value for key, value in new.items()}}
    write_atomically(file, json.dumps(history).encode())
    return history


def prediction_table(queries: Sequence[Query], epoch: int) -> Any:
    """Return a `wandb.Table` with one row per query and its answers; correct captions have a ✓."""
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


def histograms(binned: Similarities) -> dict[str, Any]:
    """Return a `wandb.Histogram` by name, without the empty bins at both ends."""
    import wandb

    edges = binned.edges.numpy()
    content = {}
    for name, counts in (("matched", binned.matched), ("unmatched", binned.unmatched)):
        filled = counts.nonzero().flatten().tolist()
        if filled:
            first, last = filled[0], filled[-1] + 1
            content[f"val/similarity_{name}"] = wandb.Histogram(
                np_histogram=(counts[first:last].numpy(), edges[first : last + 1])
            )
    return content


def plot_images(plots: Mapping[str, Plot]) -> dict[str, Any]:
    """Return a `wandb.Image` by name."""
    import wandb

    return {
        f"val/{name.replace('-', '_')}": wandb.Image(Image.open(BytesIO(plot.png)), caption=plot.words)
        for name, plot in plots.items()
    }
