"""Check a data set: open every image once, report problems, and write a table without them.

The original files are never changed. N images, V views of an image; every perceptual hash has 256 bits,
stored as 1 and -1.
"""

from __future__ import annotations

import csv
import hashlib
import io
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
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from clip_lightning.cpu import cores
from clip_lightning.data.captions import (
    SPLITS,
    CaptionedImage,
    CaptionSet,
    lost_lines,
    relative_name,
    shared_captions,
)
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
# Views of a copy of 80 pixels: side and number of places per axis of square crops, so that one of them is
# close to any crop that keeps 90 % of each side or more.
COPY, CROPS = 80, ((80, 1), (76, 3), (72, 4), (64, 1))
MOST_DIFFERENT_VIEWS = 60
GROUPS = ("same", "alike", "leaks", "alike_leaks")
ERRORS = {
    "broken": ("image", "cannot be read"),
    "left_out": ("annotation", "cannot be used"),
    "leaks": ("group", "of byte-identical images in more than one split (leakage)"),
    "against_same": ("image", "byte-identical to one in the other data (leakage)"),
}
WARNINGS = {
    "alike_leaks": ("group", "of images that look the same in more than one split (leakage)"),
    "against_alike": ("image", "similar to one in the other data (leakage)"),
    "within": ("group", "of images that look the same within a split"),
    "repeats": ("image", "with repeated captions"),
    "shared": ("caption", "shared by several images"),
    "small": ("image", f"with a side of less than {SMALLEST} pixels"),
    "unused": ("image", "in no split, which training does not use"),
}
FEW = 256  # images whose views are compared at a time
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
    views: np.ndarray | None = None  # hashes (V, 256) of crops and mirror images


Report = dict[str, Any]


def open_all(
    captions: CaptionSet,
    parts: Mapping[str, Sequence[CaptionedImage]],
    workers: int | None = None,
    views: bool = False,
) -> list[Entry]:
    """Open every image in `workers` threads (by default one per core), with a progress bar on stderr.

    `views` are for `find_copies`.
    """
    split_of = {image.path: name for name, images in parts.items() for image in images}

    def opened(image: CaptionedImage) -> Entry:
        name = relative_name(image.path, captions.root)
        entry = partial(Entry, image, name, split_of.get(image.path, "none"))
        try:
            content = read_file(image.path, pauses=())
            pixels = decode_bytes(content)
        except BrokenImage as error:
            return entry(str(error))
        hashes = perceptual_hash(pixels), view_hashes(pixels) if views else None
        return entry(None, min(pixels.shape[1:]), hashlib.sha256(content).hexdigest(), *hashes)

    images, threads = captions.images, workers or cores()
    return list(thread_map(opened, images, max_workers=threads, desc="open", unit=" images"))


