"""Zero-shot accuracy while a model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from clip_lightning.data.classes import ClassSet, class_names
from clip_lightning.data.named import check_name, find_classes
from clip_lightning.errors import UserError
from clip_lightning.evaluation.prompts import read_templates
from clip_lightning.evaluation.zero_shot import Classification, classify, zero_shot_classifier
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import encode_pictures, project_pictures
from clip_lightning.reports.class_report import ClassReport
from clip_lightning.run_folder import RunFolder
from clip_lightning.terminal import one_line
from clip_lightning.tracking.logger import log_media
from clip_lightning.tracking.media import class_media

METRICS = ("zero_shot_top1", "zero_shot_top5")


class ZeroShot(Callback):
    """Classifies pictures by the names of their classes at each validation.

    Logs `val/zero_shot_top1` and `val/zero_shot_top5`, in percent, with the weights that the validation
    itself uses, in fp32. When training ends, of the last time: `zero_shot/` in the run's folder, with
    classes, confusions and calibration, and in W&B tables of them. The image tower runs again only where it
    is trained.

    Args:
        data: a folder of class folders, a CSV with the columns image and label, torchvision:CIFAR10 and the
            like, or hf:OWNER/NAME; nothing is done without it.
        templates: simple, imagenet, none, or a file with one template a line, {} where the name goes.
        names: file of the names of classes, as for evaluate zero-shot.
        split: all, train, val or test; by default the data's own val split (test, if it has no val), and all
            where it has none.
        every: validations from one time to the next; those of the last epoch always count.
        data_cache: folder for what torchvision downloads; the user's cache folder by default.

    Attributes:
        folder: of the run; nothing is written without it.
    """

    def __init__(
        self,
        data: str | None = None,
        templates: str = "simple",
        names: Path | None = None,
        split: str | None = None,
        every: int = 1,
        data_cache: Path | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"--zero_shot.every {every}: expected 1 or more")
        if split not in (None, "all", "train", "val", "test"):
            raise UserError(f"--zero_shot.split {split}: expected all, train, val or test")
        if data is not None:
            check_name(data)
        self.data = data
        self.templates = read_templates(templates) if data is not None else ()
        self.names, self.split, self.every, self.data_cache = names, split, every, data_cache
        self.folder: Path | None = None
        self._set: ClassSet | None = None
        self._rows: list[int] = []
        self._names: list[list[str]] = []
        self._kept: tuple[Tensor, Tensor] | None = None
        self._validations = 0
        self._now: Classification | None = None
        self._last: ClassReport | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.data is None or self._set is not None or stage not in ("fit", "validate"):
            return
        found = find_classes(self.data, self.data_cache)
        own = {split for split in found.splits if split}
        split = self.split or next((name for name in ("val", "test") if name in own), "all")
        self._rows = found.rows(split)
        if not self._rows:
            raise UserError(
                f"--zero_shot.split {split}: {self.data} has no such split; give one it has, or all"
            )
        self._names = class_names(found.classes, self.names)
        self._set = found

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Not at the epoch's start or end, where a callback that averages weights puts its own in and takes
        # them out again, before or after this one.
        if self._set is None or batch_idx or trainer.sanity_checking:
            return
        self._validations += 1
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.state.fn == "fit" and self._validations % self.every and not last_epoch:
            return
        clip: Any = pl_module.clip
        self._now = self._classify(trainer, clip, self._set)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._set is None or trainer.sanity_checking:
            return
        result, self._now = self._now, None
        if result is None:  # else the last figure would pass for this epoch's
            for name in METRICS:
                trainer.callback_metrics.pop(f"val/{name}", None)
            return
        # equal on all ranks already; sync_dist only spares Lightning's advice
        pl_module.log_dict({f"val/{name}": result.metrics[name] for name in METRICS}, sync_dist=True)
        title = f"{self.data}, epoch {trainer.current_epoch}"
        self._step = trainer.global_step - 1  # as Lightning counts it for the metrics of this validation
        self._last = ClassReport(title, [entry[0] for entry in self._names], result)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._show(trainer)

    def _classify(self, trainer: Trainer, clip: CLIP, data: ClassSet) -> Classification:
        """Every rank embeds its share; all have the same result."""
        features, labels = self._features(trainer, clip, data)
        share = project_pictures(clip, features), labels
        shares: list[Any] = [share]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, share)
        image, label = (torch.cat(parts) for parts in zip(*shares, strict=True))
        if not len(image):
            raise UserError(
                f"--zero_shot.data {self.data}: none of its pictures can be read; give other data"
            )
        classifier = zero_shot_classifier(clip, self._names, self.templates)
        return classify(image, classifier, label, scale=clip.scale.item(), bias=clip.bias)

    def _features(self, trainer: Trainer, clip: CLIP, data: ClassSet) -> tuple[Tensor, Tensor]:
        """The image tower's features of this rank's share (I, width), and the labels (I,)."""
        if self._kept is not None and clip.image_tower.frozen:
            return self._kept
        rows = self._rows[trainer.global_rank :: trainer.world_size]
        first = self._kept is None and trainer.is_global_zero
        found = encode_pictures(
            clip, [data.pictures[row] for row in rows], progress="zero-shot pictures" if first else ""
        )
        if found.broken and self._kept is None:
            path, reason = next(iter(found.broken.items()))
            rank_zero_warn(one_line(f"zero-shot: skipped {len(found.broken)} pictures; {path}: {reason}"))
        labels = torch.tensor([data.labels[rows[at]] for at in found.rows], dtype=torch.long)
        self._kept = found.features, labels
        return self._kept

    def _show(self, trainer: Trainer) -> None:
        """Classes and confusions of the last time, once; they are never worth a run."""
        report, self._last = self._last, None
        if report is None or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        try:
            if self.folder is not None and not trainer.fast_dev_run:
                report.write(RunFolder(self.folder).zero_shot)
            log_media(trainer, self._step, lambda: class_media(report, "val/"))
        except Exception as error:
            rank_zero_warn(f"the zero-shot classes could not be shown: {type(error).__name__}: {error}")
