"""Measures the costs of a trained model: parameters, image latency, and bytes of its features."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from clip_lightning.data.features import DTYPE
from clip_lightning.experiments.run_records import RunRecord
from clip_lightning.model.clip import CLIP, parameter_counts
from clip_lightning.run_folder import RunFolder

WARM_UP, SECONDS = 3, 1.0


@torch.inference_mode()
def image_latency(clip: CLIP) -> dict[str, Any]:
    """Measure the time from the pixels of one image to its embedding, on the present device and precision.

    Returns:
        `image_latency_ms`, the median of at least five runs after a warm-up, and `image_latency_conditions`.
    """
    device, dtype = clip.logit_scale.device, next(clip.image_tower.parameters()).dtype
    pixels = torch.zeros(1, 3, *clip.transform.size, dtype=torch.uint8, device=device)
    was_training = clip.training
    clip.eval()
    seconds: list[float] = []
    while len(seconds) < WARM_UP + 5 or sum(seconds) < SECONDS:
        began = time.perf_counter()
        clip.encode_image(pixels).cpu()  # waits for a GPU to finish
        seconds.append(time.perf_counter() - began)
    clip.train(was_training)
    place = f"CPU with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else place
    precision = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    return {
        "image_latency_ms": round(1000 * statistics.median(seconds[WARM_UP:]), 3),
        "image_latency_conditions": f"one image, {precision}, {place}",
    }


def _bytes_per_image(clip: CLIP) -> dict[str, int]:
    return {"feature_bytes_per_picture": clip.image_tower.width * np.dtype(DTYPE).itemsize}


class CostRecorder(Callback):
    """Measures the model at the end of training, and adds the costs to the W&B summary under `costs/`.

    Args:
        latencies: the latencies by the name of the image tower, so that each tower is measured once; new ones
            are added.

    Attributes:
        costs: parameters, latency, and bytes of cached features; empty before the end of training.
    """

    def __init__(self, latencies: dict[str, dict[str, Any]]) -> None:
        self.latencies = latencies
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
            self.costs |= _bytes_per_image(clip) if clip.image_tower.frozen else {}
        spent = pl_module.stopwatch.seconds
        summary = self.costs | {"training_seconds": round(sum(spent.values()) - spent["preparation"], 1)}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update({f"costs/{name}": value for name, value in summary.items()})


def with_costs(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Add latency, parameters and bytes of features to records that lack them, from their bundles."""
    latencies: dict[str, dict[str, Any]] = {}
    complete = []
    for record in records:
        bundle = RunFolder(Path(record.place)).model
        if "image_latency_ms" not in record.values and (bundle / "model.safetensors").is_file():
            clip = CLIP.from_pretrained(bundle).to("cuda" if torch.cuda.is_available() else "cpu")
            tower = json.dumps([clip.image_tower.spec, clip.transform.as_dict()], sort_keys=True)
            measured = latencies[tower] = latencies.get(tower) or image_latency(clip)
            # a bundle does not contain the number of trained parameters
            values = {"parameters": parameter_counts(clip)["parameters"], **record.values}
            options = {name: value for name, value in record.options.items() if value is not None}
            adapted = any(name.startswith("model.lora") for name in options)
            frozen = options.get("model.freeze") in ("image", "both") and not adapted
            values |= _bytes_per_image(clip) if frozen and options.get("data.cache") != "off" else {}
            values["image_latency_ms"] = measured["image_latency_ms"]
            conditions = measured["image_latency_conditions"]
            record = replace(record, values=values, latency_conditions=conditions)
        complete.append(record)
    return complete
