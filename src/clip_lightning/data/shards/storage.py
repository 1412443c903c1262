"""Access files on this machine or at URLs (`s3://`, `gs://`, `hf://`, `https://`) with fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
import time
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
import fsspec
from filelock import FileLock
from fsspec.callbacks import Callback

from clip_lightning.errors import RunFailed, UserError, reason_of
from clip_lightning.files import cache_folder
from clip_lightning.terminal import public

_ATTEMPTS = 4
SILENCE = 60.0  # seconds without data after which an attempt fails
_TAR = re.compile(r".*\.(tar(\.\w+)?|tgz)")


class MissingFile(UserError, FileNotFoundError):
    """A file or URL does not exist."""


def is_url(source: str) -> bool:
    """Return whether a source is a URL, not a path on this machine."""
    return "://" in source


def call(source: str, method: str, target: Path | None = None, progress: Callback | None = None) -> Any:
    """Call a method of fsspec for a path or URL; calls for URLs are retried after a pause if they fail.

    `get_file` copies to `target` and reports its `progress`.
    """
    details = [] if target is None else [str(target)]
    options = {} if progress is None else {"callback": progress}
    # aiohttp's default limit is five minutes per file, regardless of its size.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    client = {"client_kwargs": {"timeout": timeout}} if source.startswith(("http://", "https://")) else {}
    try:
        system, path = fsspec.core.url_to_fs(source, **client)
    except (ImportError, ValueError) as error:
        raise UserError(f"{public(source)} cannot be read: {reason_of(error)}") from error
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return getattr(system, method)(path, *details, **options)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFile(f"{public(source)} does not exist") from error
        except Exception as error:  # stores also raise the errors of their own libraries
            if attempt == _ATTEMPTS or not is_url(source):
                raise RunFailed(f"{public(source)} cannot be read: {public(reason_of(error))}") from error
            time.sleep(2**attempt / 2)


def known(source: str) -> tuple[str, int]:
    """Identify a file without using the network: by its name, and by its size if it is on this machine."""
    return Path(public(source)).name, 0 if is_url(source) else os.path.getsize(source)


def holds_tars(source: str) -> bool:
    """Return whether a source is a tar, a pattern or folder of tars, or a URL, which must be of tars."""
    return is_url(source) or bool(_TAR.fullmatch(source)) or any(Path(source).glob("*.tar"))


def expand(source: str) -> list[str]:
    """List the tars of a source in order: of a pattern with `{00..09}`, `{a,b}` or `*`, or of a folder."""
    files: list[str] = []
    for name in _without_braces(source):
        pattern = name if _TAR.fullmatch(name) else posixpath.join(name, "*.tar")
        found = [pattern] if is_url(pattern) or Path(pattern).is_file() else []
        if "*" in pattern:
            protocol = f"{pattern.partition('://')[0]}://" if is_url(pattern) else ""
            found = sorted(name if is_url(name) else protocol + name for name in call(pattern, "glob"))
        if not found:
            raise UserError(
                f"{public(pattern)} matches no file; expected a folder of uncompressed .tar files, or a "
                "pattern such as 'DIR/{00000..00099}.tar' or 'DIR/*.tar'"
            )
        files += found
    return list(dict.fromkeys(files))


def _without_braces(pattern: str) -> list[str]:
    """Expand `{00..09}` and `{a,b}`."""
    match = re.fullmatch(r"(.*)\{([^{}]*)\}([^{}]*)", pattern)  # with the last braces
    if not match:
        return [pattern]
    before, inside, after = match.groups()
    texts = inside.split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        texts = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [f"{start}{text}{after}" for start in _without_braces(before) for text in texts]


def open_copy(url: str, key: str, sha256: str, budget: float) -> BinaryIO:
    """Open a file, or the cached copy `key` of a remote file, which must have this checksum if it is known.

    Several processes may share the copies. If they have more than `budget` bytes, those that were not read
    for the longest time are removed; an open file stays readable.
    """
    if not is_url(url):
        return open(url, "rb")
    path = cache_folder("shards") / "copies" / key
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return path.open("rb")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{key}.lock")):
            if not path.exists():
                _fetch(url, path, sha256, budget)


def _fetch(url: str, path: Path, sha256: str, budget: float) -> None:
    draft = path.with_name(f"{path.name}.tmp")  # the writer holds the lock
    call(url, "get_file", draft)
    with draft.open("rb") as content:
        if sha256 and hashlib.file_digest(content, "sha256").hexdigest() != sha256:
            raise RunFailed(f"{public(url)} has changed since the conversion: its checksum differs")
    os.replace(draft, path)
    with contextlib.suppress(FileNotFoundError):  # other processes may remove copies as well
        copies = [copy for copy in path.parent.iterdir() if copy.suffix not in (".lock", ".tmp")]
        for copy in sorted(copies, key=lambda copy: -copy.stat().st_mtime_ns):
            budget -= copy.stat().st_size
            if budget < 0 and copy != path:
                copy.unlink()
