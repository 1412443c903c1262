"""Check a data set: open every image once, report problems, and write a table without them.

The original files are never changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from clip_lightning.cores import cores
from clip_lightning.data.captions import SPLITS, CaptionedImage, CaptionSet, lost_lines, shared_captions
from clip_lightning.data.columns import ReadOptions
from clip_lightning.data.formats import find_annotations
from clip_lightning.data.image_formats import walk
from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.data.near_duplicates import alike, groups, perceptual_hash
from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically

SMALLEST = 32  # pixels of the short side; smaller images show little
MOST_NAMED, MOST_SHARED = 5, 20
# Of copies in several splits, the one in the first of these is kept, so that scores keep their meaning.
_KEPT_FIRST = ("test", "val", "train")
GROUPS = ("same", "alike", "leaks", "alike_leaks")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An image of the data set.

    Attributes:
        image: the file and its captions.
        name: the file name relative to the data set's folder.
        split: `train`, `val`, `test` or `none`.
        broken: the reason why the image cannot be read, or None.
        short_side: length of the short side in pixels.
        sha256: SHA-256 (hex) of the file.
        looks: perceptual hash of 256 bits, or None if the image is too plain for one.
    """

    image: CaptionedImage
    name: str
    split: str
    broken: str | None = None
    short_side: int = 0
    sha256: str = ""
    looks: np.ndarray | None = None


