"""Find captioned images: in a folder of this machine, or in data that is downloaded and cached."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from clip_lightning.data.archive import Archive
from clip_lightning.data.captions import CaptionSet
from clip_lightning.data.columns import RECOGNIZED, ReadOptions
from clip_lightning.data.formats import read_captions
from clip_lightning.data.hub import HubDataset
from clip_lightning.data.records import Records
from clip_lightning.data.scenes import write_scenes
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder
from clip_lightning.wandb_fetch import ArtifactName, Fetched, fetch, fetched

SCENES, SCENE_SIZE = 2500, 224


class Source(Protocol):
    """Data that may have to be downloaded. A new kind is a class with these methods, listed in KINDS."""

    def fetch(self) -> object:
        """Download or generate the data, unless it is on this machine."""

    def folder(self) -> Path:
        """Return the folder of the data after `fetch`, on every rank, without using the network."""


@dataclass(frozen=True)
class Folder:
    """A folder, or an annotation file in it."""

    root: Path

    def fetch(self) -> None:
        """Do nothing, as the data is on this machine."""

    def folder(self) -> Path:
        """Return the folder or file."""
        return self.root


@dataclass(frozen=True)
class Scenes:
    """Synthetic scenes, which are generated into a folder."""

    root: Path

    @classmethod
    def parse(cls, text: str) -> Scenes:
        """Parse `scenes`, which uses the cache folder, or `scenes:FOLDER`."""
        folder = text.partition(":")[2]
        return cls(Path(folder) if folder else cache_folder("scenes") / f"{SCENES}-{SCENE_SIZE}")

    def fetch(self) -> None:
        """Generate the scenes unless the folder exists."""
        if not self.root.exists():
            write_scenes(self.root, SCENES, SCENE_SIZE, seed=0)

    def folder(self) -> Path:
        """Return the folder."""
        return self.root


@dataclass(frozen=True)
class Artifact:
    """A W&B artifact."""

    name: ArtifactName

    @classmethod
    def parse(cls, text: str) -> Artifact:
        """Parse `wandb:ENTITY/PROJECT/NAME:ALIAS`."""
        return cls(ArtifactName.parse(text.removeprefix("wandb:"), "--data.root wandb:"))

    def fetch(self) -> Fetched:
        """Download the current version of the alias, unless it is on this machine."""
        return fetch(self.name)

    def fetched(self) -> Fetched:
        """Return the version that was downloaded."""
        return fetched(self.name)

    def folder(self) -> Path:
        """Return the folder of the version that was downloaded."""
        return self.fetched().folder


KINDS: Mapping[str, Callable[[str], Source]] = {
    "scenes": Scenes.parse,
    "hf": HubDataset.parse,
    "wandb": Artifact.parse,
    **dict.fromkeys(("https", "http", "file"), Archive.parse),
}


def find_source(root: str | Path | None, read: ReadOptions = RECOGNIZED, records: Any = None) -> Source:
    """Return the source for a path, for a name such as `hf:OWNER/NAME`, or for data from Python."""
    if records is not None:
        return Records(records, read)
    if root is None:
        raise UserError(
            "--data.root is missing; give a folder, hf:OWNER/NAME, wandb:ENTITY/PROJECT/NAME:ALIAS, the URL "
            "of an archive, or scenes for synthetic scenes"
        )
    kind, colon, _ = str(root).partition(":")
    if kind not in KINDS or not (colon or kind == "scenes") or Path(root).exists():
        return Folder(Path(root))
    source = KINDS[kind](str(root))
    return replace(source, read=read) if isinstance(source, HubDataset) else source


def names_tars(root: str | Path | None) -> bool:
    """Return whether this is a pattern or URL of tars; URLs of archives have a checksum or another suffix."""
    text = re.sub(r"[?#].*", "", str(root))
    if "://" in text:
        return "#sha256=" not in str(root) and not re.search(r"\.(zip|tgz|gz|bz2|xz)$", text)
    return bool(re.search(r"\.(tar(\.\w+)?|tgz)$", text)) and not Path(text).is_dir()


def read_source(source: Source, read: ReadOptions) -> CaptionSet:
    """Read the captions of data that `fetch` has provided, and find its images."""
    if isinstance(source, HubDataset | Records):
        read = RECOGNIZED  # the columns were chosen when the data was written
    return read_captions(source.folder(), read)
