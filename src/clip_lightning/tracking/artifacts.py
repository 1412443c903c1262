"""Uploads data and logs models as W&B artifacts, and records the data that a run uses."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_lightning.errors import UserError
from clip_lightning.run_folder import RunFolder
from clip_lightning.wandb_fetch import PART, SERVER_SECONDS, Fetched, record_of, why_unreachable

DATA_TYPE, MODEL_TYPE, CHECKPOINT_TYPE = "dataset", "model", "checkpoint"
SERVER_TRIES = 3


def check_upload(name: str) -> None:
    """Check the login and the name before the data are read.

    Raises:
        UserError: no API key is configured, or the name is not a valid artifact name.
    """
    if reason := why_unreachable():
        raise UserError(f"data cannot be uploaded: {reason}")
    if not re.fullmatch(PART, name):
        raise UserError(f"--artifact {name!r}: expected letters, digits, _, - and . only")


def check_names(model_name: str | None, link_to: str | None) -> None:
    """Check the names before hours of training.

    Raises:
        UserError: W&B does not accept a name.
    """
    if model_name is not None and not re.fullmatch(PART, model_name):
        raise UserError(
            f"--trainer.logger.model_name {model_name!r}: expected letters, digits, _, - and . only"
        )
    if link_to is not None and not re.fullmatch(rf"(?:{PART}/)?{PART}/{PART}", link_to):
        raise UserError(f"--trainer.logger.link_to {link_to!r}: expected wandb-registry-REGISTRY/COLLECTION")


def upload_data(
    name: str,
    root: Path,
    *,
    project: str,
    entity: str | None,
    by_reference: bool,
    metadata: Mapping[str, Any],
) -> str:
    """Log a folder as a data artifact, in a W&B run of its own.

    Args:
        name: the name of the artifact within the project.
        root: the folder, whose layout is kept.
        project: the W&B project.
        entity: the W&B user or team; by default yours.
        by_reference: whether W&B stores only the URLs of the files and their checksums.
        metadata: digest, counts and other metadata of the data.

    Returns:
        `ENTITY/PROJECT/NAME:vN`.

    Raises:
        UserError: no API key is configured, or the server rejected the upload.
    """
    import wandb

    check_upload(name)
    artifact = wandb.Artifact(name, DATA_TYPE, metadata=dict(metadata))
    try:
        if by_reference:
            artifact.add_reference(root.resolve().as_uri(), max_objects=100_000_000)
        else:
            artifact.add_dir(str(root), policy="immutable", skip_cache=True)
        with wandb.init(project=project, entity=entity, job_type="upload-data") as run:
            return str(run.log_artifact(artifact).wait().source_qualified_name)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"W&B rejected the data ({' '.join(str(error).split())})") from error


def use_data(run: Any, data: Fetched) -> None:
    """Record the version of the data that the run trains on, in the lineage of the run.

    An offline run stores a draft artifact with the same content, which the server recognizes at `wandb
    sync`. This requires the same entity and project; otherwise the data would be uploaded there.
    """
    import wandb

    if not run.offline:
        run.use_artifact(str(data.name))
        return
    about = json.loads(record_of(data.name).read_text())
    same_entity = run.entity == data.name.entity if run.entity else about.get("own", False)
    if run.project != data.name.project or not same_entity:
        return
    draft = wandb.Artifact(data.name.name, about["type"], metadata=about["metadata"])
    draft.add_dir(str(data.folder), policy="immutable", skip_cache=True)
    if draft.digest == about["digest"]:  # else the files are references, or were changed
        # the public `use_artifact` does not work offline, although it needs no server
        run._log_artifact(draft, aliases=[], is_user_created=True, use_after_commit=True)


def why_not_best(run: Any, metadata: Mapping[str, Any], shared_name: str | None) -> str | None:
    """Return why a run's model must not get the alias `best`, or None if it gets the alias.

    Args:
        run: the W&B run.
        metadata: the metadata of the model, with the metrics of its best epoch.
        shared_name: the name of the model's artifact if other runs may log models under it, too.
    """
    if "rsum" not in metadata:
        return "no epoch was validated"
    if shared_name is None:
        return None
    if run.offline:
        return "the run is offline, so its score cannot be compared with that of the present best"
    import wandb

    api = wandb.Api(timeout=SERVER_SECONDS)
    best = f"{run.entity}/{run.project}/{shared_name}:best"
    if not api.artifact_exists(best, type=MODEL_TYPE):
        return None
    present = api.artifact(best, type=MODEL_TYPE).metadata
    if present.get("rsum") is None:
        return None
    if present.get("data_digest") != metadata.get("data_digest"):
        return "the present best was validated on other data, so their scores cannot be compared"
    if present["rsum"] > metadata["rsum"]:
        return f"its rsum is {metadata['rsum']:.1f}, and that of the present best is {present['rsum']:.1f}"
    return None


def log_model(run: Any, folder: Path, *, name: str, metadata: Mapping[str, Any], is_best: bool) -> Any:
    """Log a run's bundle as `NAME`, and its last checkpoint as `NAME-checkpoint:last`, if they exist.

    Args:
        run: the W&B run.
        folder: the run's folder, with `model/` and `checkpoints/last.ckpt`.
        name: the name of the model's artifact.
        metadata: metrics, towers and data.
        is_best: whether the bundle gets the alias `best`.

    Returns:
        The bundle's artifact, or None if there is no bundle.
    """
    bundle, checkpoint = RunFolder(folder).model, RunFolder(folder).last
    logged = None
    if bundle.is_dir():
        files = _pinned(sorted(bundle.iterdir()), bundle, folder)
        logged = _log(run, name, MODEL_TYPE, files, metadata, ["best", "latest"] if is_best else ["latest"])
    if checkpoint.is_file():
        files = _pinned([checkpoint], checkpoint.parent, folder)
        _log(run, f"{name}-checkpoint", CHECKPOINT_TYPE, files, metadata, ["last", "latest"])
    return logged


def _log(run: Any, name: str, kind: str, files: Path, metadata: Mapping[str, Any], aliases: list[str]) -> Any:
    """Log a folder; online, wait until it is uploaded, since the SDK silently drops it after an outage.

    Raises:
        Exception: it was not uploaded in `SERVER_TRIES` attempts.
    """
    import wandb

    for attempt in range(1, SERVER_TRIES + 1):
        artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
        artifact.add_dir(str(files), policy="immutable", skip_cache=True)
        try:
            logged = run.log_artifact(artifact, aliases=aliases)
            if not run.offline:
                logged.wait()
                shutil.rmtree(files, ignore_errors=True)
            return logged
        except Exception:  # the SDK raises a dozen types
            if attempt == SERVER_TRIES:
                raise
            time.sleep(SERVER_SECONDS)
    raise AssertionError


def _pinned(files: Sequence[Path], base: Path, folder: Path) -> Path:
    """Return a folder with hard links to the files in `base`, or copies, that W&B can read later.

    W&B may read them only after other uploads, or at `wandb sync`, when the files may have been replaced.
    """
    logged = RunFolder(folder).wandb / "logged"
    logged.mkdir(parents=True, exist_ok=True)
    pinned = Path(tempfile.mkdtemp(prefix=f"{base.name}-", dir=logged))
    for file in files:
        link = pinned / file.relative_to(base)
        link.parent.mkdir(exist_ok=True)
        try:
            os.link(file, link)
        except OSError:
            shutil.copy2(file, link)
    return pinned
