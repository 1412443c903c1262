"""Unpacking an archive from elsewhere, which may be made to do harm.

Nothing but folders and plain files is ever written, by a few lines of our own: every name is checked as text
first, and as no link is made, no name can lead anywhere else than it says. (The `data` filter of tarfile asks
the file system instead, which long chains of links have fooled; zipfile has no filter.) A link to a file of
the archive becomes a copy of that file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from tqdm import tqdm

from clip_lightning.data.sources import require_space

MAX_RATIO = 20
ALWAYS_ALLOWED = 10_000_000_000
"""An archive may unpack to `MAX_RATIO` times its size, and to this many bytes anyway."""
BLOCK = 4096
"""Bytes that even an empty file is counted as, so that a million of them are noticed."""
LARGEST_READ = 1 << 24
_CHUNK = 1 << 20
_DECOMPRESSORS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile),
    # an encrypted member, a method of compression that is not built in, a header cut short
    *(EOFError, RuntimeError, NotImplementedError, struct.error),
    # a name that is empty or not in the encoding that it claims, a size or a place that no file can have
    *(IndexError, ValueError, OverflowError),
)


class RefusedArchive(ValueError):
    """It is broken or would do harm; the message says why, without the archive's name."""


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz into `folder`, which is emptied first.

    Left out is what macOS puts beside the files (`__MACOSX`, `._name`). Owners, rights and times are dropped.

    Returns:
        `folder`, or the one folder in it that everything lies in.

    Raises:
        RefusedArchive: it is no archive, broken, encrypted, too large unpacked (`MAX_RATIO`), or holds
            absolute names, `..`, backslashes, links to anything but a file of it, devices, or a name twice,
            upper and lower case being the same.
        OSError: there is no room for it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = _Writer(folder, max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size))
    try:
        for member in tqdm(_members(archive), desc="unpack", unit=" files", mininterval=1):
            writer.add(member)
        writer.copy_links()
    except RefusedArchive:
        raise
    except _BROKEN as error:
        raise RefusedArchive(f"the archive is broken ({_first_line(error)})") from error
    except OSError as error:
        if error.errno is None:  # from bz2, not from the disk
            raise RefusedArchive(f"the archive is broken ({_first_line(error)})") from error
        raise
    entries = list(folder.iterdir())
    if not entries:
        raise RefusedArchive("the archive is empty")
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# What is in it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    name: str
    kind: Literal["file", "folder", "link", "special"]
    size: int = 0
    open: Callable[[], IO[bytes] | None] = lambda: None
    target: str = ""
    """Of a link: the name, from the archive's top, of what it leads to."""


def _members(archive: Path) -> Iterator[_Member]:
    with archive.open("rb") as file:
        head = file.read(6)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_members(archive)
    opener = next((opener for magic, opener in _DECOMPRESSORS.items() if head.startswith(magic)), None)
    return _tar_members(opener(archive) if opener else archive.open("rb"))


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            # Only Unix notes what kind of file it was.
            kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0
            if kind == stat.S_IFLNK:
                with file.open(info) as link:
                    target = link.read(BLOCK).decode(errors="replace")
                yield _Member(info.filename, "link", target=_seen_from_top(info.filename, target))
            elif info.is_dir():
                yield _Member(info.filename, "folder")
            elif kind in (0, stat.S_IFREG):
                yield _Member(info.filename, "file", info.file_size, partial(file.open, info))
            else:
                yield _Member(info.filename, "special")


def _tar_members(stream: Any) -> Iterator[_Member]:
    with stream:
        try:
            bounded: Any = _Bounded(stream)
            file = tarfile.open(fileobj=bounded, mode="r:")
        except tarfile.ReadError as error:
            raise RefusedArchive(
                "the archive is no .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz, or broken"
            ) from error
        with file:
            while (info := file.next()) is not None:
                file.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if info.issym():
                    yield _Member(info.name, "link", target=_seen_from_top(info.name, info.linkname))
                elif info.islnk():
                    yield _Member(info.name, "link", target=posixpath.normpath(info.linkname))
                elif info.isdir():
                    yield _Member(info.name, "folder")
                elif info.isreg():
                    yield _Member(info.name, "file", info.size, partial(file.extractfile, info))
                else:
                    yield _Member(info.name, "special")


def _seen_from_top(name: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


class _Bounded:
    """tarfile reads an extended header at once, however many gigabytes it says that it has."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_READ:
            raise RefusedArchive(f"the archive has a header of {size} bytes")
        return bytes(self._stream.read(size))


# Writing it ---------------------------------------------------------------------------------------------


class _Writer:
    """Writes members below a folder that is empty at first, and counts what that takes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._written = 0
        self._names: dict[str, str] = {}
        """Each name as a file system without upper and lower case has it → as it is, a folder with `/`."""
        self._links: list[tuple[str, str]] = []

    def add(self, member: _Member) -> None:
        parts = _checked_parts(member.name)
        if not parts or "__MACOSX" in parts or parts[-1].startswith("._"):
            return
        name = "/".join(parts)
        if member.kind == "special":
            raise RefusedArchive(f"the archive holds a device or the like, {member.name!r}")
        self._take_names(parts, is_folder=member.kind == "folder")
        path = self.folder / name
        self._count(member.size, written=BLOCK)
        if member.kind == "folder":
            path.mkdir(parents=True, exist_ok=True)
        elif member.kind == "link":
            self._links.append((name, member.target))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source:  # type: ignore[union-attr]
                self._write(source, path)

    def copy_links(self) -> None:
        """Put in place of each link the file that it leads to, once all files are there."""
        links = {name for name, _ in self._links}
        for name, target in self._links:
            known = self._names.get(_folded(target))
            if known != target or target in links:
                raise RefusedArchive(
                    f"the archive holds a link, {name!r}, to {target!r}, which is no file of it"
                )
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with (self.folder / target).open("rb") as source:
                self._write(source, path)

    def _write(self, source: IO[bytes], path: Path) -> None:
        with path.open("xb") as file:
            while chunk := source.read(_CHUNK):
                self._count(0, written=len(chunk))
                file.write(chunk)

    def _count(self, announced: int, written: int = 0) -> None:
        """Refuse what is too much, by what a header says before it is written, and by what really comes."""
        self._written += written
        if self._written + announced > self.limit:
            raise RefusedArchive(
                f"the archive unpacks to more than {self.limit / 1e9:.1f} GB, or {MAX_RATIO} times its size"
            )
        if announced:
            require_space(self.folder, announced)

    def _take_names(self, parts: tuple[str, ...], *, is_folder: bool) -> None:
        for depth in range(1, len(parts) + 1):
            is_last = depth == len(parts)
            name = "/".join(parts[:depth]) + ("" if is_last and not is_folder else "/")
            key = _folded(name.rstrip("/"))
            before = self._names.get(key)
            if before is None:
                self._names[key] = name
            elif before != name or not name.endswith("/"):
                raise RefusedArchive(
                    f"the archive holds {before!r} and {name!r}, which are one file on some disks"
                )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _checked_parts(name: str) -> tuple[str, ...]:
    if name.startswith("/") or "\\" in name or "\0" in name or re.match("[A-Za-z]:/", name):
        raise RefusedArchive(f"the archive holds an absolute name or one with backslashes, {name!r}")
    parts = PurePosixPath(name).parts
    if ".." in parts:
        raise RefusedArchive(f"the archive holds a name that leads out of it, {name!r}")
    return parts
