"""What the model finds for a few held-out sentences, after every validation: pictures, page, W&B table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically
from clip_lightning.tracking.pages import (
    draw_predictions,
    thumbnail,
    write_predictions_page,
)
from clip_lightning.tracking.predictions import PredictionRow, choose_queries, prediction_rows


class PredictionTable(Callback):
    """Shows, after every validation of a fit, which pictures the model finds for fixed held-out sentences.

    Writes `predictions/epoch=NN.png`, `predictions.html` (the newest, with the ranks of all epochs) and
    `predictions/history.json`, whatever the logger; with a WandbLogger also the table `val/predictions`.

    Args:
        queries: sentences to show, the same in every epoch; 0 for none.
        top_k: pictures shown for each sentence.
        seed: of the choice of sentences.
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
        self._warned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_validation_epoch_end: callbacks' runs before the module's, which makes the embeddings.
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not (fitting and self.queries and trainer.is_global_zero):
            return
        data: Any = getattr(trainer, "datamodule", None)
        embeddings: Any = getattr(pl_module, "validation_embeddings", None)
        if data is None or embeddings is None:
            return
        images = data.images("val")
        chosen = choose_queries(images, self.queries, self.seed)
        rows = prediction_rows(embeddings, images, data.content_ids("val"), chosen, self.top_k)
        epoch = trainer.current_epoch
        self._write(rows, epoch, Path(self.folder or trainer.default_root_dir))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log(logger, rows, epoch, trainer.global_step)

    def _write(self, rows: Sequence[PredictionRow], epoch: int, folder: Path) -> None:
        record = folder / "predictions" / "history.json"
        saved = json.loads(record.read_bytes()) if record.exists() else {}
        # Later epochs are of a run that has since gone back to an earlier checkpoint.
        history = {
            int(past): {int(text_id): rank for text_id, rank in ranks.items()}
            for past, ranks in saved.items()
            if int(past) < epoch
        }
        history[epoch] = {row.text_id: row.rank for row in rows}
        draw_predictions(rows, record.with_name(f"epoch={epoch:02d}.png"), f"Epoch {epoch}")
        write_atomically(record, json.dumps(history).encode())
        write_predictions_page(rows, history, folder / "predictions.html")

    def _log(self, logger: WandbLogger, rows: Sequence[PredictionRow], epoch: int, step: int) -> None:
        try:
            # No step=: W&B drops rows whose step lies behind, as after a resume.
            logger.experiment.log({"val/predictions": _table(rows, epoch), "trainer/global_step": step})
        except Exception as error:  # a table is not worth a run
            if not self._warned:
                rank_zero_warn(f"W&B did not take the table of predictions: {error}")
            self._warned = True


def _table(rows: Sequence[PredictionRow], epoch: int) -> Any:
    """A `wandb.Table` with one row a sentence."""
    import wandb

    def picture(path: Path, caption: str) -> wandb.Image:
        return wandb.Image(thumbnail(path), caption=caption, file_type="jpg")

    k = max((len(row.predictions) for row in rows), default=0)
    columns: list[str | int] = [
        "epoch",
        "query",
        "rank",
        f"hit@{k}",
        "true image",
        *(f"prediction {n + 1}" for n in range(k)),
    ]
    table = wandb.Table(columns=columns)
    for row in rows:
        found = [picture(each.path, f"{each.similarity:.3f}") for each in row.predictions]
        table.add_data(epoch, row.text, row.rank, row.hit, picture(row.true_path, row.true_path.name), *found)
    return table
