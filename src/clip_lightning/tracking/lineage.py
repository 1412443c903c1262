"""Records the data and the model of a run in W&B, and sends alerts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from clip_lightning.run_folder import RunFolder
from clip_lightning.tracking.artifacts import log_model, use_data, why_not_best
from clip_lightning.tracking.logger import RunLogger

STALLED_RANGE, STALLED_STEPS = 0.02, 200  # distance from the loss at chance, and the steps before an alert
COLLAPSED_SCALE = 2.0  # the scale starts at 14 (InfoNCE) or 10 (SigLIP)


class Lineage(Checkpoint):
    """Records the data that a run uses, and at its end or interruption its best bundle and last checkpoint.

    Lightning runs checkpoint callbacks last and in order, so this one must come after those that write
    checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the data."""
        data: Any = getattr(getattr(trainer, "datamodule", None), "fetched", None)
        for logger in _loggers(trainer) if data is not None else ():
            with logger.sparing("record the data"):
                use_data(logger.experiment, data)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the model, also if the resumed run was already finished."""
        for logger in _loggers(trainer):
            if logger.logs_model and self.folder.metrics.is_file():
                with logger.sparing("log the model"):
                    self._log_model(logger.experiment, logger)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the model so far."""
        if trainer.global_step > 0:
            self.on_fit_end(trainer, pl_module)

    def _log_model(self, run: Any, logger: RunLogger) -> None:
        """Log the model with its metrics, data, towers and loss, and link it if it is the best."""
        metadata: dict[str, Any] = json.loads(self.folder.metrics.read_text())
        config = self.folder.model / "config.json"
        if config.is_file():
            bundle = json.loads(config.read_text())
            metadata |= {kind: bundle[kind]["name"] for kind in ("image_tower", "text_tower")}
            metadata |= {name: bundle.get(name) for name in ("loss", "training_data")}
        name = logger.model_name or f"model-{run.id}"
        reason = why_not_best(run, metadata, logger.model_name)
        model = log_model(run, self.folder, name=name, metadata=metadata, is_best=reason is None)
        if model is None:
            return
        if reason is not None:
            link = f" and without a link to {logger.link_to}" if logger.link_to else ""
            rank_zero_warn(f"the model {name} was logged without the alias `best`{link}: {reason}")
        elif logger.link_to is not None and run.offline:
            rank_zero_warn(f"the model was not linked to {logger.link_to}, which requires an online run")
        elif logger.link_to is not None:
            run.link_artifact(model, logger.link_to)


class Alerts(Callback):
    """Warns if the loss is not finite or does not fall, and alerts in W&B also if the run stops early."""

    def __init__(self) -> None:
        self._sent: set[str] = set()
        self._since = 0  # the step since which the loss has been at chance

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss as often as it is logged."""
        step = trainer.global_step
        if step % max(trainer.log_every_n_steps, 1):
            return
        logged = trainer.callback_metrics
        loss, scale = float(logged.get("train/loss", 0.0)), float(logged.get("train/scale", math.inf))
        if abs(float(logged.get("train/loss_over_ln_batch", 0.0)) - 1) > STALLED_RANGE:
            self._since = step
        advice, lower = "check that captions match their images", "lower the learning rate"
        found = {}  # title → text
        if not math.isfinite(loss):
            found["the loss is not finite"] = f"at step {step}; {lower}, or check the data"
        if scale < COLLAPSED_SCALE:
            found["the scale has collapsed"] = f"to {scale:.2f} at step {step}; {lower}, or {advice}"
        if step - self._since >= STALLED_STEPS:
            found["the loss stays at ln(batch)"] = f"up to step {step}; check the learning rate, and {advice}"
        for title, text in found.items():
            if title not in self._sent:
                self._sent.add(title)
                rank_zero_warn(f"{title} {text}")
                self._alert(trainer, title, text)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Send an alert that the run has stopped early, and mark it as preempted after SIGTERM."""
        for logger in _loggers(trainer) if isinstance(exception, SIGTERMException) else ():
            with logger.sparing("mark the run as preempted"):
                logger.experiment.mark_preempting()
        if trainer.global_step > 0:
            self._alert(trainer, "stopped", f"at step {trainer.global_step}: {type(exception).__name__}")

    def _alert(self, trainer: Trainer, title: str, text: str) -> None:
        for logger in _loggers(trainer):
            with logger.sparing("send an alert"):
                logger.experiment.alert(title, text, level="WARN")


def _loggers(trainer: Trainer) -> Iterator[RunLogger]:
    """Yield the W&B loggers of rank 0."""
    if trainer.is_global_zero and not trainer.fast_dev_run:
        yield from (logger for logger in trainer.loggers if isinstance(logger, RunLogger))
