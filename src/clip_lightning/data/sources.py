"""Where captioned images come from: a folder of this machine, or data that is fetched once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from clip_lightning.data.archive import Archive
from clip_lightning.data.captions import CaptionSet
from clip_lightning.data.columns import RECOGNISED, ReadOptions
from clip_lightning.data.formats import read_captions
from clip_lightning.data.hub import HubDataset
from clip_lightning.data.scenes import write_scenes
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder
from clip_lightning.wandb_fetch import ArtifactName, Fetched, fetch, fetched

SCENES, SCENE_SIZE = 2500, 224


class Source(Protocol):
    """Data that may have to be fetched first. A new kind is a class with these methods, listed in KINDS."""

    def fetch(self) -> object:
        """Put the data on this machine, once; may use the network."""

    def folder(self) -> Path:
        """Return where the data is after `fetch`, on every rank; uses no network."""


@dataclass(frozen=True)
class Folder:
    """A folder, or an annotation file in it; if `scenes`, synthetic ones that are drawn into it first."""

    root: Path
    scenes: bool = False

    def fetch(self) -> None:
        """Draw the scenes, unless they are there."""
        if self.scenes and not self.root.exists():
            write_scenes(self.root, SCENES, SCENE_SIZE, seed=0)

    def folder(self) -> Path:
        """Return the folder or file."""
        return self.root


@dataclass(frozen=True)
class Artifact:
    """A W&B artifact."""

    name: ArtifactName

    @classmethod
    def parse(cls, text: str) -> Artifact:
        """Read `wandb:ENTITY/PROJECT/NAME:ALIAS`."""
        return cls(ArtifactName.parse(text.removeprefix("wandb:"), "--data.root wandb:"))

    def fetch(self) -> Fetched:
        """Download the version that the alias means now, if it is not on this machine."""
        return fetch(self.name)

    def fetched(self) -> Fetched:
        """Return the version that was fetched."""
        return fetched(self.name)

    def folder(self) -> Path:
        """Return the folder of that version."""
        return self.fetched().folder


KINDS: Mapping[str, Callable[[str], Source]] = {
    "hf": HubDataset.parse,
    "wandb": Artifact.parse,
    **dict.fromkeys(("https", "http", "file"), Archive.parse),
}


def find_source(root: str | Path | None, *, scenes: bool = False, read: ReadOptions = RECOGNISED) -> Source:
    """Return what a path or a name such as `hf:OWNER/NAME` means; synthetic scenes need neither."""
    kind, colon, _ = str(root).partition(":")
    is_name = bool(colon) and kind in KINDS and not Path(str(root)).exists()
    if scenes and is_name:
        raise UserError(f"--data.root {kind}: is not for --data.dataset scenes; leave out one of them")
    if scenes:
        return Folder(Path(root or cache_folder("scenes") / f"{SCENES}-{SCENE_SIZE}"), scenes=True)
    if root is None:
        raise UserError(
            "no data: give --data.root a folder, hf:OWNER/NAME, wandb:ENTITY/PROJECT/NAME:ALIAS or the URL "
            "of an archive, or give --data.dataset scenes for synthetic ones"
        )
    source = KINDS[kind](str(root)) if is_name else Folder(Path(root))
    return replace(source, read=read) if isinstance(source, HubDataset) else source


def read_source(source: Source, layout: str, read: ReadOptions) -> CaptionSet:
    """Read the captions of data that has been fetched, and find its images."""
    if isinstance(source, HubDataset):
        read = RECOGNISED  # its columns were chosen when it was written
    return read_captions(source.folder(), "captions" if layout == "scenes" else layout, read)
