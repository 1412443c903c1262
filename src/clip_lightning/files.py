"""Files and folders that are there whole or not at all, and where the user's cache lies."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
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
    draft = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft to write into, which takes the place of `folder` if nothing goes wrong, and is gone otherwise.

    What is in `folder` goes then, and not before; at no moment is there half of anything.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes it private
        _replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace_folder(draft: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(draft, folder)
        return
    attic = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        os.replace(folder, attic / folder.name)
        try:
            os.replace(draft, folder)
        except BaseException:
            os.replace(attic / folder.name, folder)
            raise
    finally:
        shutil.rmtree(attic)
