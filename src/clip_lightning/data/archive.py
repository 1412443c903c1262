"""A data set in an archive, fetched by URL and known by its SHA-256."""

from __future__ import annotations

import hashlib
import posixpath
import re
import shutil
import ssl
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, make_once
from clip_lightning.terminal import public

ATTEMPTS, WAIT, SILENCE = 3, 2.0, 60.0
"""Attempts to download, seconds between them, and seconds without a byte after which one has failed."""
MAX_RATIO, ALWAYS_ALLOWED, BLOCK = 20, 10_000_000_000, 4096
"""An archive may unpack to 20 times its size, and to 10 GB in any case; every file counts a block more."""
_NETWORK = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException, ValueError)


@dataclass(frozen=True)
class Archive:
    """A .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz, and the SHA-256 that it must have."""

    url: str
    sha256: str

    @classmethod
    def parse(cls, text: str) -> Archive:
        """Read `URL#sha256=HEX`, whose URL begins with https://, http:// or file://."""
        url, _, digest = text.partition("#sha256=")
        try:
            parts, shown = urlsplit(url), public(text)
            local = parts.scheme == "file"
            valid = parts.netloc in ("", "localhost") if local else parts.hostname and parts.port != 0
        except ValueError:  # not shown: parts of a password may be anywhere in it
            valid, shown = False, "URL (write / ? # @ : in a user or password as %2F %3F %23 %40 %3A)"
        if not (valid and re.fullmatch("[0-9a-fA-F]{64}", digest)):
            raise UserError(
                f"--data.root {shown}: expected https://SERVER/ARCHIVE#sha256=HEX (or http://, file:///) "
                "with the 64 digits that `sha256sum FILE` prints for the archive"
            )
        return cls(url, digest.lower())

    def folder(self) -> Path:
        """Return where the content is after `fetch`, wherever the archive came from."""
        return cache_folder("data") / self.sha256[:16]

    def fetch(self) -> None:
        """Download and unpack the archive, once per machine, if its checksum is right."""
        make_once(self.folder(), self._fill)

    def _fill(self, draft: Path) -> Path:
        shown, archive = f"--data.root {public(self.url)}", draft / "archive"
        if self.url.startswith("file:"):
            archive = Path(urllib.request.url2pathname(urlsplit(self.url).path))
        else:
            _download(self.url, archive)
        if not archive.is_file():
            raise UserError(f"{shown}: there is no such file")
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{shown} has the SHA-256 {found}, expected {self.sha256}; nothing of it is kept: try again, "
                "or correct the checksum if this is the archive you want"
            )
        try:
            return unpack(archive, draft / "files")
        except RefusedArchive as error:
            raise UserError(f"{shown}: {error}; nothing of it is kept, give another archive") from error


def _download(url: str, path: Path) -> None:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
    if parts.username is not None:  # for this server alone, wherever it redirects to
        user, password = unquote(parts.username), unquote(parts.password or "")
        passwords.add_password(None, f"{parts.scheme}://{host}/", user, password, is_authenticated=True)
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
    opener.addheaders = [("User-Agent", "clip-lightning")]
    for attempt in range(1, ATTEMPTS + 1):
        try:
            address = parts._replace(netloc=host).geturl()
            with opener.open(address, timeout=SILENCE) as answer, path.open("wb") as file:
                total = int(answer.headers.get("Content-Length", 0))
                with tqdm.wrapattr(file, "write", total or None, desc="download", mininterval=1) as out:
                    shutil.copyfileobj(answer, out, 1 << 20)
                if file.tell() >= total:
                    return
                raise ConnectionError(f"the connection ended after {file.tell()} of {total} bytes")
        except _NETWORK as error:
            code = 503
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                code = error.code
            if attempt == ATTEMPTS or (code < 500 and code not in (408, 425, 429)):
                raise UserError(
                    f"--data.root {public(url)} cannot be downloaded ({error or type(error).__name__}); "
                    "check the URL, the user and password in it, and the network"
                ) from error
            time.sleep(WAIT)


class RefusedArchive(ValueError):
    """The archive is broken or would do harm; the message gives the reason without the archive's name."""


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into `folder`, which is made.

    Returns:
        `folder`, or the one folder in it that everything is in, apart from what macOS adds.

    Raises:
        RefusedArchive: it is not an archive, broken, encrypted, too large when unpacked, or holds names that
            lead out of it, devices, or links to anything but a file of it.
        OSError: it cannot be written.
    """
    folder.mkdir()
    try:
        _extract(archive, folder, max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size))
    except Exception as error:  # archives from elsewhere raise nearly every kind of error
        clash = isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError)
        if isinstance(error, OSError) and error.errno is not None and not clash:  # the disk's
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RefusedArchive(f"the archive is broken or unsafe ({reason})") from error
    entries = [path for path in folder.iterdir() if path.name != "__MACOSX" and path.name[:2] != "._"]
    if not entries:
        raise RefusedArchive("the archive is empty")
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def _extract(archive: Path, folder: Path, limit: int) -> None:
    """Extract files and folders, and links to them as hard links.

    The standard library keeps names within the folder, as long as no symbolic link is in it: its `data`
    filter asks the file system, which long chains of links have fooled in some versions of Python.
    """
    with archive.open("rb") as head:
        is_zip = head.read(4) in (b"PK\3\4", b"PK\5\6")
    links = []
    opened: Any = zipfile.ZipFile(archive) if is_zip else tarfile.open(archive)
    with opened as file:
        for member in tqdm(file.infolist() if is_zip else file, desc="unpack", unit=" files", mininterval=1):
            limit -= BLOCK + (member.file_size if is_zip else member.size)
            if limit < 0:
                raise ValueError(f"it unpacks to more than {MAX_RATIO} times its size and 10 GB")
            if not is_zip and (member.issym() or member.islnk()):
                links.append(member)
            elif not is_zip:
                file.extract(member, folder, filter="data")
            elif stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"it holds a link, {member.filename!r}; pack it as .tar")
            else:
                file.extract(member, folder)
        for link in links:
            base = posixpath.dirname(link.name) if link.issym() else ""
            target = posixpath.normpath(posixpath.join(base, link.linkname))
            if target.partition("/")[0] in ("", "..") or not (folder / target).is_file():
                raise ValueError(f"it holds a link, {link.name!r}, to {target!r}, which is not a file of it")
            link.type, link.linkname = tarfile.LNKTYPE, target
            file.extract(link, folder, filter="data")
