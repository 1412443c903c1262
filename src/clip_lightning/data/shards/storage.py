"""Files on this machine or behind a URL (`s3://`, `gs://`, `hf://`, `https://`), through fsspec."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand
from filelock import FileLock

from clip_lightning.errors import UserError
from clip_lightning.terminal import public

_BLOCK = 4 << 20


def litdata() -> ModuleType:
    """The package, kept from asking a server for news of itself when it is imported."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    import litdata
    import litdata.streaming

    return litdata


def is_url(source: str) -> bool:
    """Whether it is fetched through fsspec."""
    return "://" in source


def join(source: str, *names: str) -> str:
    """A file or folder below a source."""
    return "/".join((source.rstrip("/"), *names)) if is_url(source) else str(Path(source, *names))


@contextmanager
def opened(source: str) -> Iterator[BinaryIO]:
    """Read a file from its beginning.

    Raises:
        UserError: its protocol is unknown here, or needs a package that is not installed.
        OSError: it is not there, or cannot be read.
    """
    if not is_url(source):
        with open(source, "rb") as file:
            yield file
        return
    system, path = _system(source)
    try:
        remote = system.open(path, "rb", block_size=_BLOCK)
    except OSError:
        raise
    except Exception as error:  # stores also raise what their libraries have: no credentials, no such bucket
        raise OSError(f"{type(error).__name__}: {error}") from error
    with remote as file:
        yield file


def read(source: str) -> bytes | None:
    """A whole small file, or None where there is none.

    Raises:
        UserError: it cannot be reached.
    """
    try:
        with opened(source) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{public(source)} cannot be read: {_reason(error)}") from error


def expand(source: str) -> list[str]:
    """The files that a source names, in order: a pattern with `{00..09}`, `{a,b}` or `*`, or a folder's tars.

    Raises:
        UserError: none.
    """
    try:
        patterns = list(braceexpand(source))
    except ValueError as error:
        raise UserError(f"{source} has a brace without its other half") from error
    found = [name for pattern in patterns for name in _glob(pattern)]
    if not found:
        raise UserError(
            f"{source} names no file; expected a folder of .tar files, or a pattern such as "
            "'DIR/{00000..00099}.tar' or 'DIR/*.tar'"
        )
    return list(dict.fromkeys(found))


def holds_tars(source: str) -> bool:
    """Whether a source is tars, or a URL, which can be nothing else."""
    path = Path(source)
    return is_url(source) or source.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar")))


def identities(files: Sequence[str]) -> list[tuple[str, int]]:
    """What tells files from others of the same names, unread: sizes, of those on this machine."""
    return [(file, 0 if is_url(file) else Path(file).stat().st_size) for file in files]


def size_of(source: str) -> int:
    """Bytes of a file; of a remote one its store is asked.

    Raises:
        UserError: it is not there, or cannot be reached.
    """
    try:
        if not is_url(source):
            return Path(source).stat().st_size
        system, path = _system(source)
        return int(system.info(path)["size"] or 0)
    except UserError:
        raise
    except Exception as error:  # stores also raise what their libraries have
        raise UserError(f"{public(source)} cannot be read: {_reason(error)}") from error


def _glob(pattern: str) -> list[str]:
    """Files of a pattern without braces; of a folder its tars."""
    if not is_url(pattern):
        path = Path(pattern)
        if path.is_dir():
            return sorted(str(file) for file in path.glob("*.tar"))
        if "*" not in pattern:
            if not path.exists():
                raise UserError(f"there is no {pattern}")
            return [pattern]
        base = Path(path.anchor) if path.is_absolute() else Path()
        return sorted(str(file) for file in base.glob(str(path.relative_to(path.anchor))))
    system, name = _system(pattern)
    if "*" not in pattern and pattern.endswith(".tar"):
        return [pattern]
    try:
        names = system.glob(name if "*" in pattern else f"{name.rstrip('/')}/*.tar")
    except Exception as error:  # stores also raise what their libraries have
        raise UserError(f"{public(pattern)} cannot be listed: {_reason(error)}") from error
    return sorted(system.unstrip_protocol(name) for name in names)


def _system(source: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise UserError(f"{public(source)} cannot be read here: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return public(" ".join(words.split())[:300])


class Mirror:
    """Copies of remote files in a folder of this machine, as many as `keep` at a time.

    Several processes may share the folder. A copy that is removed while another process is about to read
    it is fetched again.
    """

    def __init__(self, source: str, folder: Path, keep: int) -> None:
        self.source, self.folder, self.keep = source, folder, keep

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """The local copy of a file, checked against its size and checksum when it arrives.

        Raises:
            OSError: it cannot be fetched, or is not what it should be.
        """
        path = self.folder / name
        if not self._touch(path, size):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{name}.lock"):
                if not self._touch(path, size):
                    self._download(name, path, sha256)
                    self._evict(path)
        return path

    def _touch(self, path: Path, size: int) -> bool:
        try:
            os.utime(path)
            return path.stat().st_size == size
        except FileNotFoundError:
            return False

    def _download(self, name: str, path: Path, sha256: str) -> None:
        draft = path.with_name(f".{name}.{os.getpid()}.tmp")
        digest = hashlib.sha256()
        try:
            with opened(join(self.source, name)) as remote, draft.open("wb") as file:
                while block := remote.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != sha256:
                raise OSError(
                    f"{public(join(self.source, name))} is not what was written: its checksum differs"
                )
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def _evict(self, newest: Path) -> None:
        """Remove those that were not read for longest."""
        ages = []
        for path in self.folder.iterdir():
            if not path.name.startswith(".") and path.suffix == ".bin" and path != newest:
                try:
                    ages.append((path.stat().st_mtime_ns, path))
                except FileNotFoundError:
                    continue  # another process was first
        for _, path in sorted(ages, reverse=True)[self.keep - 1 :]:
            path.unlink(missing_ok=True)
