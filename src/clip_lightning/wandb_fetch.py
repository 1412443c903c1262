"""Download W&B artifacts once per machine, and find out whether W&B's server can be used.

A version is stored in the cache folder as `ENTITY/PROJECT/NAME/vN/`, and `vN.json` next to it is written when
it is complete. `@ALIAS.json` has the version of an alias when the server was last asked.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from filelock import FileLock

from clip_lightning.errors import UserError, reason_of
from clip_lightning.files import cache_folder, write_atomically

PART = r"[\w. -]*\w[\w. -]*"
SERVER_SECONDS = 30


@dataclass(frozen=True)
class ArtifactName:
    """`ENTITY/PROJECT/NAME:ALIAS`, where ALIAS may be a version (`v3`), which never changes."""

    entity: str
    project: str
    name: str
    alias: str

    @classmethod
    def parse(cls, text: str, option: str) -> ArtifactName:
        """Parse a name, whose alias is `latest` by default; an error begins with `option`."""
        match = re.fullmatch(rf"({PART})/({PART})/({PART})(?::({PART}))?", text)
        if not match:
            raise UserError(
                f"{option} {text!r}: expected ENTITY/PROJECT/NAME:ALIAS, for example me/p/flickr8k:v0"
            )
        return cls(match[1], match[2], match[3], match[4] or "latest")

    @property
    def home(self) -> Path:
        """The folder of all versions on this machine."""
        return cache_folder("artifacts") / self.entity / self.project / self.name

    @property
    def copies(self) -> str:
        """What to say about the versions on this machine."""
        versions = sorted(file.stem for file in self.home.glob("v*.json"))
        return f"complete versions on this machine: {', '.join(versions) or 'none'}"

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}"


@dataclass(frozen=True)
class Fetched:
    """A complete version of an artifact on this machine, whose name has the version instead of an alias."""

    name: ArtifactName
    folder: Path
    metadata: Mapping[str, Any]


def fetch(name: ArtifactName) -> Fetched:
    """Download the version with this name, unless it is complete on this machine.

    If the name has a version instead of an alias, and this version is complete, the network is not used.

    Raises:
        UserError: the artifact does not exist, or cannot be downloaded and has no complete copy.
    """
    if re.fullmatch(r"v\d+", name.alias) and record_of(name).is_file():
        return fetched(name)
    import wandb

    artifact = _ask_server(name)
    version = replace(name, alias=artifact.version)
    name.home.mkdir(parents=True, exist_ok=True)
    with FileLock(name.home / f"{version.alias}.lock"):
        if not record_of(version).is_file():
            _download(artifact, name.home / version.alias)
            about = {
                "digest": artifact.digest,
                "metadata": dict(artifact.metadata),
                "type": artifact.type,
                "own": artifact.entity == wandb.Api(timeout=SERVER_SECONDS).default_entity,
            }
            write_atomically(record_of(version), json.dumps(about).encode())
    write_atomically(_pointer(name), json.dumps({"version": version.alias}).encode())
    return fetched(version)


def fetched(name: ArtifactName) -> Fetched:
    """Return what `fetch` has downloaded, without using the network.

    Raises:
        UserError: the artifact is not on this machine.
    """
    if (pointer := _pointer(name)).is_file():
        name = replace(name, alias=json.loads(pointer.read_text())["version"])
    record = record_of(name)
    if not record.is_file():
        raise UserError(f"the artifact {name} is not on this machine; {name.copies}")
    return Fetched(name, name.home / name.alias, json.loads(record.read_text())["metadata"])


def record_of(version: ArtifactName) -> Path:
    """Return the file that describes a complete version."""
    return version.home / f"{version.alias}.json"


def _pointer(name: ArtifactName) -> Path:
    return name.home / f"@{name.alias}.json"


def _ask_server(name: ArtifactName) -> Any:
    import wandb

    reason = why_unreachable()
    if not reason:
        try:
            return wandb.Api(timeout=SERVER_SECONDS).artifact(str(name))
        except Exception as error:  # the SDK raises a dozen kinds of errors
            reason = reason_of(error)
    raise UserError(
        f"the artifact {name} cannot be downloaded from W&B: {reason}; check the name and the network, or "
        f"give a complete version as :vN ({name.copies})"
    )


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
    except Exception as error:  # of the SDK, or because the disk is full
        raise UserError(
            f"the artifact {artifact.name} could not be downloaded to {folder} ({reason_of(error)}); run the "
            "same command again to resume the download, or remove the folder to start over"
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
    for file in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
    return False