def find(
    captions: CaptionSet, entries: Sequence[Entry], lost: Report | None, copies: Mapping[str, Any]
) -> Report:
    """Compare all images with each other, and return a report as plain JSON values.

    `copies` has the name of other data, `against`, and what `find_copies` found there.

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
        **copies,
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
    copied = {*report["against_same"], *report["against_alike"]}
    leaked: set[str] = set()
    for group in report["leaks"] + report["alike_leaks"]:
        kept = next(split for split in reversed(SPLITS) if split in map(split_of.get, group))
        leaked |= {name for name in group if split_of[name] not in (kept, "none")}
    kept_entries = [
        entry
        for entry in entries
        if entry.broken is None and entry.name not in leaked | copied and entry.split != "none"
    ]
    rows = [
        (entry.image.path, text, entry.split)
        for entry in kept_entries
        for text in dict.fromkeys(entry.image.captions)
    ]
    return write_table(path, rows) | {
        "without_broken": len(report["broken"]),
        "without_leaks": len(leaked),
        "without_copies": len(copied),
        "without_repeats": _captions(kept_entries) - len(rows),
    }


def check_new_table(fix: Path | None) -> None:
    """Refuse a table to write that exists or has another format."""
    if fix is not None and (fix.suffix.lower() != ".csv" or fix.exists()):
        raise UserError(f"--fix {fix}: expected the name of a new .csv file; existing files are kept")


def write_table(path: Path, rows: Sequence[tuple[Path, str, str]]) -> dict[str, Any]:
    """Write images (named relative to the table), captions and splits as CSV, and return counts."""
    if not rows:
        raise UserError(f"--fix {path}: no image would be left; fix the errors above first")
    folder, table = path.absolute().parent, io.StringIO()
    named = ((relative_name(image, folder), text, split) for image, text, split in rows)
    csv.writer(table, lineterminator="\n").writerows([("image", "caption", "split"), *named])
    write_atomically(path, table.getvalue().encode())
    return {"path": str(path), "images": len({image for image, _, _ in rows}), "captions": len(rows)}


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
    return _hashes(_gray_copy(pixels, SIDE)[None])[0]


def view_hashes(pixels: Tensor) -> np.ndarray:
    """Return the hashes (V, 256) of crops of uint8 (3, H, W) and of their mirror images."""
    copy, views = _gray_copy(pixels, COPY), []
    for side, count in CROPS:
        places = np.linspace(0, COPY - side, count).round().astype(int)
        crops = [copy[None, None, y : y + side, x : x + side] for y in places for x in places]
        views.append(functional.interpolate(torch.cat(crops), (SIDE, SIDE), mode="bilinear", antialias=True))
    small = torch.cat(views)[:, 0]
    return _hashes(torch.cat([small, small.flip(-1)]))


def _gray_copy(pixels: Tensor, side: int) -> Tensor:
    red, green, blue = pixels.to(torch.float32)
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    return functional.interpolate(gray[None, None], (side, side), mode="bilinear", antialias=True)[0, 0]


def _hashes(small: Tensor) -> np.ndarray:
    """Return the hashes (V, 256) of gray copies (V, 32, 32)."""
    copies = small.numpy()
    frequencies = (_DCT @ copies @ _DCT.T).reshape(len(copies), -1)
    hashes = np.where(frequencies > np.median(frequencies, axis=1, keepdims=True), 1, -1).astype(np.int8)
    return np.where(copies.std((1, 2))[:, None] < PLAINEST, PLAIN, hashes)


def find_copies(entries: Sequence[Entry], others: Sequence[Entry]) -> dict[str, Any]:
    """Return the images that other data contains, too: the name of each, and of its closest copy there.

    They have the same bytes (`against_same`), or one looks like a view of the other (`against_alike`). A pair
    of images takes 2 × V × 512 operations.
    """
    ours, theirs = ([one for one in images if one.broken is None] for images in (entries, others))
    digests = {other.sha256: other.name for other in reversed(theirs)}
    same = {entry.name: digests[entry.sha256] for entry in ours if entry.sha256 in digests}
    similar = {}
    for start in tqdm(range(0, len(ours) if theirs else 0, FEW), "compare", disable=not theirs):
        block = ours[start : start + FEW]
        chunks = (theirs[other : other + FEW] for other in range(0, len(theirs), FEW))
        products, places = torch.cat([_view_products(block, chunk) for chunk in chunks], 1).max(1)
        for entry, product, place in zip(block, products.tolist(), places.tolist(), strict=True):
            if product >= KEPT**2 - 2 * MOST_DIFFERENT_VIEWS and entry.name not in same:
                similar[entry.name] = theirs[place].name
    return {"against_same": same, "against_alike": similar}


def _view_products(ours: Sequence[Entry], theirs: Sequence[Entry]) -> Tensor:
    """Return the largest product (N, M) of the hash of one image and a view of the other."""
    looks, views = (
        [
            torch.from_numpy(np.stack([getattr(entry, name) for entry in part])).float()
            for part in (ours, theirs)
        ]
        for name in ("looks", "views")
    )
    return torch.maximum(
        (views[0].flatten(0, 1) @ looks[1].T).unflatten(0, (len(ours), -1)).amax(1),
        (looks[0] @ views[1].flatten(0, 1).T).unflatten(1, (len(theirs), -1)).amax(2),
    )


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
