"""Find captioned images: in a folder of this machine, or in data that is downloaded or written and cached."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import stat
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fsspec.callbacks import TqdmCallback
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from clip_lightning.data.captions import CaptionSet
from clip_lightning.data.columns import RECOGNIZED, ReadOptions, read_records
from clip_lightning.data.formats import read_captions
from clip_lightning.data.hub import HubDataset, write_rows
from clip_lightning.data.images import BrokenImage, to_pixels
from clip_lightning.data.scenes import write_scenes
from clip_lightning.data.shards.storage import call
from clip_lightning.errors import UserError, reason_of
from clip_lightning.files import cache_folder, make_once
from clip_lightning.terminal import public
from clip_lightning.wandb_fetch import ArtifactName, Fetched, fetch, fetched

SCENES, SCENE_SIZE = 2500, 224
MAX_RATIO, ALWAYS_ALLOWED, BLOCK = 20, 10_000_000_000, 4096
"""An archive may unpack to 20 times its size or 10 GB; every file counts one block more than its size."""


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

    def fetch(self) -> None: ...

    def folder(self) -> Path:
        return self.root


class Scenes(Folder):
    """Synthetic scenes, which are generated into a folder."""

    @classmethod
    def parse(cls, text: str) -> Scenes:
        """Parse `scenes`, which uses the cache folder, or `scenes:FOLDER`."""
        folder = text.partition(":")[2]
        return cls(Path(folder) if folder else cache_folder("scenes") / f"{SCENES}-{SCENE_SIZE}")

    def fetch(self) -> None:
        if not self.root.exists():
            write_scenes(self.root, SCENES, SCENE_SIZE, seed=0)


@dataclass(frozen=True)
class Artifact:
    """A W&B artifact."""

    name: ArtifactName

    @classmethod
    def parse(cls, text: str) -> Artifact:
        """Parse `wandb:ENTITY/PROJECT/NAME:ALIAS`."""
        return cls(ArtifactName.parse(text.removeprefix("wandb:"), "--data.root wandb:"))

    def fetch(self) -> Fetched:
        return fetch(self.name)

    def fetched(self) -> Fetched:
        """Return the version that was downloaded."""
        return fetched(self.name)

    def folder(self) -> Path:
        return self.fetched().folder


@dataclass(frozen=True)
class Archive:
    """A .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz file and its expected SHA-256."""

    url: str
    sha256: str

    @classmethod
    def parse(cls, text: str) -> Archive:
        """Parse `URL#sha256=HEX` with an https://, http:// or file:// URL."""
        url, _, digest = text.partition("#sha256=")
        try:
            parts, shown = urlsplit(url), public(text)
            local = parts.scheme == "file"
            valid = parts.netloc in ("", "localhost") if local else parts.hostname and parts.port != 0
        except ValueError:  # do not print the URL, which may contain parts of a password
            valid, shown = False, "URL (write / ? # @ : in a user or password as %2F %3F %23 %40 %3A)"
        if not (valid and re.fullmatch("[0-9a-fA-F]{64}", digest)):
            raise UserError(
                f"--data.root {shown}: expected https://SERVER/ARCHIVE#sha256=HEX (or http://, file:///) "
                "with the 64 hex digits that `sha256sum FILE` prints for the archive"
            )
        return cls(url, digest.lower())

    def folder(self) -> Path:
        """Return the folder of the unpacked content after `fetch`, which does not depend on the URL."""
        return cache_folder("data") / self.sha256[:16]

    def fetch(self) -> None:
        """Download, verify and unpack the archive, once per machine."""
        make_once(self.folder(), self._fill)

    def _fill(self, draft: Path) -> Path:
        shown, archive = f"--data.root {public(self.url)}", draft / "archive"
        if self.url.startswith("file:"):
            archive = Path(urllib.request.url2pathname(urlsplit(self.url).path))
        else:
            call(self.url, "get_file", str(archive), callback=TqdmCallback({"desc": "download"}))
        if not archive.is_file():
            raise UserError(f"{shown} does not exist; give the archive's file or URL")
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise UserError(
                f"{shown} has the SHA-256 {digest}, expected {self.sha256}; the download was discarded: try "
                "again, or correct the checksum if this is the archive that you want"
            )
        return unpack(archive, draft / "files", shown)


