"""clip-lightning: a simple, lightweight CLIP in PyTorch Lightning with Weights & Biases."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from clip_lightning.data.datamodule import CaptionDataModule as CaptionDataModule
    from clip_lightning.evaluation.retrieval import retrieval_metrics as retrieval_metrics
    from clip_lightning.model.clip import CLIP as CLIP
    from clip_lightning.model.clip import zero_shot_classifier as zero_shot_classifier
    from clip_lightning.search.index import ImageIndex as ImageIndex
    from clip_lightning.training.losses import ContrastiveLoss as ContrastiveLoss
    from clip_lightning.training.losses import info_nce as info_nce
    from clip_lightning.training.losses import siglip_loss as siglip_loss
    from clip_lightning.training.module import CLIPModule as CLIPModule

# Public names, imported when first used: importing torch alone takes two seconds.
_HOME = {
    "CLIP": "clip_lightning.model.clip",
    "CLIPModule": "clip_lightning.training.module",
    "CaptionDataModule": "clip_lightning.data.datamodule",
    "ContrastiveLoss": "clip_lightning.training.losses",
    "ImageIndex": "clip_lightning.search.index",
    "info_nce": "clip_lightning.training.losses",
    "retrieval_metrics": "clip_lightning.evaluation.retrieval",
    "siglip_loss": "clip_lightning.training.losses",
    "zero_shot_classifier": "clip_lightning.model.clip",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
