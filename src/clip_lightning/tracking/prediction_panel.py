"""Shows the predictions for fixed held-out captions and images on a page, in plots and in W&B tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from clip_lightning.evaluation import predictions
from clip_lightning.evaluation.predictions import EDGES, Answer, Query, find_images, histogram, similarities
from clip_lightning.files import write_atomically
from clip_lightning.reports.pages import thumbnail, write_page
from clip_lightning.reports.plots import Plot, plots_of_split
from clip_lightning.terminal import printable
from clip_lightning.tracking.panel import Panel, png_image

MOST_MISSES = 8


class PredictionTable(Panel):
    """Shows the predictions for fixed held-out captions and images, and diagnostics of the complete split.

    Every validation in training writes `predictions.html`, with the ranks of all epochs, and
    `predictions/history.json`. When training ends or is interrupted, the similarities, recall curves and
    worst misses of the last validation are added to the page. Histograms are logged to W&B as well, and at
    the end the plots and the tables `val/predictions`, `val/predictions_image_to_text` and
    `val/worst_misses`.

    Args:
        queries: number of captions and of images to show, the same in every epoch; 0 to show nothing.
        top_k: number of images to show for each caption, and of captions for each image.
        seed: seed of the choice of captions and images.
        folder: folder of the page; by default the run's folder.
    """

    def __init__(
        self, queries: NonNegativeInt = 16, top_k: PositiveInt = 5, seed: int = 0, folder: Path | None = None
    ) -> None:
        super().__init__()
        self.queries, self.top_k, self.seed, self.folder = queries, top_k, seed, folder
        self._last: tuple[Any, ...] | None = None  # the last validation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page, and log the histograms."""
        # on_validation_epoch_end of callbacks runs before that of the module, which collects the embeddings
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_global_zero
        data: Any = getattr(trainer, "datamodule", None)
        embeddings: Any = getattr(pl_module, "validation_embeddings", None)
        if not (fitting and self.queries and data and embeddings):
            return
        with self.sparing("the predictions could not be shown"):
            images, content = data.images("val"), data.content_ids("val")
            merged = predictions.merge_identical(embeddings, images, content)
            text_ids = predictions.choose_captions(images, self.queries, self.seed)
            captions = predictions.captions_of(images)
            image_ids = [content[captions[text_id][0]] for text_id in text_ids]
            queries = {
                "text_to_image": find_images(merged, images, text_ids, self.top_k),
                "image_to_text": predictions.find_captions(merged, images, image_ids, self.top_k),
            }
            ranks = {way: {str(query.id): query.rank for query in queries[way]} for way in queries}
            logged = {name.removeprefix("val/"): float(v) for name, v in trainer.callback_metrics.items()}
            recall = {name: value for name, value in logged.items() if "_R@" in name}
            epoch, run = trainer.current_epoch, self.run_folder(trainer)
            history = _add_epoch(run.predictions / "history.json", epoch, {**ranks, "recall": recall})
            page = {"epoch": epoch, "queries": queries, "history": history}
            step = trainer.global_step - 1  # as Lightning counts the metrics of this validation
            self._last = page, step, embeddings, merged, images
            write_page(run.predictions_page, **page)
            self.log_media(trainer, step, lambda: histograms(similarities(merged)))

    def show_rest(self, trainer: Trainer) -> None:
        """Add the plots and the worst misses of the last validation."""
        if self._last is None:
            return
        (page, step, embeddings, merged, images), self._last = self._last, None
        epoch, plots = page["epoch"], dict[str, Plot]()
        with self.sparing("the plots could not be drawn"):
            plots = plots_of_split(embeddings, similarities(merged), page["history"]["recall"], epoch)
        with self.sparing("the worst misses could not be shown"):
            worst = predictions.worst_queries(merged, min(self.queries, MOST_MISSES))
            misses = find_images(merged, images, worst, self.top_k)
            file = self.run_folder(trainer).predictions_page
            write_page(file, **page, plots=list(plots.values()), misses=misses)
            tables = {
                "predictions": page["queries"]["text_to_image"],
                "predictions_image_to_text": page["queries"]["image_to_text"],
                "worst_misses": misses,
            }
            self.log_media(
                trainer,
                step,
                lambda: {
                    **{f"val/{name}": prediction_table(part, epoch) for name, part in tables.items()},
                    **{f"val/{name}": png_image(plot.png, plot.words) for name, plot in plots.items()},
                },
            )


def _add_epoch(file: Path, epoch: int, parts: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Add an epoch to the file, without later ones of a run that was resumed, and return all epochs."""
    saved = json.loads(file.read_bytes()) if file.exists() else {}
    history = {
        part: {int(n): values for n, values in saved.get(part, {}).items() if int(n) < epoch} | {epoch: new}
        for part, new in parts.items()
    }
    write_atomically(file, json.dumps(history).encode())
    return history


def prediction_table(queries: Sequence[Query], epoch: int) -> Any:
    """Return a `wandb.Table` with one row per query and its answers; correct captions have a ✓."""
    import wandb

    k = max((len(query.answers) for query in queries), default=0)
    of_images = any(isinstance(query.item, Path) for query in queries)
    asked, wanted = ("image", "own captions") if of_images else ("query", "true image")
    answers = [f"prediction {n + 1}" for n in range(k)]
    table = wandb.Table(columns=["epoch", asked, "rank", f"hit@{k}", wanted, *answers])
    for query in queries:
        right = [_cell(item) for item in query.wanted]
        shown = "\n".join(right) if of_images else right[0]
        found = [_cell(answer.item, answer) for answer in query.answers]
        table.add_data(epoch, _cell(query.item), query.rank, query.hit, shown, *found)
    return table


def _cell(item: Path | str, answer: Answer | None = None) -> Any:
    import wandb

    similarity = f"{answer.similarity:.3f}" if answer else ""
    if isinstance(item, Path):
        return wandb.Image(thumbnail(item), caption=similarity or item.name, file_type="jpg")
    return f"{similarity} {'✓ ' if answer.right else ''}{printable(item)}" if answer else printable(item)


def histograms(pairs: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return `wandb.Histogram`s of the cosines of matched and unmatched pairs."""
    import wandb

    return {
        f"val/similarity_{name}": wandb.Histogram(np_histogram=(histogram(cosines).numpy(), EDGES))
        for name, cosines in zip(("matched", "unmatched"), pairs, strict=True)
    }
