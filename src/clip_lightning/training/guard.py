"""Steps whose gradient is not finite: counted, and after too many in a row the end, with a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from clip_lightning.errors import Diverged
from clip_lightning.files import write_atomically
from clip_lightning.run_folder import RunFolder

MOST_BATCHES = 100


class NonFinite(Callback):
    """Counts the steps that `CLIPModule` has left out, and ends the run after several in a row.

    Args:
        folder: of the run; `non-finite.json` in it then names what the batches held.
        in_a_row: steps left out one after the other with which the run ends. Mixed precision in fp16 begins
            with a few while its loss scale settles.
    """

    def __init__(self, folder: Path, in_a_row: int = 20) -> None:
        self.run = RunFolder(folder)
        self.in_a_row = in_a_row
        self.left_out = self.row = 0
        self._step = 0
        self._batches: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Travels in the checkpoint."""
        return {"left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.left_out = state_dict["left_out"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what this rank is about to see."""
        rows = batch["text_id"]  # asked for its numbers only at the end: a GPU would be waited for
        seen = {"names": batch["names"]} if "names" in batch else {"captions": rows}
        self._batches.append({"epoch": trainer.current_epoch, "batch": batch_idx, **seen})
        del self._batches[:-MOST_BATCHES]
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, say so at the first, and give up after too many.

        Raises:
            Diverged: after `in_a_row` steps left out.
        """
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        if math.isfinite(pl_module.gradient_norm):
            self.row = 0
            self._batches.clear()
        else:
            self.left_out, self.row = self.left_out + 1, self.row + 1
            if self.row == 1:
                rank_zero_warn(
                    f"step {trainer.global_step} is left out, its gradient is not finite "
                    f"({pl_module.gradient_norm}); {self.in_a_row} in a row end the run"
                )
        if self.left_out:
            pl_module.log("train/steps_left_out", float(self.left_out))
        if self.row >= self.in_a_row:
            file = self._write(trainer)
            raise Diverged(
                f"{self.row} steps in a row had a gradient that is not finite, up to step "
                f"{trainer.global_step}; {file} names their pictures and captions; lower "
                "--model.optimizer.lr, prefer --trainer.precision bf16-mixed to 16-mixed, or look at the "
                "data with clip-lightning data check"
            )

    def _write(self, trainer: Trainer) -> Path:
        """What the batches held, by name; a file for each rank, which has seen its own."""
        file = self.run.non_finite(trainer.global_rank)
        data: Any = getattr(trainer, "datamodule", None)
        captions, owner = ([], []) if data is None else _training_captions(data)
        batches = [dict(batch) for batch in self._batches]
        for batch in batches:
            if "captions" in batch:
                rows = batch["captions"].tolist()
                batch["captions"] = [
                    {"picture": owner[row], "caption": captions[row]} if captions else row for row in rows
                ]
        write_atomically(file, json.dumps(batches, indent=2, ensure_ascii=False).encode(errors="replace"))
        return file


def _training_captions(data: Any) -> tuple[list[str], list[str]]:
    """Every caption of the training split, and the picture it belongs to."""
    owner = [str(image.path) for image in data.images("train") for _ in image.captions]
    return data.captions("train"), owner
