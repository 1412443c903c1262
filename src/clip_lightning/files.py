"""Write files and folders atomically, and find the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from clip_lightning.errors import UserError


def cache_folder(kind: str) -> Path:
    """Return the folder for cached files of this kind, in XDG_CACHE_HOME or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "clip-lightning" / kind


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a draft to write to, which replaces the file at the end, or is removed after an error.

    The file is never incomplete, even if the process is killed or power is lost. Missing parent folders are
    created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of a file completely or not at all."""
    with complete_file(path) as draft:
        draft.write_bytes(data)


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write JSON like `write_atomically`, with `default` for other types; invalid characters are replaced."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=default) + "\n"
    write_atomically(path, text.encode(errors="replace"))


@contextlib.contextmanager
def whole_folder(folder: Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """Yield a draft folder to write to, which replaces `folder` at the end, or is removed after an error.

    The old content of `folder` is removed only then, so the folder is never incomplete. Its files
    and folders named in `keep` are moved into the new one unless the draft has the same name.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = draft.with_name(f"{draft.name}-old")
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp creates a private folder
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
        for name in keep:
            if not (folder / name).exists():
                os.replace(old / name, folder / name)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(draft, ignore_errors=True)


def make_once(folder: Path, fill: Callable[[Path], Path]) -> None:
    """Create a folder of data, unless it exists, in one process while others wait.

    `fill` writes into an empty draft folder and returns it, or a folder in it, which becomes `folder`. A
    process that is killed leaves only the draft next to it, which the next process removes.
    """
    if folder.is_dir():
        return
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")), contextlib.ExitStack() as at_end:
            shutil.rmtree(draft, ignore_errors=True)
            at_end.callback(shutil.rmtree, draft, ignore_errors=True)
            if not folder.is_dir():
                draft.mkdir()
                filled = fill(draft)
                if hasattr(os, "sync"):  # otherwise the name could survive lost power, but not the files
                    os.sync()
                os.replace(filled, folder)
    except OSError as error:
        raise UserError(
            f"data cannot be written to {folder.parent} ({error.strerror or error}); free some space there, "
            "or set XDG_CACHE_HOME to a folder with more space"
        ) from error
