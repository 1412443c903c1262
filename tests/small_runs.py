"""A trainer and data for steps of a second, without a command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from clip_lightning.data.datamodule import CaptionDataModule
    from clip_lightning.training.module import CLIPModule


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """Return a quiet trainer on the CPU, of one epoch and one process unless the options say otherwise."""
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    small = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder}
    small |= {"log_every_n_steps": 1}
    return Trainer(callbacks=list(callbacks), **{**quiet, **small, **options})


def data(module: CLIPModule, root: Path, **options: Any) -> CaptionDataModule:
    """Return batches of eight images, without a cache or processes of its own."""
    from clip_lightning.data.datamodule import CaptionDataModule

    settings = {"batch_size": 8, "num_workers": 0, "cache": "off"}
    return CaptionDataModule(module.transform, module.tokenize, root, **{**settings, **options})
