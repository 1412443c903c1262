"""What a trained model costs: parameters, the time for one picture, the bytes of its features."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from clip_lightning.data.features import DTYPE
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP, parameter_counts

WARM_UP, FEWEST, MOST, ENOUGH_SECONDS = 3, 5, 30, 3.0


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def image_latency(clip: CLIP) -> dict[str, Any]:
    """How long one picture takes from its pixels to its embedding, where the model is and as it is.

    Returns:
        `image_latency_ms`, the median of 5 to 30 runs after three others, and `image_latency_conditions`.
    """
    device, precision = clip.logit_scale.device, next(clip.image_tower.parameters()).dtype
    pixels = torch.zeros(1, 3, *clip.transform.size, dtype=torch.uint8, device=device)
    was_training = clip.training
    clip.eval()
    try:
        for _ in range(WARM_UP):
            clip.encode_image(pixels)
        seconds: list[float] = []
        while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < ENOUGH_SECONDS):
            seconds.append(_seconds_of(clip, pixels))
    finally:
        clip.train(was_training)
    return {
        "image_latency_ms": round(1000 * statistics.median(seconds), 3),
        "image_latency_conditions": f"one picture, {_short(precision)}, {_place(device)}",
    }


def _seconds_of(clip: CLIP, pixels: torch.Tensor) -> float:
    began = time.perf_counter()
    clip.encode_image(pixels)
    if pixels.device.type == "cuda":  # which works behind Python's back
        torch.cuda.synchronize(pixels.device)
    return time.perf_counter() - began


def _short(precision: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
        precision, str(precision).removeprefix("torch.")
    )


def _place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


class CostRecorder(Callback):
    """Measures the model at the end of a fit; a W&B run has the figures in its summary, under `costs/`.

    Args:
        latencies: by name of the image tower, of models measured before: the same tower is measured once.
            What is measured is added.

    Attributes:
        costs: parameters, latency, and bytes of cached features; empty before the end.
    """

    def __init__(self, latencies: dict[str, dict[str, Any]]) -> None:
        self.latencies = latencies
        self.costs: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model of which no rank has all.

        Raises:
            UserError: it is sharded.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError("--trainer.strategy fsdp: compare-backbones measures whole models; give ddp")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, and tell W&B."""
        if not trainer.is_global_zero:
            return
        clip: CLIP = pl_module.clip
        tower = clip.image_tower.spec["name"]
        if tower not in self.latencies:
            self.latencies[tower] = image_latency(clip)
        self.costs = {
            **parameter_counts(clip),
            **self.latencies[tower],
            **_feature_bytes(clip, getattr(trainer, "datamodule", None)),
        }
        spent = pl_module.stopwatch.seconds
        summary = self.costs | {"training_seconds": round(sum(spent.values()) - spent["preparation"], 1)}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update({f"costs/{name}": value for name, value in summary.items()})


def _feature_bytes(clip: CLIP, data: Any) -> dict[str, int]:
    """Of all cached features that the run used, and of one view of one picture."""
    entries = data.cache.used() if getattr(data, "cache", None) is not None else []
    if not entries:
        return {}
    each = _bytes_per_picture(clip) if clip.image_tower.frozen else {}
    return {"feature_bytes": sum(entry.bytes for entry in entries), **each}


def frozen_features(clip: CLIP, options: Mapping[str, Any]) -> dict[str, int]:
    """`feature_bytes_per_picture` of a model that was trained with these options, if features were cached."""
    adapted = any(value is not None for name, value in options.items() if name.startswith("model.lora"))
    frozen = options.get("model.freeze") in ("image", "both") and not adapted
    cached = frozen and options.get("data.cache") != "off"
    return _bytes_per_picture(clip) if cached else {}


def _bytes_per_picture(clip: CLIP) -> dict[str, int]:
    return {"feature_bytes_per_picture": clip.image_tower.width * np.dtype(DTYPE).itemsize}
