"""Reads the results of runs from their folders or from a W&B project, and measures the costs of models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.benchmark import Timer

from clip_lightning.arguments import flat
from clip_lightning.data.features import DTYPE
from clip_lightning.errors import UserError, as_user_error
from clip_lightning.evaluation.metrics import METRICS, RECALLS
from clip_lightning.model.clip import CLIP, parameter_counts
from clip_lightning.model.encode import best_device
from clip_lightning.run_folder import RunFolder
from clip_lightning.wandb_fetch import has_api_key

COSTS = {
    "parameters": "parameters",
    "parameters_trained": "trained",
    "image_latency_ms": "image latency, ms",
    "training_seconds": "training, s",
    "feature_bytes_per_picture": "features of an image",
    "feature_bytes": "features in all",
}
VALUES = {name: METRICS[name] for name in ("rsum", *RECALLS)} | COSTS
"""The titles of the values that are compared, by their names in `metrics.json`."""
COSTS_FILE = "costs.json"
MAX_EPOCHS = 10_000  # W&B would return a sample of more epochs
MAX_DEPTH = 4  # levels from a given folder to a run: comparison/runs/pair/run
KINDS = ("image_tower", "text_tower")


@dataclass
class RunRecord:
    """Holds the results of one run."""

    place: str  # the run's folder, or wandb:ENTITY/PROJECT/ID
    towers: tuple[str, str]  # full names of the image tower and the text tower
    values: dict[str, float]  # the known values of `VALUES`, of the best epoch
    options: Mapping[str, Any] = field(default_factory=dict)  # the complete configuration, by dotted names
    data_digest: str = ""  # of the data and its splits
    latency_conditions: str = ""
    unfinished: str = ""  # `interrupted`, or the state in W&B; empty if the run finished


def run_folders(place: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield the folder if it is that of a run, else the runs in it, sorted by name."""
    if RunFolder(place).config.is_file():
        yield place
    elif depth and place.is_dir():
        for child in sorted(place.iterdir()):
            yield from run_folders(child, depth - 1)


def read_runs(places: Sequence[str], group: str | None) -> tuple[list[RunRecord], dict[str, str]]:
    """Read every run in the given places once: folders, or runs of W&B, by default of all groups.

    Return the runs, and the reason by the place of each run without results.
    """
    runs: dict[str, Any] = {}
    for place in places:
        if place.startswith("wandb:"):
            found = {"wandb:" + "/".join(run.path): run for run in _wandb_runs(place, group)}
        else:
            found = {str(folder.resolve()): folder for folder in run_folders(Path(place))}
        if not found:
            raise UserError(f"{place} contains no run; give folders of runs, or wandb:ENTITY/PROJECT")
        runs |= found
    records, left_out = [], {}
    for name, run in runs.items():
        try:
            # one damaged run must not end the comparison of the others
            with as_user_error("its results cannot be read", "repair or remove it"):
                records.append(read_folder(run) if isinstance(run, Path) else _read_wandb(name, run))
        except UserError as error:
            left_out[str(run) if isinstance(run, Path) else name] = str(error)
    return records, left_out


def read_folder(folder: Path) -> RunRecord:
    """Read a run from its folder; raise a UserError if it has no results."""
    run, costs = RunFolder(folder), folder / COSTS_FILE
    if not run.metrics.is_file():
        raise UserError("it has no results, as it has just begun or ended before its first validation")
    values = json.loads(run.metrics.read_text())
    options = flat(yaml.safe_load(run.config.read_text()))
    values |= json.loads(costs.read_text()) if costs.is_file() else {}
    if run.model.is_dir():  # whose towers have full names
        bundle = json.loads((run.model / "config.json").read_text())
        options |= {f"model.{kind}": bundle[kind]["name"] for kind in KINDS}
    if "seconds" in values:
        values["training_seconds"] = values["seconds"] - values.get("seconds_preparation", 0)
    # earlier versions did not store whether the run finished
    return _record(str(folder), values, options, "" if values.get("finished", True) else "interrupted")


def _record(place: str, values: dict[str, Any], options: dict[str, Any], unfinished: str) -> RunRecord:
    if "rsum" not in values:
        raise UserError("it has no recalls, since no validation has finished")
    options["model.loss"] = options.get("model.loss") or "InfoNCE"  # null is the default
    unnamed = options.get("model.init_from") or "unknown"
    image, text = (str(options.get(f"model.{kind}") or unnamed) for kind in KINDS)
    known = {name: values[name] for name in VALUES if isinstance(values.get(name), int | float)}
    conditions = values.get("image_latency_conditions") or ""
    digest = values.get("data_digest") or ""
    return RunRecord(place, (image, text), known, options, digest, conditions, unfinished)


def _wandb_runs(place: str, group: str | None) -> list[Any]:
    """Return the runs of a W&B project, or one of them."""
    if not re.fullmatch(r"wandb:[^/]+/[^/]+(/[^/]+)?", place):
        raise UserError(f"{place}: expected wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/RUN_ID")
    if not has_api_key():
        raise UserError(f"{place}: no W&B API key is configured; run `wandb login`, or give folders of runs")
    import wandb

    path, filters = place.removeprefix("wandb:"), {"group": group} if group else {}
    with as_user_error(f"{place} cannot be read from W&B", "check the name and the network"):
        api = wandb.Api()
        return [api.run(path)] if path.count("/") == 2 else list(api.runs(path, filters=filters, lazy=False))


def _read_wandb(place: str, run: Any) -> RunRecord:
    """Read a run of W&B's public API, with the best epoch of its history."""
    logged = [f"val/{name}" for name in ("rsum", *RECALLS)]
    epochs = run.history(keys=logged, samples=MAX_EPOCHS, pandas=False)
    best: dict[str, Any] = max(epochs, key=lambda row: row["val/rsum"], default={})
    values = {name.removeprefix("val/"): value for name, value in best.items()}
    values |= {name: run.summary.get(f"costs/{name}") for name in (*COSTS, "image_latency_conditions")}
    values["data_digest"] = run.config.get("data_digest")
    return _record(place, values, flat(run.config), "" if run.state == "finished" else run.state)


_latencies: dict[Any, dict[str, Any]] = {}  # by image tower, each of which is measured once


@torch.inference_mode()
def image_latency(clip: CLIP) -> dict[str, Any]:
    """Measure the median time from the pixels of one image to its embedding, on the present device."""
    device, dtype = clip.logit_scale.device, next(clip.image_tower.parameters()).dtype
    tower = clip.image_tower.spec["name"], clip.transform.size, device, dtype
    if tower in _latencies:
        return _latencies[tower]
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
    conditions = f"one image, {precision}, {place}"
    measured = {"image_latency_ms": round(1000 * median, 3), "image_latency_conditions": conditions}
    return _latencies.setdefault(tower, measured)


class CostRecorder(Callback):
    """Measures `costs` at the end of training, and adds them to the W&B summary under `costs/`."""

    def __init__(self) -> None:
        self.costs: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model, and log the costs to W&B."""
        clip: CLIP = pl_module.clip
        self.costs = parameter_counts(clip) | image_latency(clip)
        cache = trainer.datamodule.cache
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
    for record in records:
        bundle = RunFolder(Path(record.place)).model
        if "image_latency_ms" not in record.values and (bundle / "model.safetensors").is_file():
            measured = image_latency(CLIP.from_pretrained(bundle).to(best_device()))
            record.values["image_latency_ms"] = measured["image_latency_ms"]
            record.latency_conditions = measured["image_latency_conditions"]
