"""Download W&B artifacts once per machine, and find out whether W&B's server can be used.

A version is stored in the cache folder as `ENTITY/PROJECT/NAME/vN/`, and `vN.json` next to it is written when
it is complete. `@ALIAS.json` has the version of an alias when the server was last asked.
"""

from __future__ import annotations

import json
import netrc
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from filelock import FileLock

from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, write_atomically

PART = r"[\w. -]*\w[\w. -]*"
SERVER_SECONDS = 30


@dataclass(frozen=True)
class ArtifactName:
    """`ENTITY/PROJECT/NAME:ALIAS`, where ALIAS may be a version (`v3`)."""

    entity: str
    project: str
    name: str
    alias: str

    @classmethod
    def parse(cls, text: str, option: str) -> ArtifactName:
        """Parse a name, whose alias is `latest` by default.

        Raises:
            UserError: the name has another form; the message begins with `option`.
        """
        match = re.fullmatch(rf"({PART})/({PART})/({PART})(?::({PART}))?", text)
        if not match:
            raise UserError(
                f"{option} {text!r}: expected ENTITY/PROJECT/NAME:ALIAS, for example me/p/flickr8k:v0"
            )
        return cls(match[1], match[2], match[3], match[4] or "latest")

    @property
    def is_version(self) -> bool:
        """Whether the alias is a version, which never changes."""
        return re.fullmatch(r"v\d+", self.alias) is not None

    @property
    def home(self) -> Path:
        """The folder of all versions on this machine."""
        return cache_folder("artifacts") / self.entity / self.project / self.name

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}"


@dataclass(frozen=True)
class Fetched:
    """A complete version of an artifact on this machine.

    Attributes:
        name: the name, with the version instead of the alias.
        folder: the folder with the content.
        metadata: the metadata with which the artifact was logged.
    """

    name: ArtifactName
    folder: Path
    metadata: Mapping[str, Any]


def fetch(name: ArtifactName) -> Fetched:
    """Download the version with this name, unless it is complete on this machine.

    If the name has a version instead of an alias, and this version is complete, the network is not used.

    Raises:
        UserError: the artifact does not exist, or cannot be downloaded and has no complete copy.
    """
    if name.is_version and (present := _complete(name)) is not None:
        return present
    import wandb

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
                "own": artifact.entity == wandb.Api(timeout=SERVER_SECONDS).default_entity,
            }
            write_atomically(record_of(version), json.dumps(about).encode())
    if not name.is_version:
        write_atomically(_pointer(name), json.dumps({"version": version.alias}).encode())
    return fetched(version)


def fetched(name: ArtifactName) -> Fetched:
    """Return what `fetch` has downloaded, without using the network.

    Raises:
        UserError: the artifact is not on this machine.
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
    record = record_of(version)
    if not record.is_file():
        return None
    return Fetched(version, version.home / version.alias, json.loads(record.read_text())["metadata"])


def record_of(version: ArtifactName) -> Path:
    """Return the file that describes a complete version."""
    return version.home / f"{version.alias}.json"


def _pointer(name: ArtifactName) -> Path:
    return name.home / f"@{name.alias}.json"


def _copies(name: ArtifactName) -> str:
    versions = sorted(file.stem for file in name.home.glob("v*.json"))
    return f"complete versions on this machine: {', '.join(versions) or 'none'}"


def _ask_server(name: ArtifactName) -> Any:
    import wandb

    if why := why_unreachable():
        raise UserError(
            f"the artifact {name} cannot be downloaded: {why}; give a complete version as :vN "
            f"({_copies(name)})"
        )
    try:
        return wandb.Api(timeout=SERVER_SECONDS).artifact(str(name))
    except Exception as error:  # the SDK raises a dozen kinds of errors
        raise UserError(
            f"the artifact {name} cannot be downloaded from W&B ({' '.join(str(error).split())}); check the "
            f"name and the network, or give a complete version as :vN ({_copies(name)})"
        ) from error


def why_unreachable() -> str:
    """Return the reason why W&B's server cannot be used, or an empty string if it can."""
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE is {mode}"
    return "" if has_api_key() else "no W&B API key is configured (run `wandb login`, or set WANDB_API_KEY)"


def _download(artifact: Any, folder: Path) -> None:
    """Download the missing files, and verify all files."""
    try:
        # Do not use skip_cache: the threads of wandb 0.31 then write files under each other's names.
        artifact.download(root=str(folder))
        artifact.verify(root=str(folder))
    except OSError as error:
        raise UserError(
            f"the artifact {artifact.name} cannot be written to {folder} ({error.strerror or error}); free "
            "some space, or set XDG_CACHE_HOME to another folder"
        ) from error
    except Exception as error:
        raise UserError(
            f"the download of the artifact {artifact.name} is incomplete ({' '.join(str(error).split())}); "
            f"run the same command again to resume it, or remove {folder} to start over"
        ) from error


def default_project() -> str:
    """Return the W&B project that is used if no option gives one."""
    return os.environ.get("WANDB_PROJECT") or "clip-lightning"


def stays_offline(offline: bool | None) -> bool:
    """Return whether to make a run offline although W&B would not; `offline` is the user's choice, if any."""
    import wandb

    mode = wandb.setup().settings.mode
    if mode in ("disabled", "shared"):
        return False
    if offline is not None:
        return offline
    # Online is also W&B's default, so it is the user's choice only if it is in the environment.
    decided = mode != "online" or os.environ.get("WANDB_MODE") == "online"
    return not decided and not has_api_key()


def has_api_key() -> bool:
    """Return whether an API key for W&B's server is configured in the environment or in netrc."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(wandb.setup().settings.base_url).hostname or ""
    candidates = (
        [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path("~/.netrc"), Path("~/_netrc")]
    )
    for file in candidates:
        try:
            if netrc.netrc(file.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
