"""Check a data set: open every image once, report problems, and write a table without them.

The original files are never changed. N images; every perceptual hash has 256 bits, stored as 1 and -1.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.contrib.concurrent import thread_map

from clip_lightning.cpu import cores
from clip_lightning.data.captions import SPLITS, CaptionedImage, CaptionSet, lost_lines, shared_captions
from clip_lightning.data.images import BrokenImage, decode_bytes, read_file
from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically
from clip_lightning.terminal import printable

SMALLEST = 32  # pixels of the short side; smaller images show little
MOST_NAMED, MOST_SHARED = 5, 20
SIDE, KEPT = 32, 16
# Halving 250 photographs and encoding them again at quality 50 changed at most 14 bits, and brightening them
# by 15 % at most 20 bits. The hashes of 1,500 different photographs differed in at least 84 bits.
MOST_DIFFERENT = 40
PLAINEST = 2.0
BLOCK = 4096
GROUPS = ("same", "alike", "leaks", "alike_leaks")
ERRORS = {
    "broken": ("image", "cannot be read"),
    "left_out": ("annotation", "cannot be used"),
    "leaks": ("group", "of byte-identical images in more than one split (leakage)"),
}
WARNINGS = {
    "alike_leaks": ("group", "of images that look the same in more than one split (leakage)"),
    "within": ("group", "of images that look the same within a split"),
    "repeats": ("image", "with repeated captions"),
    "shared": ("caption", "shared by several images"),
    "small": ("image", f"with a side of less than {SMALLEST} pixels"),
    "unused": ("image", "in no split, which training does not use"),
}
PLAIN = np.zeros(KEPT**2, np.int8)  # the hash of an image that is so plain that any other would be noise
_DCT = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(KEPT)[:, None])


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An image of the data set, with its name relative to the data set's folder."""

    image: CaptionedImage
    name: str
    split: str  # or `none`
    broken: str | None = None  # the reason why the image cannot be read
    short_side: int = 0  # pixels
    sha256: str = ""  # of the file
    looks: np.ndarray = field(default_factory=lambda: PLAIN)


Report = dict[str, Any]


def open_all(
    captions: CaptionSet, parts: Mapping[str, Sequence[CaptionedImage]], workers: int | None = None
) -> list[Entry]:
    """Open every image in `workers` threads (by default one per core), with a progress bar on stderr."""
    split_of = {image.path: name for name, images in parts.items() for image in images}

    def opened(image: CaptionedImage) -> Entry:
        name = Path(os.path.relpath(image.path, captions.root)).as_posix()
        entry = partial(Entry, image, name, split_of.get(image.path, "none"))
        try:
            content = read_file(image.path, pauses=())
            pixels = decode_bytes(content)
        except BrokenImage as error:
            return entry(str(error))
        return entry(
            None, min(pixels.shape[1:]), hashlib.sha256(content).hexdigest(), perceptual_hash(pixels)
        )

    images, threads = captions.images, workers or cores()
    return list(thread_map(opened, images, max_workers=threads, desc="open", unit=" images"))


def find(captions: CaptionSet, entries: Sequence[Entry], lost: dict[str, Any] | None = None) -> Report:
    """Compare all images with each other, and return a report as plain JSON values.

    It has `errors` and `warnings`, one line per kind of problem; groups of images with the `same` bytes, and
    of images that look `alike`; those in several splits, `leaks` and `alike_leaks`; and counts.
    """
    readable = [entry for entry in entries if entry.broken is None]
    repeats = {entry.name: len(entry.image.captions) - len({*entry.image.captions}) for entry in entries}
    shared = shared_captions(entry.image for entry in entries)
    splits = {name: [entry for entry in readable if entry.split == name] for name in (*SPLITS, "none")}
    same, looking = _grouped(entries)
    leaks = [group for group in same if _crosses(group)]
    report: Report = {
        "root": str(captions.root),
        "source": captions.source,
        "images": len(readable),
        "captions": _captions(readable),
        "official_splits": captions.has_official_splits,
        "splits": {k: {"images": len(v), "captions": _captions(v)} for k, v in splits.items() if v},
        "captions_per_image": _spread(len(entry.image.captions) for entry in entries),
        "words_per_caption": _spread(len(text.split()) for e in entries for text in e.image.captions),
        "short_side": _spread(entry.short_side for entry in readable),
        "small": [entry.name for entry in readable if entry.short_side < SMALLEST],
        "unused": [entry.name for entry in entries if entry.split == "none"],
        "broken": {entry.name: entry.broken for entry in entries if entry.broken is not None},
        "left_out": captions.left_out,
        "same": same,
        "alike": looking,
        "leaks": leaks,
        "alike_leaks": [group for group in looking if _crosses(group) and group not in leaks],
        "captions_repeated": sum(repeats.values()),
        "captions_shared": len(shared),
        "most_shared": dict(shared.most_common(MOST_SHARED)),
        "captions_cut": lost,
    }
    within = [group for group in looking if not _crosses(group)]
    found = report | {
        "within": within,
        "repeats": {k: n for k, n in repeats.items() if n},
        "shared": [f"{text[:60]!r} ({count:,})" for text, count in shared.most_common()],
    }
    errors, warnings = (
        [_line(found[kind], *words) for kind, words in table.items() if found[kind]]
        for table in (ERRORS, WARNINGS)
    )
    warnings += lost_lines(lost, max(report["captions"], 1)) if lost else ()
    names = {kind: [[entry.name for entry in group] for group in report[kind]] for kind in GROUPS}
    return {"errors": errors, "warnings": [*captions.warnings, *warnings], **report, **names}


