"""Where a data module's pictures and captions come from: exactly one of the options that name data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clip_lightning.data.archive import archive_folder, fetch_archive
from clip_lightning.data.captions import CaptionSet
from clip_lightning.data.columns import RECOGNISED, ReadOptions
from clip_lightning.data.formats import read_captions
from clip_lightning.data.hub import fetch_hub, hub_folder
from clip_lightning.data.scenes import write_scenes
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder
from clip_lightning.wandb_fetch import ArtifactName, fetch, fetched

SCENES, SCENE_SIZE = 2500, 224


@dataclass(frozen=True)
class Origin:
    """Data that may have to be fetched first.

    Attributes:
        fetch: puts it on this machine, once; may use the network.
        folder: where it lies then, on every rank; no network is used.
        artifact: the W&B artifact that it is, if it is one.
        options: how its tables are read.
    """

    fetch: Callable[[], object]
    folder: Callable[[], Path]
    artifact: ArtifactName | None = None
    options: ReadOptions = RECOGNISED

    def read(self, dataset: str) -> CaptionSet:
        """Read the captions and find the images, as `read_captions` does."""
        return read_captions(self.folder(), "captions" if dataset == "scenes" else dataset, self.options)


def find_origin(
    *,
    root: Path | None,
    scenes: bool,
    artifact: str | None,
    url: str | None,
    sha256: str | None,
    hub: str | None,
    read: ReadOptions = RECOGNISED,
) -> Origin:
    """What the options say of the data; `scenes` are drawn into `root` or the cache folder.

    Raises:
        UserError: none or several of them name data, or a name is malformed.
    """
    named = {"root": root, "artifact": artifact, "url": url, "hub": hub}
    given = [f"--data.{name}" for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each name data; give one of them")
    if scenes and given not in ([], ["--data.root"]):
        raise UserError(f"--data.dataset scenes needs no {given[0]}; leave it out")
    if sha256 is not None and url is None:
        raise UserError("--data.sha256 is the checksum of an archive; give its --data.url too")
    if scenes:
        return _scenes(root or cache_folder("scenes") / f"{SCENES}-{SCENE_SIZE}")
    if root is not None:
        return Origin(lambda: None, lambda: root, None, read)
    if artifact is not None:
        name = ArtifactName.parse(artifact, "--data.artifact")
        return Origin(partial(fetch, name), lambda: fetched(name).folder, name, read)
    if url is not None:
        archive_folder(url, sha256)  # complains of what is malformed
        fetch_url, folder = partial(fetch_archive, url, sha256), partial(archive_folder, url, sha256)
        return Origin(fetch_url, folder, None, read)
    if hub is not None:
        columns = read.image_column, read.caption_column
        hub_folder(hub, *columns)
        return Origin(partial(fetch_hub, hub, *columns), partial(hub_folder, hub, *columns))
    raise UserError(
        "no data: give --data.root FOLDER, --data.artifact, --data.hub, --data.url, or --data.dataset scenes "
        "for drawn ones"
    )


def _scenes(folder: Path) -> Origin:
    def draw() -> None:
        if not folder.exists():
            write_scenes(folder, SCENES, SCENE_SIZE, seed=0)

    return Origin(draw, lambda: folder)
