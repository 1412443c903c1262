"""Check a data set: open every image once, report problems, and write a table without them.

The original files are never changed. N images; every perceptual hash has 256 bits, stored as booleans.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
GROUPS = ("same", "alike", "leaks", "alike_leaks")
SIDE, KEPT = 32, 16
# Halving 250 photographs and encoding them again at quality 50 changed at most 14 bits, and brightening them
# by 15 % at most 20 bits. The hashes of 1,500 different photographs differed in at least 84 bits.
MOST_DIFFERENT = 40
PLAINEST = 2.0
BLOCK = 4096
_DCT = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(KEPT)[:, None])


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An image of the data set.

    Attributes:
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


Group = list[Entry]
Report = dict[str, Any]


def open_all(
    captions: CaptionSet, parts: Mapping[str, Sequence[CaptionedImage]], workers: int | None = None
) -> list[Entry]:
    """Open every image in `workers` threads (by default one per core), with a progress bar on stderr."""
    split_of = {image.path: name for name, images in parts.items() for image in images}
    opened = partial(_open, captions.root, split_of)
    return list(
        thread_map(opened, captions.images, max_workers=workers or cores(), desc="open", unit=" images")
    )


def _open(root: Path, split_of: Mapping[Path, str], image: CaptionedImage) -> Entry:
    name = Path(os.path.relpath(image.path, root)).as_posix()
    entry = partial(Entry, image, name, split_of.get(image.path, "none"))
    try:
        content = read_file(image.path, pauses=())
        pixels = decode_bytes(content)
    except BrokenImage as error:
        return entry(str(error))
    return entry(None, min(pixels.shape[1:]), hashlib.sha256(content).hexdigest(), perceptual_hash(pixels))


def find(captions: CaptionSet, entries: Sequence[Entry], lost: dict[str, Any] | None = None) -> Report:
    """Compare all images with each other, and return a report as plain JSON values.

    It has `errors` and `warnings`, one line per kind of problem; the numbers of `images` and `captions` that
    can be used; groups of images with the `same` bytes, and of images that look `alike`; the groups of both
    kinds that are in several splits, `leaks` and `alike_leaks`; and other counts.
    """
    readable = [entry for entry in entries if entry.broken is None]
    texts = [text for entry in entries for text in entry.image.captions]
    repeats = {entry.name: len(entry.image.captions) - len({*entry.image.captions}) for entry in entries}
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
        "captions_repeated": sum(repeats.values()),
        "captions_shared": len(shared),
        "most_shared": dict(shared.most_common(MOST_SHARED)),
        "captions_cut": lost,
    }
    within = [group for group in looking if not _crosses(group)]
    errors = [
        _line(report["broken"], "image", "cannot be read"),
        _line(captions.left_out, "annotation", "cannot be used"),
        _line(leaks, "group", "of byte-identical images in more than one split (leakage)"),
    ]
    warnings = [
        *captions.warnings,
        _line(
            report["alike_leaks"], "group", "of images that look the same in more than one split (leakage)"
        ),
        _line(within, "group", "of images that look the same within a split"),
        _line({name: n for name, n in repeats.items() if n}, "image", "with repeated captions"),
        _line(
            [f"{text[:60]!r} ({n:,})" for text, n in shared.most_common()],
            "caption",
            "shared by several images",
        ),
        _line(report["small"], "image", f"with a side of less than {SMALLEST} pixels"),
        _line(report["unused"], "image", "in no split, which training does not use"),
        *(lost_lines(lost, max(report["captions"], 1)) if lost else ()),
    ]
    names = {kind: [[entry.name for entry in group] for group in report[kind]] for kind in GROUPS}
    return {"errors": [*filter(None, errors)], "warnings": [*filter(None, warnings)], **report, **names}


def _line(found: Mapping[str, Any] | Sequence[Any], noun: str, problem: str) -> str:
    """Describe what was found (texts, groups, or name → reason) with examples; return "" if it is nothing."""
    examples = []
    for example in islice(found, MOST_NAMED):
        if isinstance(found, Mapping):
            example = f"{example} ({found[example]})"
        elif not isinstance(example, str):
            example = " = ".join(f"{entry.name} ({entry.split})" for entry in example[:MOST_NAMED])
        examples.append(example)
    more = " and more" * (len(found) > MOST_NAMED)
    line = f"{len(found):,} {noun}{'s' * (len(found) != 1)} {problem}: {', '.join(examples)}{more}"
    return line if found else ""


def _crosses(group: Group) -> bool:
    return len({entry.split for entry in group} - {"none"}) > 1


def _captions(entries: Sequence[Entry]) -> int:
    return sum(len(entry.image.captions) for entry in entries)


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"lowest": min(values), "median": statistics.median(values), "highest": max(values)}


def as_text(report: Report) -> str:
    """Render a report for a terminal."""
    splits = ", ".join(f"{name} {split['images']:,}" for name, split in report["splits"].items())
    how = "official splits" if report["official_splits"] else "random splits, as in fit by default"
    per_image, words = _range(report["captions_per_image"]), _range(report["words_per_caption"])
    lines = [
        report["root"],
        f"  read      {report['source']}, {len(report['left_out']):,} rows or images left out",
        f"  images    {report['images']:,}: {splits} ({how})",
        f"  captions  {report['captions']:,}: {per_image} per image, {words} words each",
        f"  pixels    {_range(report['short_side'])} on the short side",
    ]
    if (cut := report["captions_cut"]) and not cut["count"]:
        lines.append(f"  tokens    no caption has more than {cut['max_length']}")
    lines += [f"{kind}: {line}" for kind in ("error", "warning") for line in report[f"{kind}s"]]
    return printable("\n".join(lines if report["errors"] else [*lines, "no errors"]))


def _range(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "none"
    low, middle, high = (f"{spread[name]:g}" for name in ("lowest", "median", "highest"))
    return low if low == high else f"{low} to {high} (median {middle})"


def write_cleaned(report: Report, entries: Sequence[Entry], path: Path) -> dict[str, Any]:
    """Write a table `image,caption,split` without the problems in a report, and return counts.

    It leaves out images that cannot be read and repeated captions of an image. Of images that are or look the
    same in several splits, it keeps only those in test, or else in val, so that scores keep their meaning.
    The table contains the splits, even random ones, so it does not depend on a seed. Images are named
    relative to the table.
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


# Images that look the same ------------------------------------------------------------------------------


def _grouped(entries: Sequence[Entry]) -> list[list[Group]]:
    """Return the groups of images with the same bytes, and of images that look alike."""
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


def perceptual_hash(pixels: Tensor) -> np.ndarray | None:
    """Compare the 16 × 16 lowest frequencies of a small copy of uint8 (3, H, W) with their median (pHash).

    The hash is None if the image is so plain that it would be noise.
    """
    red, green, blue = pixels.to(torch.float32)
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    small = functional.interpolate(gray[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)
    copy = small[0, 0].numpy()
    if copy.std() < PLAINEST:
        return None
    frequencies = (_DCT @ copy @ _DCT.T).ravel()
    return frequencies > np.median(frequencies)


def alike(hashes: Sequence[np.ndarray | None]) -> list[tuple[int, int]]:
    """Return the pairs of positions, the lower one first, whose hashes differ in few bits.

    This compares all pairs with N² / 2 × 512 operations, which takes half a minute for 100,000 images.
    """
    # With ±1, the product of two hashes is 256 minus twice the number of different bits; with 0, it is 0.
    signs = torch.zeros((len(hashes), KEPT**2))
    for row, bits in enumerate(hashes):
        if bits is not None:
            signs[row] = torch.from_numpy(bits) * 2.0 - 1
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
