"""A trainer and data for steps of a second, without a command line."""

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.training.module import CLIPModule


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """Return a quiet trainer on the CPU, of one epoch and one process unless the options say otherwise."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    small = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder}
    small |= {"log_every_n_steps": 1}
    return Trainer(callbacks=list(callbacks), **{**quiet, **small, **options})


class Notes(Callback):
    """Keeps the batches of training, and what one would otherwise read from a logger."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.batches: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.scales: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.batches.append(batch)
        self.losses.append(outputs["loss"].item())
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        self.scales.append(pl_module.clip.scale.item())


def data(module: CLIPModule, root: Path, **options: Any) -> CaptionDataModule:
    """Return batches of eight images, without a cache or processes of its own."""
    settings = {"batch_size": 8, "num_workers": 0, "cache": "off"}
    return CaptionDataModule(module.transform, module.tokenize, root, **{**settings, **options})


def other_split(
    source: Path, folder: Path, split: Callable[[int, int], str], order: int | None = None
) -> Path:
    """Copy scenes; `split` names that of an image and one of its captions, 0 to 4, or is "" to leave it out.

    The rows are shuffled by the seed `order`.
    """
    shutil.copytree(source, folder)
    with (folder / "captions.csv").open() as file:
        header, *rows = csv.reader(file)
    for i, row in enumerate(rows):
        row[2] = split(int(row[0].split(".")[0]), i % 5)
    rows = [row for row in rows if row[2]]
    if order is not None:
        random.Random(order).shuffle(rows)
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the weights and buffers that are not as in `before`."""
    return {name for name, tensor in module.state_dict().items() if not tensor.equal(before[name])}
