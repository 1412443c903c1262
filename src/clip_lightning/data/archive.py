"""A data set in an archive somewhere, fetched by URL and known by its checksum."""

from __future__ import annotations

import hashlib
import re
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from clip_lightning.data.download import download
from clip_lightning.data.sources import default_folder, make_once
from clip_lightning.data.unpack import RefusedArchive, unpack
from clip_lightning.errors import UserError
from clip_lightning.terminal import public


def archive_folder(url: str, sha256: str | None) -> Path:
    """Where the content of this archive lies once it is fetched; the same wherever it is fetched from.

    Raises:
        UserError: the URL or the checksum is none.
    """
    _local_file(url)
    return default_folder() / _digest(url, sha256)[:16]


def fetch_archive(url: str, sha256: str | None) -> Path:
    """Fetch the archive and unpack it, once a machine; what is there already is not asked for again.

    A broken download goes on where it was. The archive is unpacked after its checksum has been found right,
    into a folder that is renamed when it is whole, and is then removed. One folder around everything else is
    taken off.

    Args:
        url: `https://`, `http://` or `file://` of a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz.
        sha256: of the archive, 64 hexadecimal digits.

    Returns:
        `archive_folder(url, sha256)`, for `read_captions`.

    Raises:
        UserError: it cannot be fetched, is another archive, or one that would do harm.
    """
    folder, wanted = archive_folder(url, sha256), _digest(url, sha256)

    def make(draft: Path) -> Path:
        archive = _local_file(url) or draft / "archive"
        if archive.parent != draft:
            _check(archive, wanted, url)
        elif not archive.exists():
            part = draft / "archive.part"
            download(url, part)
            try:
                _check(part, wanted, url)
            except UserError:
                part.unlink()
                raise
            part.rename(archive)
        try:
            return unpack(archive, draft / "files")
        except RefusedArchive as error:
            shutil.rmtree(draft)
            raise UserError(
                f"--data.url {public(url)}: {error}; nothing of it is kept, give another archive"
            ) from error

    return make_once(folder, make)


def _digest(url: str, sha256: str | None) -> str:
    digest = (sha256 or "").strip().lower()
    if re.fullmatch("[0-9a-f]{64}", digest):
        return digest
    given = (
        f"--data.sha256 {sha256!r} is no SHA-256" if sha256 else f"--data.url {public(url)} has no checksum"
    )
    raise UserError(f"{given}; give --data.sha256 the 64 digits that `sha256sum FILE` prints for the archive")


def _local_file(url: str) -> Path | None:
    """Return the file that a `file://` URL names, None for one on a server."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the URL itself is not shown: a part of a password may stand anywhere in it
        raise UserError(
            "--data.url is not a valid URL; expected https://SERVER/ARCHIVE, with / ? # @ : in a user or "
            "password written as %2F %3F %23 %40 %3A"
        ) from None
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(urllib.request.url2pathname(parts.path))
    if not known:
        raise UserError(
            f"--data.url {public(url)} is not a URL that can be fetched; expected https://SERVER/ARCHIVE, "
            "http://... or file:///FOLDER/ARCHIVE"
        )
    return None


def _check(archive: Path, wanted: str, url: str) -> None:
    try:
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--data.url {public(url)} cannot be read ({error.strerror or error})") from error
    if found != wanted:
        raise UserError(
            f"--data.url {public(url)} has the SHA-256 {found}, --data.sha256 says {wanted}; nothing of it "
            "is kept: try again, or correct the checksum if this is the archive you want"
        )
