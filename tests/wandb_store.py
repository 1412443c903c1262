"""What the W&B test server remembers: runs, artifacts and sweeps. Knows nothing of HTTP or GraphQL."""

import hashlib
import json
import re
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any

import yaml

NOW = "2026-01-01T00:00:00Z"
Key = tuple[str, str, str]
"""Entity, project and the name of a run, a collection or a sweep."""


class Refused(Exception):
    """A client asked for what cannot be; it is told the reason."""


def node_id(kind: str, *parts: object) -> str:
    """An id that the SDK can decode: base64."""
    return b64encode(":".join([kind, *map(str, parts)]).encode()).decode()


def md5(content: bytes) -> str:
    """The checksum as W&B writes it: base64."""
    return b64encode(hashlib.md5(content).digest()).decode()


@dataclass(eq=False)
class Run:
    key: Key
    display_name: str
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    raw_config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    group: str | None = None
    job_type: str | None = None
    sweep: str | None = None
    state: str = "running"
    """running, then finished or failed. Nobody declares a silent run crashed; a test may set it."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    preempting: bool = False

    @property
    def id(self) -> str:
        return self.key[2]

    @property
    def node_id(self) -> str:
        return node_id("Run", *self.key)

    @property
    def config(self) -> dict[str, Any]:
        """What the user put there."""
        return {name: entry["value"] for name, entry in self.raw_config.items() if name != "_wandb"}


@dataclass(eq=False)
class Artifact:
    """One version. It belongs to the collection that it was logged to; links put it into others as well."""

    home: "Collection"
    digest: str
    number: int
    """Among all artifacts of the server; `version` counts within the collection."""
    client_id: str | None
    metadata: dict[str, Any]
    wanted_aliases: list[str]
    logged_by: Key | None
    used_by: list[Key] = field(default_factory=list)
    committed: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return node_id("Artifact", self.number)

    @property
    def version(self) -> int | None:
        return self.home.versions.index(self) if self.committed else None

    @property
    def contents(self) -> dict[str, dict[str, Any]]:
        """Path -> digest, size and, for a reference, "ref"."""
        return self.manifest.get("contents", {})


@dataclass(eq=False)
class Collection:
    """The versions under one name: a sequence, which runs log to, or a portfolio, which one links to."""

    key: Key
    type: str
    portfolio: bool
    versions: list[Artifact] = field(default_factory=list)
    alias_owners: dict[str, Artifact] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return node_id("ArtifactCollection", *self.key)

    def add(self, artifact: Artifact, aliases: list[str]) -> None:
        """Take a version in, unless it is there, and move `latest` and `aliases` to it."""
        if artifact not in self.versions:
            self.versions.append(artifact)
        self.alias_owners |= dict.fromkeys(["latest", *aliases], artifact)

    def find(self, alias: str) -> Artifact | None:
        """The version called latest, best, v3."""
        if re.fullmatch(r"v\d+", alias):
            return next(iter(self.versions[int(alias[1:]) :]), None)
        return self.alias_owners.get(alias)

    def aliases_of(self, artifact: Artifact) -> list[str]:
        return [alias for alias, owner in self.alias_owners.items() if owner is artifact]


@dataclass(eq=False)
class Sweep:
    key: Key
    config: dict[str, Any]
    runs: list[str] = field(default_factory=list)
    """Ids of the runs that agents were told to start, in order."""

    @property
    def id(self) -> str:
        return self.key[2]

    def next_run(self) -> dict[str, Any]:
        """The command that starts a run, with the first values of a grid."""
        self.runs.append(f"{self.id}-{len(self.runs)}")
        specs = self.config["parameters"].items()
        values = {name: {"value": spec.get("values", [spec.get("value")])[0]} for name, spec in specs}
        return {"type": "run", "run_id": self.runs[-1], "program": self.config["program"], "args": values}


class Store:
    """Everything that was sent, under the names that W&B uses."""

    def __init__(self) -> None:
        self.runs: dict[Key, Run] = {}
        self.collections: dict[Key, Collection] = {}
        self.artifacts: list[Artifact] = []
        self.sweeps: dict[Key, Sweep] = {}
        self.agents: list[Sweep] = []
        """The sweep that each agent works for."""
        self.blobs: dict[str, bytes] = {}
        """The contents of artifacts, and their manifests, by the path they were uploaded to."""

    def has_project(self, entity: str, project: str) -> bool:
        keys = (*self.runs, *self.collections, *self.sweeps)
        return any(key[:2] == (entity, project) for key in keys)

    def folder(self, path: str) -> tuple[dict[str, bytes], str]:
        """Where a file is kept, and its name there: among those of its run, or among the blobs."""
        if path.startswith("runs/"):
            _, entity, project, run, name = path.split("/", 4)
            return self.runs[entity, project, run].files, name
        return self.blobs, path

    def collection(self, key: Key, type: str, *, portfolio: bool = False) -> Collection:
        """The collection, made now if it is new."""
        collection = self.collections.setdefault(key, Collection(key, type, portfolio))
        if (collection.type, collection.portfolio) != (type, portfolio):
            raise Refused(f"{'/'.join(key)} is a collection of another kind, of type {collection.type}")
        return collection

    def create_artifact(self, home: Collection, digest: str, **fields: Any) -> Artifact:
        """A version that waits for its files; or the one of the same content, given the aliases."""
        for artifact in home.versions:
            if artifact.digest == digest:
                home.add(artifact, fields["wanted_aliases"])
                return artifact
        self.artifacts.append(Artifact(home, digest, number=len(self.artifacts), **fields))
        return self.artifacts[-1]

    def commit(self, artifact: Artifact) -> None:
        """Make a version visible, provided that everything in it was uploaded."""
        artifact.manifest = json.loads(self.blobs[manifest_path(artifact)])
        for path, entry in artifact.contents.items():
            if "ref" not in entry and content_path(entry["digest"]) not in self.blobs:
                raise Refused(f"{artifact.home.key} was committed without the contents of {path}")
        artifact.committed = True
        artifact.home.add(artifact, artifact.wanted_aliases)

    def artifact(self, name: str) -> Artifact:
        """The version called entity/project/collection:alias, or of this id, be it a client's."""
        path, _, alias = name.partition(":")
        if path.count("/") == 2:
            found = self.collections[tuple(path.split("/"))].find(alias or "latest")
        else:
            found = next((one for one in self.artifacts if name in (one.id, one.client_id)), None)
        if found is None:
            raise Refused(f"there is no artifact {name}")
        return found

    def create_sweep(self, entity: str, project: str, config: str) -> Sweep:
        sweep = Sweep((entity, project, f"sweep{len(self.sweeps):03}"), yaml.safe_load(config))
        self.sweeps[sweep.key] = sweep
        return sweep


def content_path(digest: str) -> str:
    """Where the contents of an artifact's file lie: equal contents are kept once."""
    return f"contents/{digest.replace('/', '_')}"


def manifest_path(artifact: Artifact) -> str:
    return f"manifests/{artifact.number}"
