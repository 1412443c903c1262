"""Uploads data and logs models as W&B artifacts, and records the data that a run uses."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_lightning.errors import UserError, reason_of
from clip_lightning.run_folder import RunFolder
from clip_lightning.wandb_fetch import PART, SERVER_SECONDS, ArtifactName, why_unreachable

DATA_TYPE, MODEL_TYPE, CHECKPOINT_TYPE = "dataset", "model", "checkpoint"
REGISTRY = rf"(?:{PART}/)?{PART}/{PART}"
SERVER_TRIES = 3


def check_upload(name: str) -> None:
    """Check the login and the name before the data are read."""
    if reason := why_unreachable():
        raise UserError(f"data cannot be uploaded: {reason}")
    check_name("--artifact", name)


def check_name(
    option: str, name: str | None, pattern: str = PART, expected: str = "letters, digits, _, - and . only"
) -> None:
    """Check a name for W&B, if it is given."""
    if name is not None and not re.fullmatch(pattern, name):
        raise UserError(f"{option} {name!r}: expected {expected}")


def upload_data(
    name: str, root: Path, *, project: str, entity: str | None, by_reference: bool, metadata: dict[str, Any]
) -> str:
    """Log a folder, or references to its files, in a run of its own; return `ENTITY/PROJECT/NAME:vN`."""
    import wandb

    artifact = wandb.Artifact(name, DATA_TYPE, metadata=metadata)
    try:
        if by_reference:
            artifact.add_reference(root.resolve().as_uri(), max_objects=100_000_000)
        else:
            artifact.add_dir(str(root), policy="immutable", skip_cache=True)
        with wandb.init(project=project, entity=entity, job_type="upload-data") as run:
            return str(run.log_artifact(artifact).wait().source_qualified_name)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"W&B rejected the data ({reason_of(error)})") from error


def use_data(run: Any, data: ArtifactName) -> None:
    """Record the version of the data that the run trains on, in the lineage of the run.

    An offline run stores a draft artifact with the same content, which the server recognizes at `wandb
    sync`. This requires the same entity and project; otherwise the data would be uploaded there.
    """
    import wandb

    if not run.offline:
        run.use_artifact(str(data))
        return
    about = data.about()
    same_entity = run.entity == data.entity if run.entity else about.get("own", False)
    if run.project != data.project or not same_entity:
        return
    draft = wandb.Artifact(data.name, about["type"], metadata=about["metadata"])
    draft.add_dir(str(data.folder), policy="immutable", skip_cache=True)
    if draft.digest == about["digest"]:  # else the files are references, or were changed
        # the public `use_artifact` does not work offline, although it needs no server
        run._log_artifact(draft, aliases=[], is_user_created=True, use_after_commit=True)


def why_not_best(run: Any, metadata: Mapping[str, Any], shared_name: str | None) -> str | None:
    """Return why a run's model must not get the alias `best`, or None if it gets the alias.

    `shared_name` is the name of the model's artifact if other runs may log models under it, too.
    """
    if "rsum" not in metadata:
        return "no epoch was validated"
    if shared_name is None:
        return None
    if run.offline:
        return "the run is offline, so its score cannot be compared with that of the present best"
    import wandb

    api = wandb.Api(timeout=SERVER_SECONDS)
    name = f"{run.entity}/{run.project}/{shared_name}:best"
    present = api.artifact(name).metadata if api.artifact_exists(name, type=MODEL_TYPE) else {}
    if present.get("rsum") is None:
        return None
    if present.get("data_digest") != metadata.get("data_digest"):
        return "the present best was validated on other data, so their scores cannot be compared"
    if present["rsum"] > metadata["rsum"]:
        return f"its rsum is {metadata['rsum']:.1f}, and that of the present best is {present['rsum']:.1f}"
    return None


def log_model(run: Any, folder: RunFolder, *, name: str, metadata: Mapping[str, Any], is_best: bool) -> Any:
    """Log and return a run's bundle as `NAME`, and log its last checkpoint as `NAME-checkpoint:last`."""
    aliases = ["best", "latest"] if is_best else ["latest"]
    is_bundle = folder.model.is_dir()
    logged = _log(run, name, MODEL_TYPE, folder.model, metadata, aliases) if is_bundle else None
    if folder.last.is_file():
        _log(run, f"{name}-checkpoint", CHECKPOINT_TYPE, folder.last, metadata, ["last", "latest"])
    return logged


def _log(run: Any, name: str, kind: str, path: Path, metadata: Mapping[str, Any], aliases: list[str]) -> Any:
    """Log a copy of a file or folder; online, wait, since the SDK silently drops it after an outage."""
    import wandb

    for attempt in range(1, SERVER_TRIES + 1):
        artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
        add: Any = artifact.add_dir if path.is_dir() else artifact.add_file
        add(str(path), skip_cache=True)
        try:
            logged = run.log_artifact(artifact, aliases=aliases)
            return logged if run.offline else logged.wait()
        except Exception:  # the SDK raises a dozen types
            if attempt == SERVER_TRIES:
                raise
            time.sleep(SERVER_SECONDS)
