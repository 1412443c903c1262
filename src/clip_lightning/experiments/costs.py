"""Measures the costs of a trained model: parameters, image latency, and bytes of its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.benchmark import Timer

from clip_lightning.data.features import DTYPE
from clip_lightning.experiments.run_records import RunRecord
from clip_lightning.model.clip import CLIP, parameter_counts
from clip_lightning.run_folder import RunFolder


@torch.inference_mode()
def image_latency(clip: CLIP) -> dict[str, Any]:
    """Measure the median time from the pixels of one image to its embedding, on the present device."""
    device, dtype = clip.logit_scale.device, next(clip.image_tower.parameters()).dtype
    pixels = torch.zeros(1, 3, *clip.transform.size, dtype=torch.uint8, device=device)
    was_training = clip.training
    clip.eval()
    given = {"clip": clip, "pixels": pixels}
    timer = Timer("clip.encode_image(pixels).cpu()", globals=given, num_threads=torch.get_num_threads())
    median = timer.blocked_autorange(min_run_time=1.0).median
    clip.train(was_training)
    place = f"CPU with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else place
    precision = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    return {
        "image_latency_ms": round(1000 * median, 3),
        "image_latency_conditions": f"one image, {precision}, {place}",
    }


class CostRecorder(Callback):
    """Measures `costs` at the end of training, and adds them to the W&B summary under `costs/`."""

    def __init__(self, latencies: dict[str, dict[str, Any]]) -> None:
        self.latencies = latencies  # by the name of the image tower, so that each is measured once
        self.costs: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model, and log the costs to W&B."""
        clip: CLIP = pl_module.clip
        tower = clip.image_tower.spec["name"]
        if tower not in self.latencies:
            self.latencies[tower] = image_latency(clip)
        self.costs = parameter_counts(clip) | self.latencies[tower]
        cache = getattr(trainer, "datamodule").cache  # noqa: B009, Lightning does not declare it
        if used := cache.used() if cache else []:
            self.costs["feature_bytes"] = sum(entry.bytes for entry in used)
            if clip.image_tower.frozen:
                self.costs["feature_bytes_per_picture"] = clip.image_tower.width * np.dtype(DTYPE).itemsize
        spent = pl_module.stopwatch.seconds
        summary = self.costs | {"training_seconds": round(sum(spent.values()) - spent["preparation"], 1)}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update({f"costs/{name}": value for name, value in summary.items()})


def add_latencies(records: Sequence[RunRecord]) -> None:
    """Measure the image latency of the runs that have none, with their bundles."""
    latencies: dict[Any, dict[str, Any]] = {}
    for record in records:
        bundle = RunFolder(Path(record.place)).model
        if "image_latency_ms" in record.values or not (bundle / "model.safetensors").is_file():
            continue
        clip = CLIP.from_pretrained(bundle).to("cuda" if torch.cuda.is_available() else "cpu")
        tower = clip.image_tower.spec["name"], clip.transform.size
        if tower not in latencies:
            latencies[tower] = image_latency(clip)
        record.values["image_latency_ms"] = latencies[tower]["image_latency_ms"]
        record.latency_conditions = latencies[tower]["image_latency_conditions"]
