"""What the model finds for fixed held-out sentences and pictures: grids, a page, W&B tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.errors import UserError
from clip_lightning.evaluation.diagnostics import similarities, worst_queries
from clip_lightning.evaluation.predictions import choose_captions, find_captions, find_images, images_of
from clip_lightning.evaluation.retrieval import Embeddings
from clip_lightning.files import write_atomically
from clip_lightning.reports.pages import Report, write_page
from clip_lightning.reports.plots import Plot, plots_of_split
from clip_lightning.run_folder import RunFolder
from clip_lightning.tracking.logger import log_media
from clip_lightning.tracking.media import histograms, plot_images, prediction_table

History = Mapping[str, Mapping[int, Mapping[Any, Any]]]
"""`text_to_image`, `image_to_text`: epoch → row → rank; `recall`: epoch → metric → percent."""

MOST_MISSES = 8


@dataclass(frozen=True)
class _Validation:
    """What the end of training needs of the last validation."""

    report: Report
    step: int
    recall: Mapping[int, Mapping[str, float]]
    embeddings: Embeddings
    images: Sequence[CaptionedImage]
    content: Sequence[int]


class PredictionTable(Callback):
    """Shows what the model finds for fixed held-out sentences and images, and in the whole split.

    Every validation of a fit writes `predictions.html`, with the ranks of all epochs, and
    `predictions/history.json`. The end of training, or its interruption, adds the similarities, recall curves
    and worst misses of the last validation to the page. W&B also gets the histograms, and at the end
    the plots and the tables `val/predictions`, `val/predictions_image_to_text` and `val/worst_misses`.

    A failure to draw never ends a run: it is warned of once, and training continues.

    Args:
        queries: sentences, and pictures, to show, the same in every epoch; 0 for nothing at all.
        top_k: pictures shown for each sentence, and sentences for each picture.
        seed: of the choice.
        folder: where to write; by default the run's own folder.
    """

    def __init__(self, queries: int = 16, top_k: int = 5, seed: int = 0, folder: Path | None = None) -> None:
        if queries < 0:
            raise UserError(f"--predictions.queries must be 0 or more, got {queries}")
        if top_k < 1:
            raise UserError(f"--predictions.top_k must be 1 or more, got {top_k}")
        self.queries = queries
        self.top_k = top_k
        self.seed = seed
        self.folder = folder
        self._last: _Validation | None = None
        self._warned: set[str] = set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_validation_epoch_end: callbacks' runs before the module's, which makes the embeddings.
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not (fitting and self.queries and trainer.is_global_zero):
            return
        data: Any = getattr(trainer, "datamodule", None)
        embeddings: Any = getattr(pl_module, "validation_embeddings", None)
        if data is None or embeddings is None:
            return
        with self._sparing("the predictions could not be shown"):
            self._show(trainer, embeddings, data.images("val"), data.content_ids("val"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_split(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._show_split(trainer)

    def _show(
        self,
        trainer: Trainer,
        embeddings: Embeddings,
        images: Sequence[CaptionedImage],
        content: Sequence[int],
    ) -> None:
        """What the model finds for the fixed sentences and pictures."""
        epoch = trainer.current_epoch
        text_ids = choose_captions(images, self.queries, self.seed)
        captions = find_images(embeddings, images, content, text_ids, self.top_k)
        pictures = find_captions(embeddings, images, content, images_of(images, text_ids), self.top_k)
        run = self._run(trainer)
        history = _remember(
            run.predictions / "history.json",
            epoch,
            text_to_image={query.id: query.rank for query in captions},
            image_to_text={query.id: query.rank for query in pictures},
            recall={
                name.removeprefix("val/"): float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/") and "_R@" in name
            },
        )
        report = Report(epoch, captions, history["text_to_image"], pictures, history["image_to_text"])
        step = trainer.global_step - 1  # as Lightning counts it for the metrics of this validation
        self._last = _Validation(report, step, history["recall"], embeddings, images, content)
        write_page(report, run.predictions_page)
        self._log(trainer, step, lambda: histograms(similarities(embeddings, content)))

    def _show_split(self, trainer: Trainer) -> None:
        """The plots and the worst misses of the last validation, once."""
        last, self._last = self._last, None
        if last is None:
            return
        run, epoch = self._run(trainer), last.report.epoch
        plots: dict[str, Plot] = {}
        with self._sparing("the plots could not be drawn"):
            plots = plots_of_split(last.embeddings, last.content, last.recall, epoch)
        with self._sparing("the worst misses could not be shown"):
            worst = worst_queries(last.embeddings, last.content, min(self.queries, MOST_MISSES))
            misses = find_images(last.embeddings, last.images, last.content, worst, self.top_k)
            write_page(replace(last.report, plots=list(plots.values()), misses=misses), run.predictions_page)
            self._log(
                trainer,
                last.step,
                lambda: {
                    "val/predictions": prediction_table(last.report.captions, epoch),
                    "val/predictions_image_to_text": prediction_table(last.report.images, epoch),
                    "val/worst_misses": prediction_table(misses, epoch),
                    **plot_images(plots),
                },
            )

    def _run(self, trainer: Trainer) -> RunFolder:
        return RunFolder(Path(self.folder or trainer.default_root_dir))

    def _log(self, trainer: Trainer, step: int, make: Callable[[], dict[str, Any]]) -> None:
        with self._sparing("W&B did not take the predictions"):
            log_media(trainer, step, make)

    @contextmanager
    def _sparing(self, failure: str) -> Iterator[None]:
        """Tell of an error within, once a run, instead of letting it end the run."""
        try:
            yield
        except Exception as error:
            if failure not in self._warned:
                self._warned.add(failure)
                rank_zero_warn(f"{failure}: {type(error).__name__}: {error}")


def _remember(record: Path, epoch: int, **news: Mapping[Any, Any]) -> History:
    """Add an epoch to the file, and give all epochs.

    Later epochs are of a run that has since gone back to an earlier checkpoint: they are forgotten.
    """
    try:
        saved = json.loads(record.read_bytes())
    except (FileNotFoundError, ValueError):  # it is only a record
        saved = {}
    history: dict[str, dict[int, dict[Any, Any]]] = {}
    for part, new in news.items():
        past = {int(each): values for each, values in saved.get(part, {}).items() if int(each) < epoch}
        history[part] = {**past, epoch: {str(key): value for key, value in new.items()}}
    write_atomically(record, json.dumps(history).encode())
    return history
