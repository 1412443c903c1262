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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from filelock import FileLock

from clip_lightning.errors import UserError, as_user_error
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
    def folder(self) -> Path:
        """The files of a version."""
        return self.home / self.alias

    @property
    def record(self) -> Path:
        """The file that describes a complete version."""
        return self.home / f"{self.alias}.json"

    def about(self) -> Any:
        """Return the digest, metadata and type of a complete version, and whether it is the user's own."""
        return json.loads(self.record.read_text())

    def __str__(self) -> str:
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}"


def fetch(name: ArtifactName) -> ArtifactName:
    """Download what the name stands for, and return the version; a complete copy of it needs no network."""
    if re.fullmatch(r"v\d+", name.alias) and name.record.is_file():
        return name
    import wandb

    problem = f"the artifact {name} cannot be downloaded from W&B"
    remedy = f"check the name and the network, or give a version in {name.home} as :vN"
    if reason := why_unreachable():
        raise UserError(f"{problem}: {reason}; {remedy}")
    with as_user_error(problem, remedy):
        artifact = wandb.Api(timeout=SERVER_SECONDS).artifact(str(name))
    version = replace(name, alias=artifact.version)
    name.home.mkdir(parents=True, exist_ok=True)
    with FileLock(name.home / f"{version.alias}.lock"):
        if not version.record.is_file():
            folder = str(version.folder)
            problem = f"the artifact {artifact.name} could not be downloaded to {folder}"
            remedy = "run the same command again to resume, or remove the folder to start over"
            with as_user_error(problem, remedy):
                # Do not use skip_cache: the threads of wandb 0.31 then write files under each other's names.
                artifact.download(root=folder)
                artifact.verify(root=folder)
            about = {
                "digest": artifact.digest,
                "metadata": dict(artifact.metadata),
                "type": artifact.type,
                "own": artifact.entity == wandb.Api(timeout=SERVER_SECONDS).default_entity,
            }
            write_atomically(version.record, json.dumps(about).encode())
    write_atomically(name.home / f"@{name.alias}.json", json.dumps({"version": version.alias}).encode())
    return version


def fetched(name: ArtifactName) -> ArtifactName:
    """Return the version that `fetch` has downloaded, without using the network."""
    if (pointer := name.home / f"@{name.alias}.json").is_file():
        name = replace(name, alias=json.loads(pointer.read_text())["version"])
    if not name.record.is_file():
        raise UserError(f"the artifact {name} is not on this machine; give a version in {name.home} as :vN")
    return name


def why_unreachable() -> str:
    """Return the reason why W&B's server cannot be used, or an empty string if it can."""
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE is {mode}"
    return "" if has_api_key() else "no W&B API key is configured (run `wandb login`, or set WANDB_API_KEY)"


def default_project() -> str:
    """Return the W&B project that is used if no option gives one."""
    return os.environ.get("WANDB_PROJECT") or "clip-lightning"


def stays_offline(offline: bool | None) -> bool:
    """Return whether to make a run offline although W&B would not; `offline` is the user's choice, if any."""
    import wandb

    mode = wandb.setup().settings.mode
    # Online is also W&B's default, so it is the user's choice only if it is in the environment.
    if offline is None and mode == "online" and os.environ.get("WANDB_MODE") != "online":
        return not has_api_key()
    return bool(offline) and mode not in ("disabled", "shared")


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