def _line(found: Mapping[str, Any] | Sequence[Any], noun: str, problem: str) -> str:
    """Describe what was found (texts, groups, or name → reason) with examples."""
    examples = []
    for example in islice(found, MOST_NAMED):
        if isinstance(found, Mapping):
            example = f"{example} ({found[example]})"
        elif not isinstance(example, str):
            example = " = ".join(f"{entry.name} ({entry.split})" for entry in example[:MOST_NAMED])
        examples.append(example)
    more = " and more" * (len(found) > MOST_NAMED)
    return f"{len(found):,} {noun}{'s' * (len(found) != 1)} {problem}: {', '.join(examples)}{more}"


def _crosses(group: Sequence[Entry]) -> bool:
    return len({entry.split for entry in group} - {"none"}) > 1


def _captions(entries: Sequence[Entry]) -> int:
    return sum(len(entry.image.captions) for entry in entries)


def _spread(values: Iterable[int]) -> dict[str, float] | None:
    found = sorted(values)
    return {"lowest": found[0], "median": statistics.median(found), "highest": found[-1]} if found else None


def as_text(report: Report) -> str:
    """Render a report for a terminal."""
    splits = ", ".join(f"{name} {split['images']:,}" for name, split in report["splits"].items())
    how = "official splits" if report["official_splits"] else "random splits, as in fit by default"
    per_image, words, sides = (
        "{lowest:g} to {highest:g} (median {median:g})".format_map(report[name]) if report[name] else "none"
        for name in ("captions_per_image", "words_per_caption", "short_side")
    )
    lines = [
        report["root"],
        f"  read      {report['source']}, {len(report['left_out']):,} rows or images left out",
        f"  images    {report['images']:,}: {splits} ({how})",
        f"  captions  {report['captions']:,}: {per_image} per image, {words} words each",
        f"  pixels    {sides} on the short side",
    ]
    lines += [f"{kind}: {line}" for kind in ("error", "warning") for line in report[f"{kind}s"]]
    return printable("\n".join(lines if report["errors"] else [*lines, "no errors"]))


def write_cleaned(report: Report, entries: Sequence[Entry], path: Path) -> dict[str, Any]:
    """Write a table `image,caption,split` without the problems in a report, and return counts.

    Of images that are or look the same in several splits, it keeps only those in test, or else in val, so
    that scores keep their meaning. Images are named relative to the table.
    """
    split_of = {entry.name: entry.split for entry in entries}
    leaked: set[str] = set()
    for group in report["leaks"] + report["alike_leaks"]:
        kept = next(split for split in reversed(SPLITS) if split in map(split_of.get, group))
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
        "without_repeats": _captions(kept_entries) - len(rows),
    }


def _grouped(entries: Sequence[Entry]) -> list[list[list[Entry]]]:
    """Return the groups of images with the same bytes, and of images that look alike."""
    first: dict[str, int] = {}
    same = [
        (first[entry.sha256], row)
        for row, entry in enumerate(entries)
        if entry.sha256 and first.setdefault(entry.sha256, row) != row
    ]
    # Compare one of n copies: a crawl may have thousands of the same "not available" image, and n² pairs.
    copies = {row for _, row in same}
    similar = alike([PLAIN if row in copies else entry.looks for row, entry in enumerate(entries)])
    return [[[entries[row] for row in part] for part in groups(pairs)] for pairs in (same, similar + same)]


def perceptual_hash(pixels: Tensor) -> np.ndarray:
    """Compare the 16 × 16 lowest frequencies of a small copy of uint8 (3, H, W) with their median (pHash)."""
    red, green, blue = pixels.to(torch.float32)
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    small = functional.interpolate(gray[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)
    copy = small[0, 0].numpy()
    if copy.std() < PLAINEST:
        return PLAIN
    frequencies = (_DCT @ copy @ _DCT.T).ravel()
    return np.where(frequencies > np.median(frequencies), 1, -1).astype(np.int8)


def alike(hashes: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Return the pairs of positions, the lower one first, whose hashes differ in few bits.

    This compares all pairs with N² / 2 × 512 operations, which takes half a minute for 100,000 images.
    """
    signs = torch.from_numpy(np.stack(hashes)).float()
    # The product of two hashes is 256 minus twice the number of different bits.
    least = KEPT**2 - 2 * MOST_DIFFERENT
    pairs = []
    for start in range(0, len(hashes), BLOCK):
        for other in range(start, len(hashes), BLOCK):
            products = signs[start : start + BLOCK] @ signs[other : other + BLOCK].T
            close = (products >= least).nonzero().tolist()
            pairs += [(start + a, other + b) for a, b in close if start + a < other + b]
    return sorted(pairs)


def groups(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return ascending groups of the positions that pairs connect directly or indirectly."""
    group_of: dict[int, list[int]] = {}
    for pair in pairs:
        small, large = sorted((group_of.setdefault(row, [row]) for row in pair), key=len)
        if small is not large:
            large += small
            group_of.update(dict.fromkeys(small, large))
    return sorted(map(sorted, {id(group): group for group in group_of.values()}.values()))
