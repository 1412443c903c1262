"""What this process reads from W&B: artifacts, fetched once per machine, and who is logged in.

A fetched version is stored in the cache folder as `ENTITY/PROJECT/NAME/vN/`, with `vN.json` beside it once it
is complete; `@ALIAS.json` names the version that an alias meant when the server was last asked.
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
            write_atomically(record_of(version), json.dumps(about).encode())
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
    return f"complete copies of it here: {', '.join(versions) or 'none'}"


def _ask_server(name: ArtifactName) -> Any:
    import wandb

    if why := why_unreachable():
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


def why_unreachable() -> str:
    """Return the reason why W&B's server cannot be asked, or an empty string if it can."""
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


def default_project() -> str:
    """Return W&B's project if no option names one."""
    return os.environ.get("WANDB_PROJECT") or "clip-lightning"


def stays_offline(offline: bool | None) -> bool:
    """Whether to make the run an offline one ourselves, over what W&B would choose."""
    import wandb

    mode = wandb.setup().settings.mode
    if mode in ("disabled", "shared"):
        return False
    if offline is not None:
        return offline
    # online is also W&B's default: only in the environment is it somebody's word
    decided = mode != "online" or os.environ.get("WANDB_MODE") == "online"
    return not decided and not has_api_key()


def has_api_key() -> bool:
    """Whether a key for W&B's server is configured (environment or netrc)."""
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
