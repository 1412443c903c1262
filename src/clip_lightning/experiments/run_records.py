"""Finished runs as records that can be compared: read from their folders, or from a W&B project."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clip_lightning.errors import UserError

RECALLS = tuple(f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10))
METRICS = ("rsum", *RECALLS)
COSTS = (
    "parameters",
    "parameters_trained",
    "image_latency_ms",
    "training_seconds",
    "feature_bytes_per_picture",
    "feature_bytes",
)
COSTS_FILE = "costs.json"
MOST_EPOCHS = 10_000  # of more, W&B would give a sample
DEEPEST = 4  # folders between the one that is given and a run: comparison/runs/pair/run


@dataclass(frozen=True)
class RunRecord:
    """What a comparison knows of one run.

    Attributes:
        place: its folder, or `wandb:ENTITY/PROJECT/ID`.
        image_tower: its full name, as in `--model.image_tower`.
        text_tower: likewise.
        values: those of `METRICS` (percent) and `COSTS` that are known; the best epoch's.
        options: the whole configuration, by dotted names.
        data_digest: of the data and its splits; empty if unknown.
        latency_conditions: what the latency was measured with; empty if it was not.
        unfinished: `interrupted`, or how W&B calls its state; empty if it came to its end, or nobody knows.
    """

    place: str
    image_tower: str
    text_tower: str
    values: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    latency_conditions: str = ""
    unfinished: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A run that cannot be compared, and why."""

    place: str
    reason: str


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration by dotted names; a class by its own name, its arguments as if they were options.

    {"loss": {"class_path": "a.SigLIP", "init_args": {"x": 1}}} → {"loss": "SigLIP", "loss.x": 1}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
            found[name] = value["class_path"].rpartition(".")[2]
            found |= flat(value.get("init_args") or {}, name)
        elif isinstance(value, Mapping):
            found |= flat(value, name)
        else:
            found[name] = value
    return found


def make_folder(out: Path) -> Path:
    """The folder for a comparison, made where it is not there yet.

    Raises:
        UserError: it cannot be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}); give another folder") from error
    return out


def run_folders(place: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """The run that the folder is, or the runs in it, in the order of their names."""
    if (place / "config.yaml").is_file():
        yield place
    elif depth and place.is_dir():
        for child in sorted(place.iterdir()):
            yield from run_folders(child, depth - 1)


def read_folders(places: Path | Iterable[Path]) -> list[RunRecord | LeftOut]:
    """Read every run that is a given folder, or in one, once.

    Raises:
        UserError: a folder that is not there, or without a run.
    """
    folders: dict[Path, Path] = {}
    for place in [places] if isinstance(places, Path) else places:
        found = list(run_folders(place))
        if not found:
            wrong = "holds no run" if place.is_dir() else "is no folder"
            raise UserError(
                f"{place} {wrong}; give the folder of a run (it has config.yaml and metrics.json), a folder "
                "of such folders, or wandb:ENTITY/PROJECT"
            )
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return [read_folder(folder) for folder in folders.values()]


def read_folder(folder: Path) -> RunRecord | LeftOut:
    """One run as it lies on disk."""
    place = str(folder)
    if not (folder / "metrics.json").is_file():
        return LeftOut(place, "it has no metrics.json: the run has not got as far as its end")
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        config = yaml.safe_load((folder / "config.yaml").read_text())
        costs = _json_or_nothing(folder / COSTS_FILE)
        bundle = _json_or_nothing(folder / "model" / "config.json")
        values = metrics | costs
        if "seconds" in metrics:
            values["training_seconds"] = metrics["seconds"] - metrics.get("seconds_preparation", 0)
        towers = [(bundle.get(kind) or {}).get("name") or "" for kind in ("image_tower", "text_tower")]
        # earlier versions did not note whether it finished
        state = "" if metrics.get("finished", True) else "interrupted"
        return _record(place, values, config, metrics.get("data_digest", ""), towers, state)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        return LeftOut(place, f"its files cannot be read ({' '.join(str(error).split())})")


def _json_or_nothing(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _record(
    place: str,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    digest: str,
    towers: list[str],
    unfinished: str,
) -> RunRecord | LeftOut:
    """A record of what was found, or why there is none."""
    if "rsum" not in values:
        return LeftOut(place, "it has no recalls: no validation was finished")
    options = flat(config)
    image_tower, text_tower = (
        name or str(options.get(f"model.{kind}") or options.get("model.init_from") or "unknown")
        for name, kind in zip(towers, ("image_tower", "text_tower"), strict=True)
    )
    known = {name: float(values[name]) for name in (*METRICS, *COSTS) if values.get(name) is not None}
    conditions = str(values.get("image_latency_conditions", ""))
    return RunRecord(place, image_tower, text_tower, known, options, digest, conditions, unfinished)


def read_wandb(place: str, group: str | None = None) -> list[RunRecord | LeftOut]:
    """The runs of a W&B project, or one of them.

    Args:
        place: `wandb:ENTITY/PROJECT` or `wandb:ENTITY/PROJECT/RUN_ID`.
        group: only runs of this group.

    Raises:
        UserError: no such project or run, no key, or the server cannot be reached.
    """
    path = place.removeprefix("wandb:").strip("/")
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{place}: expected wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/RUN_ID")
    import wandb

    from clip_lightning.wandb_fetch import has_api_key

    if not has_api_key():
        raise UserError(f"{place}: no W&B key is configured; run `wandb login`, or give the runs' folders")
    try:
        api = wandb.Api()
        if len(parts) == 3:
            runs = [api.run(path)]
        else:
            runs = list(api.runs(path, filters={"group": group} if group else {}, lazy=False))
        records = [_wandb_record(run) for run in runs]
    except (wandb.Error, ValueError) as error:  # ValueError: no such project
        raise UserError(f"{place} could not be read from W&B: {error}") from error
    if not records:
        raise UserError(f"{place} has no run{f' in group {group!r}' if group else ''}")
    return records


def _wandb_record(run: Any) -> RunRecord | LeftOut:
    """A run of W&B's public API; its best epoch is looked for in the history."""
    place = "wandb:" + "/".join(run.path)
    epochs = run.history(keys=[f"val/{name}" for name in METRICS], samples=MOST_EPOCHS, pandas=False)
    best: dict[str, Any] = max(epochs, key=lambda row: row["val/rsum"], default={})
    values = {name.removeprefix("val/"): value for name, value in best.items()}
    for name in (*COSTS, "image_latency_conditions"):
        values[name] = run.summary.get(f"costs/{name}")
    state = "" if run.state == "finished" else run.state
    return _record(place, values, run.config, run.config.get("data_digest", ""), ["", ""], state)
