"""Files and folders that are there whole or not at all, and where the user's cache lies."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where things of this kind are kept between runs: below `~/.cache`, or where XDG_CACHE_HOME says."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "clip-lightning" / kind


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file whole, so that no reader, killed run or lost power ever leaves half of it.

    Folders on the way to it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def is_draft(name: str) -> bool:
    """Return whether `write_atomically` gives this name to a file that it has not finished."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


@contextlib.contextmanager
def whole_folder(folder: Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """Give a draft to write into, which replaces `folder` if nothing goes wrong and is removed otherwise.

    What is in `folder` is removed then, and not before; at no moment is there half of anything.

    Args:
        folder: the folder to write.
        keep: names in `folder` that stay, unless the draft has something of the same name.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes it private
        _replace_folder(draft, folder, keep)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace_folder(draft: Path, folder: Path, keep: Collection[str]) -> None:
    if not folder.exists():
        os.replace(draft, folder)
        return
    attic = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    old = attic / folder.name
    try:
        os.replace(folder, old)
        try:
            os.replace(draft, folder)
        except BaseException:
            os.replace(old, folder)
            raise
        for name in keep:
            if not os.path.lexists(folder / name):
                os.replace(old / name, folder / name)
    except BaseException:
        if not old.exists():  # else it holds what could not be moved
            attic.rmdir()
        raise
    shutil.rmtree(attic)
