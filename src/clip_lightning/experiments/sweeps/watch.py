"""What a search sees of a run while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from clip_lightning.errors import Diverged
from clip_lightning.experiments.sweeps.wandb_sweep import note_stop

Stops = Callable[[float, int], bool]
"""Whether a run stops, given the newest value and how many validations there were."""


class Watch(Callback):
    """Keeps one metric's validation curve, and ends the run where that says it should.

    Args:
        metric: its name as logged, `val/rsum`.
        maximize: whether more is better.
        stops: asked after each validation, on rank 0.

    Attributes:
        curve: the values so far.
        stopped: whether the run was ended from here.
    """

    def __init__(self, metric: str, maximize: bool, stops: Stops) -> None:
        self.metric = metric
        self.maximize = maximize
        self.stops = stops
        self.curve: list[float] = []
        self.stopped = False

    @property
    def best(self) -> float:
        """The best value so far; NaN where there is none."""
        values = [value for value in self.curve if not math.isnan(value)]
        return (max if self.maximize else min)(values, default=math.nan)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Count a run that diverges before its first validation as the worst: no recall, or the last rank."""
        if isinstance(exception, Diverged):
            data: Any = getattr(trainer, "datamodule", None)
            self.curve.append(0.0 if self.maximize else float(len(data.captions("val"))))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the value down and ask."""
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        self.curve.append(float(trainer.callback_metrics[self.metric]))
        if self.stops(self.curve[-1], len(self.curve)):
            self.stopped = True
            # early stopping is what all ranks have and agree upon: here it is at its goal already
            stopping = trainer.early_stopping_callback
            stopping.stopping_threshold = -math.inf if stopping.mode == "max" else math.inf


class NotesStop(Callback):
    """Notes in a run that W&B's agent ends it: the server calls it failed, like one that went wrong."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the agent's exception, a bare one, from others."""
        if type(exception) is Exception and not exception.args:
            note_stop()
