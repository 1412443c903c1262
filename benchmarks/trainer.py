"""A Lightning trainer for measurements: it trains, and neither logs, stores nor prints anything."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def plain_trainer(**options: Any) -> Trainer:
    """Return a trainer that clips gradients as our configs do, for one epoch by default."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "gradient_clip_val": 1.0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})
