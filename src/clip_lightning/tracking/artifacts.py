"""Data and models as W&B artifacts: uploaded, and used or logged by a run."""

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
    """Complain before the data is looked at.

    Raises:
        UserError: nobody is logged in, or the name cannot be an artifact's.
    """
    if why := why_unreachable():
        raise UserError(f"data cannot be uploaded: {why}")
    if not re.fullmatch(PART, name):
        raise UserError(f"--artifact {name!r}: expected letters, digits, _, - and . only")


def check_names(model_name: str | None, link_to: str | None) -> None:
    """Complain before hours of training.

    Raises:
        UserError: a name that W&B would refuse.
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
    """Log a folder as a data artifact, in a run of its own.

    Args:
        name: of the artifact within the project.
        root: the folder, whose layout is kept.
        project: W&B project.
        entity: W&B user or team; your default one if not given.
        by_reference: whether W&B keeps only where the files lie and their checksums.
        metadata: digest, counts and whatever else describes the data.

    Returns:
        `ENTITY/PROJECT/NAME:vN`.

    Raises:
        UserError: nobody is logged in, or the server did not take it.
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
        raise UserError(f"W&B did not take the data ({' '.join(str(error).split())})") from error


# What a run uses and makes -------------------------------------------------------------------------------


def use_data(run: Any, data: Fetched) -> None:
    """Let the run's lineage begin with the version of the data that it trains on.

    A run that is kept offline notes it so that `wandb sync` records it: as a draft with the version's
    content, which the server recognises. That takes the same entity and project, or the data would be
    uploaded there.
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
    if draft.digest == about["digest"]:  # not so where files are references, or were changed
        # the public `use_artifact` refuses offline, although what it would write is all there
        run._log_artifact(draft, aliases=[], is_user_created=True, use_after_commit=True)


def why_not_best(run: Any, metadata: Mapping[str, Any], shared_name: str | None) -> str | None:
    """Return the reason why a run's model must not take the alias `best` of its name, None if it takes it.

    Args:
        run: the W&B run.
        metadata: of the model, with the metrics of its best epoch.
        shared_name: of the model's artifact if other runs may log models under it, too.
    """
    if "rsum" not in metadata:
        return "no epoch was validated"
    if shared_name is None:
        return None
    if run.offline:
        return "offline, its score cannot be compared with that of the present best"
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
    """Log a run's bundle as `NAME` and its last checkpoint as `NAME-checkpoint:last`; no others.

    Args:
        run: the W&B run.
        folder: the run's folder, with `model/` and `checkpoints/last.ckpt` where they exist.
        name: of the model's artifact.
        metadata: metrics, towers, data.
        is_best: whether the bundle takes the alias `best`.

    Returns:
        The bundle's artifact, None where there is no bundle.
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
    """Log a folder; online until it has arrived, since after an outage the SDK drops it without a word.

    Raises:
        Exception: it has not arrived after `SERVER_TRIES`.
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
        except Exception:  # the SDK has a dozen kinds
            if attempt == SERVER_TRIES:
                raise
            time.sleep(SERVER_SECONDS)
    raise AssertionError


def _pinned(files: Sequence[Path], base: Path, folder: Path) -> Path:
    """A folder with hard links to the files below `base` (or copies), which stay when those are replaced.

    W&B may read them long after: when it has uploaded the rest, or at `wandb sync`.
    """
    logged = RunFolder(folder).wandb / "logged"
    logged.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"{base.name}-", dir=logged))
    for file in files:
        link = place / file.relative_to(base)
        link.parent.mkdir(exist_ok=True)
        try:
            os.link(file, link)
        except OSError:
            shutil.copy2(file, link)
    return place
