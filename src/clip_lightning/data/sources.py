"""Data that is fetched once and kept: where it lies, and how it comes to lie there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder


def default_folder() -> Path:
    """Where fetched data sets lie, each in a folder named by what it was made from."""
    return cache_folder("data")


def make_once(folder: Path, make: Callable[[Path], Path]) -> Path:
    """The folder, which is made first if it is not there, by one process while the others wait.

    A process killed at any time leaves no `folder`, only a draft beside it, with which the next one goes on.

    Args:
        folder: what is wanted.
        make: fills the draft folder it is given, which may hold what a killed process had done, and says
            which folder in it (or the draft itself) is the finished one.

    Raises:
        UserError: there is no room, or no right to write.
    """
    if folder.is_dir():
        return folder
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                draft.mkdir(exist_ok=True)
                made = make(draft)
                # or lost power could leave the new name with files that never reached the disk
                if hasattr(os, "sync"):
                    os.sync()
                os.replace(made, folder)
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"data cannot be written to {folder.parent} ({error.strerror or error}); free some space there, "
            "or set XDG_CACHE_HOME to a folder with room"
        ) from error
    return folder


def require_space(folder: Path, size: int) -> None:
    """Complain as a full disk does, but before it is full.

    Raises:
        OSError: fewer than `size` bytes are free where `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
