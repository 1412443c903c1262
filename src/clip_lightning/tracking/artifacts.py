"""Data and models as W&B artifacts: uploaded, fetched once a machine, and used or logged by a run.

A fetched version lies under the cache folder as `ENTITY/PROJECT/NAME/vN/`, with `vN.json` beside it once it
is complete; `@ALIAS.json` says which version an alias meant when it was last asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, write_atomically
from clip_lightning.tracking.account import has_api_key

PART = r"[\w. -]*\w[\w. -]*"
DATA_TYPE, MODEL_TYPE, CHECKPOINT_TYPE = "dataset", "model", "checkpoint"
SERVER_SECONDS, SERVER_TRIES = 30, 3


@dataclass(frozen=True)
class ArtifactName:
    """`ENTITY/PROJECT/NAME:ALIAS`, where ALIAS may be a version (`v3`)."""

    entity: str
    project: str
    name: str
    alias: str

    @classmethod
    def parse(cls, text: str, option: str) -> ArtifactName:
        """Read the name; without an alias it means `latest`.

        Raises:
            UserError: it has another form; `option` is where it was given.
        """
        found = re.fullmatch(rf"({PART})/({PART})/({PART})(?::({PART}))?", text)
        if not found:
            raise UserError(
                f"{option} {text!r}: expected ENTITY/PROJECT/NAME:ALIAS, for example me/p/flickr8k:v0"
            )
        return cls(found[1], found[2], found[3], found[4] or "latest")

    @property
    def is_version(self) -> bool:
        """Whether the alias names one version, which never changes."""
        return re.fullmatch(r"v\d+", self.alias) is not None

    @property
    def home(self) -> Path:
        """The folder of all its versions on this machine."""
        return cache_folder("artifacts") / self.entity / self.project / self.name

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}"


@dataclass(frozen=True)
class Fetched:
    """A version of an artifact that lies complete on this machine.

    Attributes:
        name: with the version in place of the alias.
        folder: its content.
        metadata: what was said of it when it was logged.
    """

    name: ArtifactName
    folder: Path
    metadata: Mapping[str, Any]


def fetch(name: ArtifactName) -> Fetched:
    """Download the version that the name means, unless it is complete on this machine; what is there stays.

    A version that is named as such and is complete needs no network.

    Raises:
        UserError: there is no such artifact, or no network and no copy of that very version.
    """
    if name.is_version and (present := _complete(name)) is not None:
        return present
    artifact = _ask_server(name)
    version = ArtifactName(name.entity, name.project, name.name, artifact.version)
    name.home.mkdir(parents=True, exist_ok=True)
    with FileLock(name.home / f"{version.alias}.lock"):
        if _complete(version) is None:
            _download(artifact, name.home / version.alias)
            about = {
                "digest": artifact.digest,
                "metadata": dict(artifact.metadata),
                "type": artifact.type,
                "own": artifact.entity == _default_entity(),
            }
            write_atomically(_record(version), json.dumps(about).encode())
    if not name.is_version:
        write_atomically(_pointer(name), json.dumps({"version": version.alias}).encode())
    return fetched(version)


def fetched(name: ArtifactName) -> Fetched:
    """What `fetch` has put on this machine; no network is asked.

    Raises:
        UserError: it is not here.
    """
    version = name
    if not name.is_version and _pointer(name).is_file():
        alias = json.loads(_pointer(name).read_text())["version"]
        version = ArtifactName(name.entity, name.project, name.name, alias)
    present = _complete(version)
    if present is None:
        raise UserError(f"the artifact {name} is not on this machine; {_copies(name)}")
    return present


def _complete(version: ArtifactName) -> Fetched | None:
    record = _record(version)
    if not record.is_file():
        return None
    return Fetched(version, version.home / version.alias, json.loads(record.read_text())["metadata"])


def _record(version: ArtifactName) -> Path:
    return version.home / f"{version.alias}.json"


def _pointer(name: ArtifactName) -> Path:
    return name.home / f"@{name.alias}.json"


def _copies(name: ArtifactName) -> str:
    versions = sorted(file.stem for file in name.home.glob("v*.json"))
    return f"complete copies of it here: {', '.join(versions) or 'none'}"


def _ask_server(name: ArtifactName) -> Any:
    import wandb

    if why := _unreachable():
        raise UserError(
            f"the artifact {name} cannot be asked for: {why}; {_copies(name)}; give one of them as :vN"
        )
    try:
        return wandb.Api(timeout=SERVER_SECONDS).artifact(str(name))
    except Exception as error:  # the SDK has a dozen kinds
        raise UserError(
            f"W&B did not give the artifact {name} ({' '.join(str(error).split())}); check its name and the "
            f"network; {_copies(name)}, which :vN takes without a network"
        ) from error


def _unreachable() -> str:
    """Why W&B's server is not to be asked; nothing if it is."""
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE says {mode}"
    return "" if has_api_key() else "no W&B API key is configured (`wandb login`, or set WANDB_API_KEY)"


def _default_entity() -> str | None:
    import wandb

    entity: str | None = wandb.Api(timeout=SERVER_SECONDS).default_entity
    return entity


def _download(artifact: Any, folder: Path) -> None:
    """All files, checked against their digests; those that are there already are not asked for again."""
    try:
        # not skip_cache: with wandb 0.31 its threads then write files under each other's names
        artifact.download(root=str(folder))
        artifact.verify(root=str(folder))
    except OSError as error:
        raise UserError(
            f"the artifact {artifact.name} cannot be kept in {folder} ({error.strerror or error}); make "
            "room, or let XDG_CACHE_HOME name another place"
        ) from error
    except Exception as error:
        raise UserError(
            f"the artifact {artifact.name} did not arrive whole ({' '.join(str(error).split())}); the same "
            f"command goes on with what is missing, or remove {folder} first"
        ) from error


def check_upload(name: str) -> None:
    """Complain before the data is looked at.

    Raises:
        UserError: nobody is logged in, or the name cannot be an artifact's.
    """
    if why := _unreachable():
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
    about = json.loads(_record(data.name).read_text())
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
    from clip_lightning.sharded_checkpoints import shards_of

    bundle, checkpoint = folder / "model", folder / "checkpoints" / "last.ckpt"
    logged = None
    if bundle.is_dir():
        files = _pinned(sorted(bundle.iterdir()), bundle, folder)
        logged = _log(run, name, MODEL_TYPE, files, metadata, ["best", "latest"] if is_best else ["latest"])
    if checkpoint.is_file():
        files = _pinned([checkpoint, *shards_of(checkpoint)], checkpoint.parent, folder)
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
    (folder / "wandb" / "logged").mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"{base.name}-", dir=folder / "wandb" / "logged"))
    for file in files:
        link = place / file.relative_to(base)
        link.parent.mkdir(exist_ok=True)
        try:
            os.link(file, link)
        except OSError:
            shutil.copy2(file, link)
    return place
