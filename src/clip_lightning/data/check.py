"""What is in a data set and what is wrong with it: every image opened once, as the loader would."""

from __future__ import annotations

import hashlib
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
from clip_lightning.data.captions import SPLITS, CaptionedImage, CaptionSet
from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.data.near_duplicates import alike, groups, perceptual_hash

SMALLEST = 32  # pixels of the short side; below that there is little to see
MOST_NAMED, MOST_SHARED = 5, 20
GROUPS = ("same", "alike", "leaks", "alike_leaks")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An image of the data set.

    Attributes:
        image: its file and captions.
        name: the file, relative to the data set's folder.
        split: `train`, `val`, `test` or `none`.
        broken: why it cannot be read; None if it can.
        short_side: pixels.
        sha256: of the file (hex).
        looks: 256 bits that images which look the same share; None if it is too plain for that.
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
    """Open every image in `workers` threads (one per core by default), with a progress bar on stderr."""
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
Found = dict[str, Any]


def find(captions: CaptionSet, entries: Sequence[Entry], cut: Mapping[str, Any] | None = None) -> Found:
    """Compare all images with each other, and return what is found as plain JSON values.

    Args:
        captions: the data set.
        entries: its images as `open_all` gives them.
        cut: the captions that a tokenizer would cut: their `count`, its `text_tower` and `max_length`.

    Returns:
        `errors` and `warnings`, a line for each kind of thing that has to be fixed, or known of; how many
        `images` and `captions` can be used; groups of images with the `same` bytes, and of those that look
        `alike`; of both those that are in several splits, `leaks` and `alike_leaks`; and other counts.
    """
    readable = [entry for entry in entries if entry.broken is None]
    texts = [text for entry in entries for text in entry.image.captions]
    counts = Counter(text for entry in entries for text in set(entry.image.captions))
    shared = Counter({text: count for text, count in counts.items() if count > 1})
    same, looking = _grouped(entries)
    leaks = [group for group in same if _crosses(group)]
    splits = {name: [entry for entry in readable if entry.split == name] for name in (*SPLITS, "none")}
    found: Found = {
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
        "captions_repeated": len(texts) - counts.total(),
        "captions_shared": len(shared),
        "most_shared": dict(shared.most_common(MOST_SHARED)),
        "captions_cut": cut,
    }
    lines = {"errors": [*_errors(found)], "warnings": [*captions.warnings, *_warnings(found)]}
    names = {kind: [[e.name for e in group] for group in found[kind]] for kind in GROUPS}
    return {**lines, **found, **names}


def _grouped(entries: Sequence[Entry]) -> list[list[Group]]:
    first: dict[str, int] = {}
    same = [
        (first[entry.sha256], row)
        for row, entry in enumerate(entries)
        if entry.sha256 and first.setdefault(entry.sha256, row) != row
    ]
    # of n copies one is compared: a crawl's thousands of the same "not available" would be n² pairs
    copies = {row for _, row in same}
    pairs = alike([None if row in copies else entry.looks for row, entry in enumerate(entries)])
    return [[[entries[row] for row in group] for group in groups(found)] for found in (same, pairs + same)]


def _errors(found: Found) -> Iterator[str]:
    if broken := found["broken"]:
        yield f"{_count(broken, 'image')} cannot be read: {_examples(broken)}"
    if left_out := found["left_out"]:
        yield f"{_count(left_out, 'row or image', 'rows or images')} cannot be used: {_examples(left_out)}"
    if leaks := found["leaks"]:
        many = _count(leaks, "group")
        yield f"leakage: {many} of byte-identical images in more than one split: {_named(leaks)}"
    if not found["images"]:
        yield "no image can be read"


def _warnings(found: Found) -> Iterator[str]:
    if leaks := found["alike_leaks"]:
        drawn = (
            "" if found["official_splits"] else "; the split is drawn, and --fix FILE writes one without them"
        )
        many = _count(leaks, "group")
        yield f"leakage: {many} of images that look the same in more than one split: {_named(leaks)}{drawn}"
    if within := [group for group in found["alike"] if not _crosses(group)]:
        yield f"{_count(within, 'group')} of images that look the same within a split: {_named(within)}"
    if repeated := found["captions_repeated"]:
        yield f"{_count(range(repeated), 'caption')} repeated at the same image"
    if shared := found["captions_shared"]:
        (caption, count), *_ = found["most_shared"].items()
        several = _count(range(shared), "caption is", "captions are")
        yield f"{several} shared by several images, most often {caption[:60]!r} ({count:,} images)"
    if (cut := found["captions_cut"]) and cut["count"]:
        fraction = f"{100 * cut['count'] / max(found['captions'], 1):.1f} %"
        yield (
            f"{_count(range(cut['count']), 'caption')} ({fraction}) longer than {cut['max_length']} tokens "
            f"of {cut['text_tower']}, which would be cut"
        )
    if small := found["small"]:
        names = ", ".join(small[:MOST_NAMED])
        yield f"{_count(small, 'image')} with less than {SMALLEST} pixels a side: {names}"
    if unused := found["unused"]:
        yield f"{_count(unused, 'image')} in no split, which fit does not use"


def _crosses(group: Group) -> bool:
    return len({entry.split for entry in group} - {"none"}) > 1


def _captions(entries: Sequence[Entry]) -> int:
    return sum(len(entry.image.captions) for entry in entries)


def _count(found: Sized, noun: str, plural: str | None = None) -> str:
    return f"{len(found):,} {noun if len(found) == 1 else plural or noun + 's'}"


def _examples(found: Mapping[str, str]) -> str:
    named = [f"{name} ({reason})" for name, reason in list(found.items())[:MOST_NAMED]]
    return ", ".join(named) + " and more" * (len(found) > MOST_NAMED)


def _named(found: Sequence[Group]) -> str:
    shown = (
        [f"{entry.name} ({entry.split})" for entry in group[:MOST_NAMED]] for group in found[:MOST_NAMED]
    )
    return "; ".join(map(" = ".join, shown)) + " and more" * (len(found) > MOST_NAMED)


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"lowest": min(values), "median": statistics.median(values), "highest": max(values)}
