"""Find captioned images: in a folder of this machine, or in data that is downloaded or written and cached.

Hugging Face data sets and data from Python are written once as a folder of images with a `captions.jsonl`.
All other code then reads these files like any other data.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import re
import stat
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fsspec.callbacks import TqdmCallback
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from clip_lightning.data.captions import SPLIT_WORDS, CaptionSet, parse_split, reading
from clip_lightning.data.formats import read_captions
from clip_lightning.data.image_formats import IMAGE_SUFFIXES
from clip_lightning.data.images import BrokenImage, open_image, to_pixels
from clip_lightning.data.readers import IMAGE_NAMES, RECOGNIZED, ReadOptions, find_names, read_records
from clip_lightning.data.scenes import write_scenes
from clip_lightning.data.shards.storage import call
from clip_lightning.errors import UserError, as_user_error, reason_of
from clip_lightning.files import cache_folder, make_once
from clip_lightning.terminal import note, public
from clip_lightning.wandb_fetch import ArtifactName, fetch, fetched

SCENES, SCENE_SIZE = 2500, 224
MAX_RATIO, ALWAYS_ALLOWED, BLOCK = 20, 10_000_000_000, 4096
"""An archive may unpack to 20 times its size or 10 GB; every file counts one block more than its size."""

WrittenRow = tuple[str, bytes | Path | str, list[str], str | None]
"""A name for messages; an encoded image, its file, or the reason why it has none; its captions and split."""


class Source(Protocol):
    """Data that may have to be downloaded. A new kind is a class with these methods, listed in KINDS."""

    def fetch(self) -> None:
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
        return cls(Path(text.partition(":")[2] or cache_folder("scenes") / f"{SCENES}-{SCENE_SIZE}"))

    def fetch(self) -> None:
        write_scenes(self.root, SCENES, SCENE_SIZE, seed=0)


@dataclass(frozen=True)
class Artifact:
    """A W&B artifact."""

    name: ArtifactName

    @classmethod
    def parse(cls, text: str) -> Artifact:
        """Parse `wandb:ENTITY/PROJECT/NAME:ALIAS`."""
        return cls(ArtifactName.parse(text.removeprefix("wandb:"), "--data.root wandb:"))

    def fetch(self) -> None:
        fetch(self.name)

    def folder(self) -> Path:
        return fetched(self.name).folder


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
            call(self.url, "get_file", archive, TqdmCallback({"desc": "download"}))
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


@dataclass(frozen=True)
class HubDataset:
    """A Hugging Face data set: `OWNER/NAME`, or the absolute path of a folder or Parquet file."""

    name: str
    subset: str | None = None
    revision: str | None = None
    read: ReadOptions = RECOGNIZED

    @classmethod
    def parse(cls, text: str) -> HubDataset:
        """Parse `hf:OWNER/NAME`, `hf:OWNER/NAME:SUBSET@REVISION`, or `hf:` and a path."""
        name = text.removeprefix("hf:")
        if name and Path(name).exists():
            return cls(str(Path(name).resolve()))
        match = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.-]+))?(?:@([\w./-]+))?", name)
        if not match:
            raise UserError(
                f"{text}: expected hf:OWNER/NAME, hf:OWNER/NAME:SUBSET@REVISION, or hf: and an existing "
                "folder or Parquet file"
            )
        return cls(match[1], match[2], match[3])

    def folder(self) -> Path:
        """Return the folder to which the data set is written; needs neither network nor `datasets`.

        A local data set that has changed has a different folder. A data set of the hub keeps its folder, and
        the version that was downloaded first; `@REVISION` selects another version.
        """
        key: list[Any] = [self.name, self.subset, self.revision]
        path = Path(self.name)
        if path.is_absolute():
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
            key = [self.name, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
        version = 1  # increase it when data sets are written differently
        text = json.dumps([version, *key, self.read.image_column, self.read.caption_column])
        return cache_folder("data") / f"hub-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def fetch(self) -> None:
        """Write the data set as a folder that `read_captions` reads, once per machine."""
        make_once(self.folder(), lambda draft: _write_rows(draft, self._rows()))

    def _rows(self) -> Iterator[WrittenRow]:
        source = f"hf:{self.name}"
        for name, rows, split in self.splits():
            typed = [column for column, kind in rows.features.items() if type(kind).__name__ == "Image"]
            usual = find_names(IMAGE_NAMES, typed) or (typed if len(typed) == 1 else [])
            options = replace(self.read, image_column=self.read.image_column or next(iter(usual), None))
            image, captions, own = options.find(source, rows.features)
            names = [column for column in rows.features if column in {image, *captions, own}]
            records = tqdm(undecoded(rows, image).select_columns(names), name, unit=" rows")
            read = read_records(source, records, options, (dict, bytes))
            for number, (content, texts, own_split) in enumerate(read):
                part = parse_split(own_split, source) if own else split
                yield f"{name} row {number}", self.content(content), texts, part

    @cached_property
    def _trusted(self) -> list[Path]:
        from datasets import config
        from huggingface_hub import constants

        caches = constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH
        return [Path(os.path.realpath(folder)) for folder in caches]

    def content(self, value: Any) -> bytes | str:
        """Return an encoded image of a row, or the reason why there is none.

        A data set from the hub must not make us read other files of this machine than those it downloaded.
        """
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return bytes(data)
        if not path:
            return "it has no image"
        file = Path(path).resolve()
        is_local = os.path.isabs(self.name)
        if not (is_local or any(file.is_relative_to(folder) for folder in self._trusted)):
            return "its image is not in the data set"
        with reading(file):
            return file.read_bytes() if file.is_file() else "No such file or directory"

    def splits(self) -> list[tuple[str, Any, str | None]]:
        """Return name, rows and `train`, `val`, `test` or None of the usual splits, or of the only one."""
        splits = [(name, rows, SPLIT_WORDS.get(name.lower())) for name, rows in self._load().items()]
        if len(splits) == 1:  # on the hub, data without splits is all in `train`
            return [(name, rows, None if split == "train" else split) for name, rows, split in splits]
        if others := [name for name, _, split in splits if split is None]:
            note(f"hf:{self.name}: left out the splits {', '.join(others)}")
        if len(others) == len(splits):
            raise UserError(f"hf:{self.name} has no split named {', '.join(SPLIT_WORDS)}; give other data")
        return [part for part in splits if part[2]]

    def _load(self) -> dict[str, Any]:
        loaded: Any = None
        with as_user_error(
            f"hf:{self.name} cannot be loaded",
            "check the name, the network and HF_HUB_OFFLINE, run `pip install datasets`, give a subset as "
            "hf:NAME:SUBSET, or, for data with a loading script, try hf:NAME@refs/convert/parquet",
        ):
            import datasets  # whose versions 4 and newer never run the data set's own code

            path = Path(self.name)
            if path.is_file():
                loaded = datasets.load_dataset("parquet", data_files=self.name)
            elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(self.name)
            else:
                loaded = datasets.load_dataset(self.name, self.subset, revision=self.revision)
        parts = loaded if isinstance(loaded, dict) else {loaded.split or "train": loaded}
        return {str(split): rows for split, rows in parts.items()}


def undecoded(rows: Any, column: str) -> Any:
    """Return the rows with the encoded images of a column."""
    kind = type(rows.features[column])
    return rows.cast_column(column, kind(decode=False)) if kind.__name__ == "Image" else rows


class Records:
    """Data from Python (see `CaptionDataModule`)."""

    def __init__(self, records: Any, read: ReadOptions) -> None:
        self.read = read
        self._parts: dict[str | None, Any] = {}
        for split, rows in (records if isinstance(records, Mapping) else {None: records}).items():
            if hasattr(rows, "iterrows"):  # a DataFrame of pandas
                rows = rows.to_dict("records")
            has_length = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")  # streams do not
            self._parts[split] = rows if has_length else [*rows]

    def fetch(self) -> None:
        make_once(self.folder(), lambda draft: _write_rows(draft, self._rows()))

    def folder(self) -> Path:
        return self._folder

    @cached_property
    def _folder(self) -> Path:
        sha = hashlib.sha256()
        for _, image, captions, split in self._rows():
            content = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else str(image)
            sha.update(json.dumps([content, captions, split]).encode())
        return cache_folder("data") / f"records-{sha.hexdigest()[:16]}"

    def _rows(self) -> Iterator[WrittenRow]:
        for part, rows in self._parts.items():
            records = (_mapping(number, rows[number]) for number in range(len(rows)))
            read = read_records("records", records, self.read, object)
            for number, (image, captions, split) in enumerate(read):
                yield f"record {number}", _encoded(image), captions, split or part


def _mapping(number: int, row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if not (isinstance(row, tuple | list) and 2 <= len(row) <= 3):
        raise UserError(f"record {number}: expected (image, captions), (image, captions, split) or a mapping")
    return dict(zip(("image", "captions", "split"), row, strict=False))


def _encoded(image: Any) -> Path | bytes | str:
    """Return the absolute path of a file, the encoded content of an image, or the reason why it has none."""
    if isinstance(image, str | Path):
        return Path(image).expanduser().absolute()
    if isinstance(image, bytes):
        return image
    try:
        encoded = io.BytesIO()
        to_pil_image(to_pixels(image)).save(encoded, "PNG")
        return encoded.getvalue()
    except BrokenImage as error:
        return str(error)


def _write_rows(folder: Path, rows: Iterable[WrittenRow]) -> Path:
    """Write rows to an empty folder, as images with a `captions.jsonl`.

    Images are stored unchanged and named by their content, so rows that repeat an image become captions of
    one image. A row without an image has the reason as the image's name: as there is no such file,
    `read_captions` counts it, and `max_broken` applies to it.
    """
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for place, image, captions, split in rows:
            if isinstance(image, bytes):
                try:  # JPEG has variants with other names, such as MPO
                    suffix = IMAGE_SUFFIXES.get(open_image(image).format or "", ".jpg")
                    name = f"{hashlib.sha256(image).hexdigest()[:32]}{suffix}"
                    path = folder / "images" / (split or "all") / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(image)
                    image = path.relative_to(folder)
                except BrokenImage as error:
                    image = str(error)
            name = str(image) if isinstance(image, Path) else f"{place} ({image})"
            file.write(json.dumps({"image": name, "captions": captions, "split": split}) + "\n")
    return folder


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

    That is `folder`, or its only subfolder if there are no other files, except those that macOS adds. Raise
    UserError if the archive is broken, empty, encrypted or too large when unpacked, or contains names outside
    of it, devices, or links to anything but its own files.
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
