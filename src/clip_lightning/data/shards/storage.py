"""Files on this machine or behind a URL (`s3://`, `gs://`, `hf://`, `https://`), through fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from filelock import FileLock

from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import cache_folder
from clip_lightning.terminal import public

_ATTEMPTS = 4
_LONGEST_FETCH = 3600  # seconds without a byte, after which a draft is that of a process that was killed
_TAR = re.compile(r".*\.(tar(\.\w+)?|tgz)")


class MissingFile(UserError, FileNotFoundError):
    """A file that is not there."""


def is_url(source: str) -> bool:
    """Return whether a source is not a path of this machine."""
    return "://" in source


def join(source: str, *names: str) -> str:
    """Return the address of a file or folder below a source."""
    return "/".join((source.rstrip("/"), *names)) if is_url(source) else str(Path(source, *names))


def call(source: str, method: str, *arguments: Any) -> Any:
    """Call a method of fsspec's for a path or URL; for a URL again after a while if it fails, as networks do.

    Raises:
        MissingFile: there is no such file.
        UserError: it cannot be read here, or not at the moment.
    """
    try:
        system, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise UserError(f"{public(source)} cannot be read here: {' '.join(str(error).split())}") from error
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return getattr(system, method)(path, *arguments)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFile(f"there is no {public(source)}") from error
        except Exception as error:  # stores also raise what their libraries have
            if attempt == _ATTEMPTS or not is_url(source):
                reason = public(" ".join(str(error).split())[:300]) or type(error).__name__
                raise RunFailed(f"{public(source)} cannot be read here: {reason}") from error
            time.sleep(2**attempt / 2)


def known(source: str) -> tuple[str, int]:
    """Return what a file is known by without asking another machine: its name, and its size if it is here."""
    return Path(public(source)).name, 0 if is_url(source) else os.path.getsize(source)


def identity(source: str) -> str:
    """Return the size of a file, and its ETag or the time of its last change."""
    info = call(source, "info")
    return str(
        [info.get(name) for name in ("size", "ETag", "etag", "mtime", "LastModified", "Last-Modified")]
    )


def holds_tars(source: str) -> bool:
    """Return whether a source is a tar, a pattern or folder of tars, or a URL, which can be nothing else."""
    return is_url(source) or bool(_TAR.fullmatch(source)) or any(Path(source).glob("*.tar"))


def expand(source: str) -> list[str]:
    """List the files that a source names, in order: a pattern with `{00..09}`, `{a,b}` or `*`, or a folder.

    Raises:
        UserError: it names no file.
    """
    found: list[str] = []
    for pattern in _without_braces(source):
        if not _TAR.fullmatch(pattern):
            pattern = join(pattern, "*.tar")
        if "*" in pattern:
            protocol = f"{pattern.partition('://')[0]}://" if is_url(pattern) else ""
            found += sorted(name if is_url(name) else protocol + name for name in call(pattern, "glob"))
        elif is_url(pattern) or Path(pattern).is_file():
            found.append(pattern)
        else:
            raise UserError(f"there is no {pattern}")
    if not found:
        raise UserError(
            f"{public(source)} names no file; expected a folder of uncompressed .tar files, or a pattern "
            "such as 'DIR/{00000..00099}.tar' or 'DIR/*.tar'"
        )
    return list(dict.fromkeys(found))


def _without_braces(pattern: str) -> list[str]:
    """Write out `{00..09}` and `{a,b}`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    choices = match[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in _without_braces(f"{before}{choice}{after}")]


class Mirror:
    """Copies of remote files in the cache folder, `budget` bytes of them; those unread for longest go first.

    Several processes may share the folder. A file that is open stays readable when its copy is removed.
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.folder = budget, cache_folder("shards") / "copies"

    def open(self, url: str, key: str, sha256: str = "") -> BinaryIO:
        """Open a file of this machine, or the copy of a remote one, which is fetched if it is not there.

        The name of the copy is `key`; it must have this checksum (hex) when it arrives, if one is given.
        """
        if not is_url(url):
            return open(url, "rb")
        path = self.folder / key
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return path.open("rb")
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{key}.lock")):
                if not path.exists():
                    self._fetch(url, path, sha256)

    def _fetch(self, url: str, path: Path, sha256: str) -> None:
        draft = path.with_name(f"{path.name}.tmp")  # whoever writes it holds the lock
        call(url, "get_file", str(draft))
        with draft.open("rb") as content:
            if sha256 and hashlib.file_digest(content, "sha256").hexdigest() != sha256:
                raise RunFailed(f"{public(url)} is not what was written: its checksum differs")
        os.replace(draft, path)
        with contextlib.suppress(FileNotFoundError):  # another process removes copies, too
            files = [(file.stat(), file) for file in self.folder.iterdir() if file.suffix != ".lock"]
            left = self.budget
            for stat, file in sorted(files, key=lambda each: -each[0].st_mtime_ns):
                left -= stat.st_size
                is_draft = file.suffix == ".tmp" and stat.st_mtime > time.time() - _LONGEST_FETCH
                if left < 0 and file != path and not is_draft:
                    file.unlink()
