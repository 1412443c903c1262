"""A cleaned table of captions, written beside what it was made from, which is never changed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_lightning.data.check import Entry, Found
from clip_lightning.data.formats import find_annotations
from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically

# Of images that are in several splits, the copy in the first of these stays: scores keep their meaning.
_KEPT_FIRST = ("test", "val", "train")


def changes_reading(path: Path, root: Path, dataset: str) -> bool:
    """Check whether the folder would be read by the new file from now on, or not at all."""
    try:
        files = find_annotations(root.resolve(), dataset) if root.is_dir() else []
        return [file.path for file in files] == [path.resolve()]
    except UserError:  # there are two files now
        return True


def write_cleaned(found: Found, entries: Sequence[Entry], path: Path) -> dict[str, Any]:
    """Write `image,caption,split` without what `data check` complains of, and return what was left out.

    Left out are images that cannot be read, captions that an image has already, and of images that are
    (or look) the same in several splits all but those in test, else in val. The splits are written down,
    drawn or not, so that the file means the same with any seed. Images are named relative to the file.
    """
    split_of = {entry.name: entry.split for entry in entries}
    leaked: set[str] = set()
    for group in found["leaks"] + found["alike_leaks"]:
        kept = next(split for split in _KEPT_FIRST if split in map(split_of.get, group))
        leaked |= {name for name in group if split_of[name] not in (kept, "none")}
    kept_entries = [e for e in entries if e.broken is None and e.name not in leaked and e.split != "none"]
    if not kept_entries:
        raise UserError(f"--fix {path}: nothing would be left; see the errors above")
    buffer, captions = io.StringIO(), 0
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("image", "caption", "split"))
    for entry in kept_entries:
        name = Path(os.path.relpath(entry.image.path, path.absolute().parent)).as_posix()
        texts = dict.fromkeys(entry.image.captions)
        writer.writerows((name, text, entry.split) for text in texts)
        captions += len(texts)
    write_atomically(path, buffer.getvalue().encode())
    return {
        "path": str(path),
        "images": len(kept_entries),
        "captions": captions,
        "without_broken": len(found["broken"]),
        "without_leaks": len(leaked),
        "without_repeats": sum(len(entry.image.captions) for entry in kept_entries) - captions,
    }
