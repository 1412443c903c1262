"""What a W&B run records beside its metrics: data used, model made, and alerts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from clip_lightning.run_folder import RunFolder
from clip_lightning.tracking.artifacts import log_model, use_data, why_not_best
from clip_lightning.tracking.logger import RunLogger

STALLED_SHARE, STALLED_STEPS = 0.98, 200
COLLAPSED_SCALE = 2.0  # it begins at 14 (InfoNCE) or 10 (SigLIP)


class Lineage(Checkpoint):
    """Records the data that a run uses, and its best bundle and last checkpoint at the end.

    Also when the run is interrupted, once it has trained a step. Lightning runs callbacks of this kind last,
    in their order: listed behind those that write checkpoints, it finds what they have written.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the data."""
        data = getattr(getattr(trainer, "datamodule", None), "fetched", None)
        for logger in _loggers(trainer):
            if data is not None:
                _attempt(logger, "note the data's lineage", lambda run: use_data(run, data))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model; also when a run that was done is resumed, which trains no more."""
        self._log_model(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The model so far."""
        if trainer.global_step > 0:
            self._log_model(trainer)

    def _log_model(self, trainer: Trainer) -> None:
        for logger in _loggers(trainer):
            if logger.logs_model and RunFolder(self.folder).metrics.is_file():
                _attempt(logger, "take the model", lambda run: self._log_model_of(run, logger))  # noqa: B023

    def _log_model_of(self, run: Any, logger: RunLogger) -> None:
        name = logger.model_name or f"model-{run.id}"
        about = _metadata(self.folder)
        reason = why_not_best(run, about, logger.model_name)
        model = log_model(run, self.folder, name=name, metadata=about, is_best=reason is None)
        if model is None:
            return
        if reason is not None:
            link = f" and without a link to {logger.link_to}" if logger.link_to else ""
            rank_zero_warn(f"the model {name} is logged without the alias `best`{link}: {reason}")
        elif logger.link_to is None:
            return
        elif run.offline:
            rank_zero_warn(f"the model is not linked to {logger.link_to}: that takes a run that is online")
        else:
            run.link_artifact(model, logger.link_to)


class Alerts(Callback):
    """Warns of a loss that is not finite or learns nothing, in W&B and on stderr; in W&B of an early stop."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._chance_steps = 0
        self._looked_at = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss as often as it is logged."""
        step = trainer.global_step
        if step in (0, self._looked_at) or step % max(trainer.log_every_n_steps, 1):
            return
        self._looked_at = step
        logged = trainer.callback_metrics
        if "train/loss" in logged and not math.isfinite(float(logged["train/loss"])):
            self._say(
                trainer,
                "the loss is not finite",
                f"at step {trainer.global_step}; lower the learning rate, or look at the data",
            )
        scale = logged.get("train/scale")
        if scale is not None and float(scale) < COLLAPSED_SCALE:
            self._say(
                trainer,
                "the scale has collapsed",
                f"to {float(scale):.2f} at step {step}: logits are all but equal; lower the learning rate, "
                "or look at whether captions belong to their pictures",
            )
        share = logged.get("train/loss_over_ln_batch")
        at_chance = share is not None and STALLED_SHARE <= float(share) <= 2 - STALLED_SHARE
        self._chance_steps = self._chance_steps + trainer.log_every_n_steps if at_chance else 0
        if self._chance_steps >= STALLED_STEPS:
            self._say(
                trainer,
                "the loss stays at ln(batch)",
                f"up to step {trainer.global_step}, which is what chance gives: nothing is learnt; look at "
                "whether captions belong to their pictures, and at the learning rate",
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run has stopped early; one that its scheduler ended is marked as preempted."""
        if isinstance(exception, SIGTERMException):
            for logger in _loggers(trainer):
                _attempt(logger, "note the preemption", lambda run: run.mark_preempting())
        if trainer.global_step > 0:
            self._alert(trainer, "stopped", f"at step {trainer.global_step}: {type(exception).__name__}")

    def _say(self, trainer: Trainer, title: str, text: str) -> None:
        if title not in self._said:
            self._said.add(title)
            rank_zero_warn(f"{title} {text}")
            self._alert(trainer, title, text)

    def _alert(self, trainer: Trainer, title: str, text: str) -> None:
        for logger in _loggers(trainer):
            _attempt(logger, "take an alert", lambda run: run.alert(title, text, level="WARN"))


def _loggers(trainer: Trainer) -> Iterator[RunLogger]:
    """Of this process's run, if it has one in W&B."""
    if trainer.is_global_zero and not trainer.fast_dev_run:
        yield from (logger for logger in trainer.loggers if isinstance(logger, RunLogger))


def _attempt(logger: RunLogger, what: str, do: Callable[[Any], object]) -> None:
    """Do it with the run; W&B's failure is said and ends nothing."""
    try:
        do(logger.experiment)
    except Exception as error:
        logger.complain(what, error)


def _metadata(folder: Path) -> dict[str, Any]:
    """What describes a model: metrics and data from metrics.json, towers and loss from the bundle."""
    about: dict[str, Any] = json.loads(RunFolder(folder).metrics.read_text())
    config = RunFolder(folder).model / "config.json"
    if config.is_file():
        bundle = json.loads(config.read_text())
        towers = {kind: bundle[kind]["name"] for kind in ("image_tower", "text_tower")}
        about |= towers | {"loss": bundle.get("loss"), "training_data": bundle.get("training_data")}
    return about
