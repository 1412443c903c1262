"""Download a data set in an archive by URL, and verify its SHA-256."""

from __future__ import annotations

import hashlib
import posixpath
import re
import stat
import tarfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.callbacks import TqdmCallback
from tqdm import tqdm

from clip_lightning.data.shards.storage import call
from clip_lightning.errors import UserError, reason_of
from clip_lightning.files import cache_folder, make_once
from clip_lightning.terminal import public

MAX_RATIO, ALWAYS_ALLOWED, BLOCK = 20, 10_000_000_000, 4096
"""An archive may unpack to 20 times its size or 10 GB; every file counts one block more than its size."""


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
        try:
            return unpack(archive, draft / "files")
        except RefusedArchive as error:
            raise UserError(f"{shown}: {error}; its files were discarded: give another archive") from error


class RefusedArchive(ValueError):
    """The archive is broken or unsafe; the message is the reason without the archive's name."""


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into `folder`, which is created.

    Returns:
        `folder`, or its only subfolder if there are no other files, except those that macOS adds.

    Raises:
        RefusedArchive: the file is not an archive, is broken or encrypted, is too large when unpacked, or
            contains names outside of it, devices, or links to anything but its own files.
        OSError: the files cannot be written.
    """
    folder.mkdir()
    try:
        _extract(archive, folder, max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size))
    except Exception as error:  # arbitrary archives raise nearly every kind of error
        clash = isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError)
        if isinstance(error, OSError) and error.errno is not None and not clash:  # an error of the disk
            raise
        raise RefusedArchive(f"the archive is broken or unsafe ({reason_of(error)})") from error
    entries = [path for path in folder.iterdir() if path.name != "__MACOSX" and path.name[:2] != "._"]
    if not entries:
        raise RefusedArchive("the archive is empty")
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
            if not is_zip and (member.issym() or member.islnk()):
                links.append(member)
            elif not is_zip:
                file.extract(member, folder, filter="data")
            elif stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"it contains the link {member.filename!r}; create a .tar file instead")
            else:
                file.extract(member, folder)
        for link in links:
            base = posixpath.dirname(link.name) if link.issym() else ""
            target = posixpath.normpath(posixpath.join(base, link.linkname))
            if target.partition("/")[0] in ("", "..") or not (folder / target).is_file():
                raise ValueError(
                    f"it contains a link to something else than its files: {link.name!r} to {target!r}"
                )
            link.type, link.linkname = tarfile.LNKTYPE, target
            file.extract(link, folder, filter="data")
