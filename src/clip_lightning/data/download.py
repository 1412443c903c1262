"""A file by URL, however often the connection breaks."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from clip_lightning.data.sources import require_space
from clip_lightning.errors import UserError
from clip_lightning.terminal import public

ATTEMPTS = 6
"""Failures in a row, with nothing received in between, after which it is given up."""
FIRST_WAIT = 1.0
"""Seconds before the second attempt; doubled before each further one."""
SILENCE = 60.0
"""Seconds without a byte after which a connection counts as broken."""
_CHUNK = 1 << 20
_PASSING = (408, 425, 429, *range(500, 600))


class _Interrupted(Exception):
    """What may go well at the next attempt."""


def download(url: str, path: Path) -> None:
    """Fetch a file into `path`, going on behind what is there already (HTTP Range), with progress on stderr.

    Nothing vouches for the content: a part may stem from another version of the file. Compare its checksum.

    Raises:
        UserError: the server refuses, or does not answer for several attempts; what came is kept.
        OSError: there is no room for it.
    """
    failures = 0
    while True:
        before = _size(path)
        try:
            return _go_on(url, path)
        except _Interrupted as error:
            failures = 1 if _size(path) > before else failures + 1
            if failures == ATTEMPTS:
                raise UserError(
                    f"--data.url {public(url)} cannot be fetched ({error}, {ATTEMPTS} times in a row); "
                    f"{_size(path)} bytes are kept, the same command goes on with them"
                ) from error
            time.sleep(FIRST_WAIT * 2 ** (failures - 1))


def _go_on(url: str, path: Path) -> None:
    start = _size(path)
    answer = _ask(url, start)
    if answer is None:
        return
    with answer:
        resumed = answer.status == 206
        start = start if resumed else 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        require_space(path.parent, (total or start) - start)
        bar = tqdm(
            total=total,
            initial=start,
            desc=_title(url),
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            mininterval=1,
        )
        with bar, path.open("ab" if resumed else "wb") as file:
            while chunk := _receive(answer):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(path) < total:
        raise _Interrupted(f"the connection ended after {_size(path)} of {total} bytes")


def _ask(url: str, start: int) -> Any:
    """The server's answer, from byte `start` on if it can; None when there is nothing behind it."""
    headers = {"User-Agent": "clip-lightning"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        answer = _open(url, headers)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return None
        if error.code in _PASSING:
            raise _Interrupted(f"HTTP {error.code} {error.reason}") from error
        raise UserError(
            f"--data.url {public(url)} is refused by the server (HTTP {error.code} {error.reason}); "
            "check the URL, and the user and password in it"
        ) from error
    except ValueError as error:  # the server asks for another way to authenticate
        raise UserError(f"--data.url {public(url)} is refused by the server ({error})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error)) from error
    if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        answer.close()
        raise _Interrupted("the server sent another range than it was asked for")
    return answer


def _open(url: str, headers: dict[str, str]) -> Any:
    """Open the URL; its `user:password@` is sent as HTTP's basic authentication, to this server alone."""
    parts = urlsplit(url)
    if parts.username is None:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SILENCE)
    host = parts.netloc.rpartition("@")[2]
    passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
    user, password = unquote(parts.username), unquote(parts.password or "")
    passwords.add_password(None, f"{parts.scheme}://{host}/", user, password, is_authenticated=True)
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
    return opener.open(
        urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers), timeout=SILENCE
    )


def _receive(answer: Any) -> bytes:
    # Apart from writing, whose errors no further attempt would mend. And not read(), which waits for a whole
    # chunk and loses what it has of it when the connection breaks.
    try:
        return bytes(answer.read1(_CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _title(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name or "download"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
