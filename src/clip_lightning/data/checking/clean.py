"""A cleaned table of captions, written beside what it was made from, which is never changed."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from clip_lightning.data.checking.findings import Findings
from clip_lightning.data.formats import find_annotations
from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically

# Of pictures that lie in several splits the copy in the first of these stays: scores keep their meaning.
_KEPT_FIRST = ("test", "val", "train")


@dataclass(frozen=True)
class Cleaned:
    """What was written, and what was left out of it."""

    path: Path
    pictures: int
    captions: int
    without_broken: int
    without_leaks: int
    without_repeats: int

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.path} has {self.pictures:,} pictures with {self.captions:,} captions, without "
            f"{self.without_broken:,} broken pictures, {self.without_leaks:,} copies in another split and "
            f"{self.without_repeats:,} repeated captions"
        )


def check_target(path: Path) -> None:
    """Refuse what would overwrite something, before any picture is read.

    Raises:
        UserError: the file exists, or is no CSV.
    """
    if path.suffix.lower() != ".csv":
        raise UserError(f"--fix {path}: expected the name of a new .csv file")
    if path.exists():
        raise UserError(f"--fix {path} exists; give the name of a new file, nothing is overwritten")


def changes_reading(path: Path, root: Path, dataset: str) -> bool:
    """Whether the folder would be read by the new file from now on, or not at all."""
    if not root.is_dir():
        return False
    try:
        return [file.path for file in find_annotations(root.resolve(), dataset)] == [path.resolve()]
    except UserError:  # there are two files now
        return True


def write_cleaned(findings: Findings, path: Path) -> Cleaned:
    """Write `image,caption,split` without what `data check` complains of.

    Left out are pictures that cannot be read, captions that a picture has twice, and of pictures that are
    (or look) the same in several splits all but those in test, else in val. The splits are written down,
    drawn or not, so that the file means the same with any seed. Pictures are named relative to the file.
    """
    leaked = _leaked(findings)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("image", "caption", "split"))
    pictures = captions = repeats = 0
    for row, entry in enumerate(findings.entries):
        if not entry.readable or row in leaked or entry.split == "none":
            continue
        name = Path(os.path.relpath(entry.path, path.absolute().parent)).as_posix()
        texts = list(dict.fromkeys(entry.captions))
        writer.writerows((name, text, entry.split) for text in texts)
        pictures, captions = pictures + 1, captions + len(texts)
        repeats += len(entry.captions) - len(texts)
    if not pictures:
        raise UserError(f"--fix {path}: nothing would be left; see the errors above")
    write_atomically(path, buffer.getvalue().encode())
    return Cleaned(path, pictures, captions, len(findings.broken), len(leaked), repeats)


def _leaked(findings: Findings) -> set[int]:
    """Positions of the copies that go."""
    gone: set[int] = set()
    for group in [*findings.leaks, *findings.alike_leaks]:
        splits = {findings.entries[row].split for row in group}
        kept = next(name for name in _KEPT_FIRST if name in splits)
        gone |= {row for row in group if findings.entries[row].split not in (kept, "none")}
    return gone