@dataclass
class Records:
    """Data from Python (see `CaptionDataModule`), written once as a folder of images and a table."""

    records: Any
    read: ReadOptions

    def fetch(self) -> None:
        make_once(self.folder(), lambda draft: write_rows(draft, self._rows()))

    def folder(self) -> Path:
        return self._folder

    @cached_property
    def _folder(self) -> Path:
        sha = hashlib.sha256()
        for _, image, captions, split in self._rows():
            content = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image
            sha.update(json.dumps([content, captions, split]).encode())
        return cache_folder("data") / f"records-{sha.hexdigest()[:16]}"

    @cached_property
    def _parts(self) -> dict[str | None, Any]:
        parts = self.records if isinstance(self.records, Mapping) else {None: self.records}
        return {split: _indexed(rows) for split, rows in parts.items()}

    def _rows(self) -> Iterator[tuple[str, bytes | str, list[str], str | None]]:
        for part, rows in self._parts.items():
            records = (_mapping(number, rows[number]) for number in range(len(rows)))
            read = read_records("records", records, self.read, object)
            for number, (image, captions, split) in enumerate(read):
                yield f"record {number}", _content(image), captions, split or part


def _mapping(number: int, row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if not (isinstance(row, tuple | list) and 2 <= len(row) <= 3):
        raise UserError(f"record {number}: expected (image, captions), (image, captions, split) or a mapping")
    return dict(zip(("image", "captions", "split"), row, strict=False))


def _indexed(rows: Any) -> Any:
    if hasattr(rows, "iterrows"):  # a DataFrame of pandas
        return rows.to_dict("records")
    return rows if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") else list(rows)


def _content(image: Any) -> str | bytes:
    """Return the absolute name of a file, or the encoded content of an image."""
    if isinstance(image, str | Path):
        return str(Path(image).expanduser().absolute())
    if isinstance(image, bytes):
        return image
    try:
        pixels = to_pixels(image)
    except BrokenImage as error:
        return str(error).encode()  # not an image, so it is counted as broken
    encoded = io.BytesIO()
    to_pil_image(pixels).save(encoded, "PNG")
    return encoded.getvalue()


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


# Archives ----------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path, shown: str) -> Path:
    """Unpack an archive, which messages call `shown`, into a new folder, and return the folder of the data.

    That is `folder`, or its only subfolder if there are no other files, except those that macOS adds.

    Raises:
        UserError: the archive is broken, empty, encrypted or too large when unpacked, or contains names
            outside of it, devices, or links to anything but its own files.
        OSError: the files cannot be written.
    """
    folder.mkdir()
    try:
        _extract(archive, folder, max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size))
        entries = [path for path in folder.iterdir() if path.name != "__MACOSX" and path.name[:2] != "._"]
        if not entries:
            raise ValueError("it is empty")
    except Exception as error:  # arbitrary archives raise nearly every kind of error
        clash = isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError)
        if isinstance(error, OSError) and error.errno is not None and not clash:  # an error of the disk
            raise
        raise UserError(
            f"{shown}: the archive is broken or unsafe ({reason_of(error)}); its files were discarded: give "
            "another archive"
        ) from error
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def _extract(archive: Path, folder: Path, limit: int) -> None:
    """Extract files and folders, and links to files as hard links.

    The standard library keeps all names within the folder as long as it contains no symbolic link: its `data`
    filter queries the file system, and long chains of links bypass it in some versions of Python.
    """
    with archive.open("rb") as head:
        is_zip = head.read(4) in (b"PK\3\4", b"PK\5\6")
    links = []
    opened: Any = zipfile.ZipFile(archive) if is_zip else tarfile.open(archive)
    with opened as file:
        for member in tqdm(file.infolist() if is_zip else file, desc="unpack", unit=" files"):
            limit -= BLOCK + (member.file_size if is_zip else member.size)
            if limit < 0:
                raise ValueError(f"it unpacks to more than {MAX_RATIO} times its size and 10 GB")
            if is_zip and stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"it contains the link {member.filename!r}; create a .tar file instead")
            if is_zip:
                file.extract(member, folder)
            elif member.issym() or member.islnk():
                links.append(member)
            else:
                file.extract(member, folder, filter="data")
        for link in links:
            base = posixpath.dirname(link.name) if link.issym() else ""
            target = posixpath.normpath(posixpath.join(base, link.linkname))
            if target.partition("/")[0] in ("", "..") or not (folder / target).is_file():
                raise ValueError(
                    f"it contains a link to something else than its files: {link.name!r} to {target!r}"
                )
            link.type, link.linkname = tarfile.LNKTYPE, target
            file.extract(link, folder, filter="data")
