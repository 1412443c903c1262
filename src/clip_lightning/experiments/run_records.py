"""Reads the results of runs from their folders or from a W&B project."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from clip_lightning.arguments import flat
from clip_lightning.errors import UserError
from clip_lightning.evaluation.metrics import METRICS
from clip_lightning.run_folder import RunFolder

RECALLS = tuple(name for name in METRICS if "_R@" in name)
COSTS = {
    "parameters": "parameters",
    "parameters_trained": "trained",
    "image_latency_ms": "image latency, ms",
    "training_seconds": "training, s",
    "feature_bytes_per_picture": "features of an image",
    "feature_bytes": "features in all",
}
VALUES = {name: METRICS[name].title for name in ("rsum", *RECALLS)} | COSTS
"""The titles of the values that are compared, by their names in `metrics.json`."""
COSTS_FILE = "costs.json"
MAX_EPOCHS = 10_000  # W&B would return a sample of more epochs
MAX_DEPTH = 4  # levels from a given folder to a run: comparison/runs/pair/run


@dataclass(frozen=True)
class RunRecord:
    """Holds the results of one run.

    Attributes:
        place: the run's folder, or `wandb:ENTITY/PROJECT/ID`.
        towers: full names of the image tower and the text tower.
        values: the known values of `VALUES`, of the best epoch.
        options: the complete configuration, by dotted names.
        data_digest: digest of the data and its splits; empty if unknown.
        latency_conditions: conditions under which the latency was measured; empty if it was not measured.
        unfinished: `interrupted`, or the state in W&B; empty if the run finished or its state is unknown.
    """

    place: str
    towers: tuple[str, str]
    values: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    latency_conditions: str = ""
    unfinished: str = ""


def run_folders(place: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield the folder if it is that of a run, else the runs in it, sorted by name."""
    if RunFolder(place).config.is_file():
        yield place
    elif depth and place.is_dir():
        for child in sorted(place.iterdir()):
            yield from run_folders(child, depth - 1)


def read_runs(places: Sequence[str], group: str | None) -> tuple[list[RunRecord], dict[str, str]]:
    """Read every run in the given places once.

    Args:
        places: folders of runs, folders of such folders, `wandb:ENTITY/PROJECT` or
            `wandb:ENTITY/PROJECT/RUN_ID`.
        group: the W&B group whose runs are read; by default all.

    Returns:
        The runs, and the reason by the place of each run without results.

    Raises:
        UserError: a place does not exist, or contains no run.
    """
    readers: dict[Any, tuple[str, partial[RunRecord]]] = {}
    for place in places:
        if place.startswith("wandb:"):
            for run in _wandb_runs(place, group):
                name = "wandb:" + "/".join(run.path)
                readers[name] = name, partial(_read_wandb, name, run)
            continue
        folders = list(run_folders(Path(place)))
        if not folders:
            raise UserError(
                f"{place} {'contains no run' if Path(place).is_dir() else 'is not a folder'}; give the "
                "folder of a run (with config.yaml and metrics.json) or of runs, or wandb:ENTITY/PROJECT"
            )
        for folder in folders:
            readers[folder.resolve()] = str(folder), partial(read_folder, folder)
    records, left_out = [], {}
    for name, read in readers.values():
        try:
            records.append(read())
        except UserError as error:
            left_out[name] = str(error)
    return records, left_out


def read_folder(folder: Path) -> RunRecord:
    """Read a run from its folder.

    Raises:
        UserError: the run has no results.
    """
    run = RunFolder(folder)
    if not run.metrics.is_file():
        raise UserError("it has no metrics.json, since the run has not ended")
    try:
        metrics = json.loads(run.metrics.read_text())
        config = yaml.safe_load(run.config.read_text())
        costs, bundle = (
            json.loads(file.read_text()) if file.is_file() else {}
            for file in (folder / COSTS_FILE, run.model / "config.json")
        )
        if "seconds" in metrics:
            metrics["training_seconds"] = metrics["seconds"] - metrics.get("seconds_preparation", 0)
        towers = {kind: bundle[kind]["name"] for kind in ("image_tower", "text_tower") if bundle}
        # earlier versions did not store whether the run finished
        state = "" if metrics.get("finished", True) else "interrupted"
        digest = metrics.get("data_digest", "")
        return _record(str(folder), {**metrics, **costs}, config, digest, towers, state)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, yaml.YAMLError) as error:
        raise UserError(f"its files cannot be read ({' '.join(str(error).split())})") from error


def _record(
    place: str,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    digest: str,
    towers: Mapping[str, str],
    unfinished: str,
) -> RunRecord:
    if "rsum" not in values:
        raise UserError("it has no recalls, since no validation has finished")
    options = flat(config)
    options["model.loss"] = options.get("model.loss") or "InfoNCE"  # null is the default
    image, text = (
        towers.get(kind) or str(options.get(f"model.{kind}") or options.get("model.init_from") or "unknown")
        for kind in ("image_tower", "text_tower")
    )
    known = {name: float(values[name]) for name in VALUES if values.get(name) is not None}
    conditions = str(values.get("image_latency_conditions") or "")
    return RunRecord(place, (image, text), known, options, digest, conditions, unfinished)


def _wandb_runs(place: str, group: str | None) -> list[Any]:
    """Return the runs of a W&B project, or one of them."""
    path = place.removeprefix("wandb:").strip("/")
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{place}: expected wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/RUN_ID")
    import wandb

    from clip_lightning.wandb_fetch import has_api_key

    if not has_api_key():
        raise UserError(f"{place}: no W&B API key is configured; run `wandb login`, or give folders of runs")
    try:
        api = wandb.Api()
        if len(parts) == 3:
            return [api.run(path)]
        runs = list(api.runs(path, filters={"group": group} if group else {}, lazy=False))
    except (wandb.Error, ValueError) as error:  # ValueError: no such project
        raise UserError(f"{place} cannot be read from W&B: {error}") from error
    if not runs:
        raise UserError(f"{place} has no run{f' in group {group!r}' if group else ''}")
    return runs


def _read_wandb(place: str, run: Any) -> RunRecord:
    """Read a run of W&B's public API, with the best epoch of its history."""
    import wandb

    logged = [f"val/{name}" for name in ("rsum", *RECALLS)]
    try:
        epochs = run.history(keys=logged, samples=MAX_EPOCHS, pandas=False)
    except wandb.Error as error:
        raise UserError(f"its history cannot be read from W&B: {error}") from error
    best: dict[str, Any] = max(epochs, key=lambda row: row["val/rsum"], default={})
    values = {name.removeprefix("val/"): value for name, value in best.items()}
    values |= {name: run.summary.get(f"costs/{name}") for name in (*COSTS, "image_latency_conditions")}
    state = "" if run.state == "finished" else run.state
    return _record(place, values, run.config, run.config.get("data_digest", ""), {}, state)
