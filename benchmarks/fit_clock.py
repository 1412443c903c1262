"""The clock for `clip-lightning fit`: a callback, named on its command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from clock import Recorder
from lightning.pytorch import Callback, LightningModule, Trainer


class RecordRun(Callback):
    """The times of a `fit`'s steps, and its validations with their metrics."""

    def __init__(self, folder: str) -> None:
        self.recorder = Recorder(Path(folder))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.recorder.step(dict)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        line = json.dumps({"time": time.time(), "step": trainer.global_step, "metrics": metrics})
        with (self.recorder.folder / "validations.jsonl").open("a") as file:
            file.write(line + "\n")
