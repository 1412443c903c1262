"""Measures zero-shot accuracy during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from clip_lightning.data.classes import ClassSet, check_name, class_names, find_classes
from clip_lightning.errors import UserError
from clip_lightning.evaluation.prompts import read_templates
from clip_lightning.evaluation.zero_shot import Classification, classify
from clip_lightning.model.encode import Encoded, encode_images
from clip_lightning.reports.tables import ClassReport
from clip_lightning.terminal import one_line
from clip_lightning.tracking.panel import Panel, class_media

METRICS = ("zero_shot_top1", "zero_shot_top5")


class ZeroShot(Panel):
    """Classifies images by the names of their classes at each validation.

    It logs `val/zero_shot_top1` and `val/zero_shot_top5`, in percent, computed in fp32 with the weights that
    are validated. When training ends, it writes the classes, confusions and calibration of the last
    validation to `zero_shot/` in the run's folder, and logs tables of them to W&B. The features of a frozen
    image tower are computed once.

    Args:
        data: a folder of class folders, a CSV with the columns image and label, or a Hugging Face data set
            such as hf:uoft-cs/cifar10; without it, nothing is classified.
        templates: simple, imagenet, none, or a file with one template per line, in which {} stands for the
            name of the class.
        names: file with the names of the classes, as in evaluate zero-shot.
        split: all, train, val or test; by default the val split of the data, else its test split, else all.
        every: classify in each n-th epoch, and always in the last one.
    """

    def __init__(
        self,
        data: str | None = None,
        templates: str = "simple",
        names: Path | None = None,
        split: str | None = None,
        every: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.data, self.names, self.split, self.every = data, names, split, every
        self.templates = read_templates(templates)
        if data is not None:
            check_name(data)
        self._set: ClassSet | None = None
        self._rows: list[int] = []
        self._names: list[list[str]] = []
        self._kept: tuple[Tensor, Tensor] | None = None
        self._last: tuple[ClassReport, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.data is None or self._set is not None or stage not in ("fit", "validate"):
            return
        self._set = find_classes(self.data)
        split = self.split or next((name for name in ("val", "test") if name in self._set.splits), "all")
        self._rows = self._set.rows(split)
        if not self._rows:
            raise UserError(
                f"--zero_shot.split {split}: {self.data} has no such split; choose another split, or all"
            )
        self._names = class_names(self._set.classes, self.names)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        # At the first batch, since callbacks that average weights swap them when the epoch starts and ends,
        # before or after this callback.
        if self._set is None or batch_idx or trainer.sanity_checking:
            return
        for name in METRICS:  # else the previous accuracy would be recorded for an epoch that is skipped
            trainer.callback_metrics.pop(f"val/{name}", None)
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs or trainer.state.fn != "fit":
            result = self._classify(trainer, pl_module.clip, self._set)
            # the values are equal on all ranks; sync_dist only avoids Lightning's warning
            scores = {f"val/{name}": result.metrics[name] for name in METRICS}
            pl_module.log_dict(scores, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
            title = f"{self.data}, epoch {trainer.current_epoch}"
            report = ClassReport(title, [entry[0] for entry in self._names], result)
            self._last = report, trainer.global_step - 1  # as Lightning counts the metrics of a validation

    def _classify(self, trainer: Trainer, clip: Any, data: ClassSet) -> Classification:
        """Embed a part of the images on each rank, and classify all of them on every rank."""
        if self._kept is None or not clip.image_tower.frozen:
            rows = self._rows[trainer.global_rank :: trainer.world_size]
            first = self._kept is None and trainer.is_global_zero
            images, progress = [data.images[row] for row in rows], "zero-shot images" if first else ""
            encoded = Encoded.join(encode_images(clip.image_tower, images, progress=progress))
            if first and encoded.broken:
                _, path, reason = encoded.broken[0]
                text = f"skipped {len(encoded.broken)} unreadable images, such as {path}: {reason}"
                rank_zero_warn(one_line(f"zero-shot: {text}"))
            labels = torch.tensor([data.labels[rows[index]] for index in encoded.rows]).long()
            self._kept = encoded.features, labels
        features, labels = self._kept
        part = clip.project_image(features.to(clip.device)).cpu(), labels
        parts: list[Any] = [part]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, part)
        image, label = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if not len(image):
            raise UserError(
                f"--zero_shot.data {self.data}: no image can be read; check the files, or give other data"
            )
        classifier = clip.zero_shot_classifier(self._names, self.templates)
        return classify(image, classifier, label, scale=clip.scale.item(), bias=clip.bias)

    def show_rest(self, trainer: Trainer) -> None:
        """Show the classes, confusions and calibration of the last classification."""
        if self._last is None or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        (report, step), self._last = self._last, None
        with self.sparing("the zero-shot classes could not be shown"):
            if self.folder is not None and not trainer.fast_dev_run:
                report.write(self.run_folder(trainer).zero_shot)
            self.log_media(trainer, step, lambda: class_media(report, "val/"))