def open_all(
    captions: CaptionSet, parts: Mapping[str, Sequence[CaptionedImage]], workers: int | None = None
) -> list[Entry]:
    """Open every image in `workers` threads (by default one per core), with a progress bar on stderr."""
    split_of = {image.path: name for name, images in parts.items() for image in images}
    opened = partial(_open, captions.root, split_of)
    with ThreadPoolExecutor(workers or cores()) as pool:
        try:
            return list(tqdm(pool.map(opened, captions.images), "open", len(captions.images), unit=" images"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _open(root: Path, split_of: Mapping[Path, str], image: CaptionedImage) -> Entry:
    name = Path(os.path.relpath(image.path, root)).as_posix()
    entry = partial(Entry, image, name, split_of.get(image.path, "none"))
    try:
        pixels = decode_image(image.path)
        digest = hashlib.sha256(image.path.read_bytes()).hexdigest()
    except BrokenImage as error:
        return entry(str(error))
    except OSError as error:
        return entry(error.strerror or "the file cannot be read")
    return entry(None, min(pixels.shape[1:]), digest, perceptual_hash(pixels))


Group = list[Entry]
Report = dict[str, Any]


def find(captions: CaptionSet, entries: Sequence[Entry], lost: dict[str, Any] | None = None) -> Report:
    """Compare all images with each other, and return a report as plain JSON values.

    Args:
        captions: the data set.
        entries: its images, from `open_all`.
        lost: the captions that a tokenizer truncates or does not know, from `count_lost`.

    Returns:
        `errors` and `warnings`, one line per kind of problem; the numbers of `images` and `captions` that can
        be used; groups of images with the `same` bytes, and of images that look `alike`; the groups of both
        kinds that are in several splits, `leaks` and `alike_leaks`; and other counts.
    """
    readable = [entry for entry in entries if entry.broken is None]
    texts = [text for entry in entries for text in entry.image.captions]
    shared = shared_captions(entry.image for entry in entries)
    same, looking = _grouped(entries)
    leaks = [group for group in same if _crosses(group)]
    splits = {name: [entry for entry in readable if entry.split == name] for name in (*SPLITS, "none")}
    report: Report = {
        "root": str(captions.root),
        "source": captions.source,
        "images": len(readable),
        "captions": _captions(readable),
        "official_splits": captions.has_official_splits,
        "splits": {k: {"images": len(v), "captions": _captions(v)} for k, v in splits.items() if v},
        "captions_per_image": _spread([len(entry.image.captions) for entry in entries]),
        "words_per_caption": _spread([len(text.split()) for text in texts]),
        "short_side": _spread([entry.short_side for entry in readable]),
        "small": [entry.name for entry in readable if entry.short_side < SMALLEST],
        "unused": [entry.name for entry in entries if entry.split == "none"],
        "broken": {entry.name: entry.broken for entry in entries if entry.broken is not None},
        "left_out": captions.left_out,
        "same": same,
        "alike": looking,
        "leaks": leaks,
        "alike_leaks": [group for group in looking if _crosses(group) and group not in leaks],
        "captions_repeated": len(texts) - sum(len({*entry.image.captions}) for entry in entries),
        "captions_shared": len(shared),
        "most_shared": dict(shared.most_common(MOST_SHARED)),
        "captions_cut": lost,
    }
    lines = {"errors": [*_errors(report)], "warnings": [*captions.warnings, *_warnings(report)]}
    names = {kind: [[entry.name for entry in group] for group in report[kind]] for kind in GROUPS}
    return {**lines, **report, **names}


def _grouped(entries: Sequence[Entry]) -> list[list[Group]]:
    first: dict[str, int] = {}
    same = [
        (first[entry.sha256], row)
        for row, entry in enumerate(entries)
        if entry.sha256 and first.setdefault(entry.sha256, row) != row
    ]
    # Compare one of n copies: a crawl may have thousands of the same "not available" image, and n² pairs.
    copies = {row for _, row in same}
    similar = alike([None if row in copies else entry.looks for row, entry in enumerate(entries)])
    return [[[entries[row] for row in group] for group in groups(pairs)] for pairs in (same, similar + same)]


def _errors(report: Report) -> Iterator[str]:
    if broken := report["broken"]:
        yield f"{_count(broken, 'image')} cannot be read: {_examples(broken)}"
    if left_out := report["left_out"]:
        yield f"{_count(left_out, 'row or image', 'rows or images')} cannot be used: {_examples(left_out)}"
    if leaks := report["leaks"]:
        count = _count(leaks, "group")
        yield f"leakage: {count} of byte-identical images in more than one split: {_named(leaks)}"
    if not report["images"]:
        yield "no image can be read"


def _warnings(report: Report) -> Iterator[str]:
    if leaks := report["alike_leaks"]:
        remedy = "" if report["official_splits"] else "; --fix FILE writes random splits without them"
        count = _count(leaks, "group")
        yield f"leakage: {count} of images that look the same in more than one split: {_named(leaks)}{remedy}"
    if within := [group for group in report["alike"] if not _crosses(group)]:
        yield f"{_count(within, 'group')} of images that look the same within a split: {_named(within)}"
    if repeated := report["captions_repeated"]:
        yield f"{_count(range(repeated), 'caption is', 'captions are')} repeated for the same image"
    if shared := report["captions_shared"]:
        (caption, number), *_ = report["most_shared"].items()
        several = _count(range(shared), "caption is", "captions are")
        yield f"{several} shared by several images, most often {caption[:60]!r} ({number:,} images)"
    if report["captions_cut"]:
        yield from lost_lines(report["captions_cut"], max(report["captions"], 1))
    if small := report["small"]:
        names = ", ".join(small[:MOST_NAMED])
        yield f"{_count(small, 'image has', 'images have')} a side of less than {SMALLEST} pixels: {names}"
    if unused := report["unused"]:
        yield f"{_count(unused, 'image is', 'images are')} in no split, so training does not use them"


def _crosses(group: Group) -> bool:
    return len({entry.split for entry in group} - {"none"}) > 1


def _captions(entries: Sequence[Entry]) -> int:
    return sum(len(entry.image.captions) for entry in entries)


def _count(items: Sized, noun: str, plural: str | None = None) -> str:
    return f"{len(items):,} {noun if len(items) == 1 else plural or noun + 's'}"


def _examples(reasons: Mapping[str, str]) -> str:
    named = [f"{name} ({reason})" for name, reason in list(reasons.items())[:MOST_NAMED]]
    return ", ".join(named) + " and more" * (len(reasons) > MOST_NAMED)


def _named(listed: Sequence[Group]) -> str:
    shown = (
        [f"{entry.name} ({entry.split})" for entry in group[:MOST_NAMED]] for group in listed[:MOST_NAMED]
    )
    return "; ".join(map(" = ".join, shown)) + " and more" * (len(listed) > MOST_NAMED)


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"lowest": min(values), "median": statistics.median(values), "highest": max(values)}


# Writing a cleaned table (--fix) ------------------------------------------------------------------------


def changes_reading(path: Path, root: Path, read: ReadOptions) -> bool:
    """Return whether the new file changes what is read from the folder, or makes it ambiguous."""
    if not root.is_dir():
        return False
    root = root.resolve()
    try:
        files = find_annotations(root, dict(walk(root, Counter())), read, Counter())
        return [file for file, _ in files] == [path.resolve()]
    except UserError:  # there are two files now
        return True


def write_cleaned(report: Report, entries: Sequence[Entry], path: Path) -> dict[str, Any]:
    """Write a table `image,caption,split` without the problems in a report, and return counts.

    It leaves out images that cannot be read and repeated captions of an image. Of images that are or look the
    same in several splits, it keeps only those in test, or else in val. The table contains the splits, even
    random ones, so it does not depend on a seed. Images are named relative to the table.
    """
    split_of = {entry.name: entry.split for entry in entries}
    leaked: set[str] = set()
    for group in report["leaks"] + report["alike_leaks"]:
        kept = next(split for split in _KEPT_FIRST if split in map(split_of.get, group))
        leaked |= {name for name in group if split_of[name] not in (kept, "none")}
    kept_entries = [e for e in entries if e.broken is None and e.name not in leaked and e.split != "none"]
    if not kept_entries:
        raise UserError(f"--fix {path}: no image would be left; fix the errors above first")
    rows = [
        (Path(os.path.relpath(entry.image.path, path.absolute().parent)).as_posix(), text, entry.split)
        for entry in kept_entries
        for text in dict.fromkeys(entry.image.captions)
    ]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("image", "caption", "split"), *rows])
    write_atomically(path, table.getvalue().encode())
    return {
        "path": str(path),
        "images": len(kept_entries),
        "captions": len(rows),
        "without_broken": len(report["broken"]),
        "without_leaks": len(leaked),
        "without_repeats": sum(len(entry.image.captions) for entry in kept_entries) - len(rows),
    }
