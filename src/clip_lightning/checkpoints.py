"""Checkpoint files: whole or not there, the one before kept, damage found before it is trained on."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from clip_lightning.errors import RunFailed

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames; `last.ckpt` that gives way becomes `previous.ckpt`.

    Lightning's own holds the whole file in memory first, and moves it over from the folder of temporary
    files, which copies it where that is another file system: a kill then leaves half of it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the file.

        Raises:
            RunFailed: there is no room, or the folder cannot be written; what was there stays.
        """
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                left.unlink()
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                _link(path, path.with_name(PREVIOUS))
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:  # torch wraps what the file system says
            reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
            raise RunFailed(
                f"the checkpoint {path} cannot be written ({reason}); what was saved before is still there: "
                "make room and go on with --ckpt_path last"
            ) from error
        finally:
            draft.unlink(missing_ok=True)


def _link(path: Path, name: Path) -> None:
    """Give the file a second name, in place of whatever has it; without a moment at which it has none."""
    draft = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft)
    except OSError:  # a file system without links: then there is none before
        return
    try:
        os.replace(draft, name)
    finally:
        draft.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """Why the file is not a whole checkpoint, None if it is one; its checksums are compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        return f"it is cut off or no checkpoint: {error}"
    return None if wrong is None else f"{wrong} in it does not match its checksum"
