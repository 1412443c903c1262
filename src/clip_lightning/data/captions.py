"""Captioned pictures as plain records: no torch, no decoding, nothing but names and words."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clip_lightning.errors import RunFailed, UserError

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "restval": "train", "test": "test"}
SPLIT_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One picture and everything people said of it."""

    path: Path
    captions: tuple[str, ...]
    split: str | None = None
    """`train`, `val` or `test` where the source names official splits."""


@dataclass(frozen=True)
class CaptionSet:
    """The pictures of one source, in the source's order.

    Attributes:
        root: the folder that the pictures' names are relative to.
        images: one record a picture; no two share a path.
        has_official_splits: true when the source itself names splits; pictures it puts
            in none of them then belong to no split.
        left_out: name → reason, for images and rows that could not be used.
        source: the files that were read, relative to `root`, with their number of rows.
        warnings: a line for each kind of thing that is probably not meant, and what was passed over.
    """

    root: Path
    images: tuple[CaptionedImage, ...]
    has_official_splits: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    source: str = ""
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """Describe in one line what was read."""
        captions = sum(len(image.captions) for image in self.images)
        counts = Counter(image.split for image in self.images)
        splits = ", ".join(
            f"{split or 'in no split'} {counts[split]:,}" for split in (*SPLITS, None) if counts[split]
        )
        return (
            f"read {self.source} in {self.root}: {len(self.images):,} images with {captions:,} captions"
            + (f" ({splits})" if self.has_official_splits else "")
            + f"; {len(self.left_out):,} rows or images left out"
        )

    def digest(self) -> str:
        """SHA-256 (hex) over names, captions, splits and file sizes, the same on every machine."""
        sha = hashlib.sha256()
        for image in sorted(self.images, key=lambda image: _name(image.path, self.root)):
            row = (
                _name(image.path, self.root),
                str(_size(image.path)),
                image.split or "",
                *image.captions,
            )
            sha.update("\0".join(row).encode() + b"\n")
        return sha.hexdigest()


def _name(path: Path, root: Path) -> str:
    """The picture's name below `root`; an annotation file may also name pictures outside of it."""
    return Path(os.path.relpath(path, root)).as_posix()


def unreadable(path: Path, reason: object) -> RunFailed:
    """Return the error for a file that was there and cannot be read, as when a disk is away."""
    return RunFailed(
        f"{path} cannot be read at the moment ({reason}); nothing computed is lost: give the same command "
        "again when the file is back"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error.strerror) from error


def content_groups(images: Sequence[CaptionedImage]) -> list[int]:
    """For each picture the position of the first picture with the same bytes.

    Files are grouped by size first, so only pictures that share their size are read.
    """
    by_size: dict[int, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(_size(image.path), []).append(index)
    groups = list(range(len(images)))
    for candidates in by_size.values():
        if len(candidates) == 1:
            continue
        first: dict[bytes, int] = {}
        for index in candidates:
            path = images[index].path
            try:
                key = hashlib.sha256(path.read_bytes()).digest()
            except OSError as error:
                raise unreadable(path, error.strerror) from error
            groups[index] = first.setdefault(key, index)
    return groups


@dataclass(frozen=True)
class Splits:
    """How images are divided if the data names no splits.

    Attributes:
        val_fraction: fraction of the images that are held out for validation.
        test_fraction: fraction of the images that are held out for testing.
        seed: seed of the draw; keep it to compare runs.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (("val_fraction", self.val_fraction), ("test_fraction", self.test_fraction)):
            if not 0 <= value <= 1:
                raise UserError(f"--data.splits.{name} {value}: expected a fraction from 0 to 1")


def split_by_image(captions: CaptionSet, splits: Splits) -> dict[str, list[CaptionedImage]]:
    """Divide the images into `train`, `val` and `test`, each with all its captions.

    Official splits are kept. Without them, images are drawn by a seeded hash of their name, so that
    an image added later moves few others; byte-identical images fall on the same side. If the
    official splits lack `val`, it is drawn in the same way from `train`.

    Raises:
        UserError: there are too few images for the fractions.
    """
    parts: dict[str, list[CaptionedImage]] = {name: [] for name in SPLITS}
    if captions.has_official_splits:
        for image in captions.images:
            if image.split is not None:
                parts[image.split].append(image)
        if parts["train"] and not parts["val"]:
            drawn = _draw(captions.root, parts["train"], splits.seed, {"val": splits.val_fraction})
            parts["train"], parts["val"] = drawn["train"], drawn["val"]
    else:
        fractions = {"val": splits.val_fraction, "test": splits.test_fraction}
        parts |= _draw(captions.root, captions.images, splits.seed, fractions)
    return parts


def _draw(
    root: Path, images: Sequence[CaptionedImage], seed: int, fractions: dict[str, float]
) -> dict[str, list[CaptionedImage]]:
    """Assign complete groups of identical images, in the order of a seeded hash, to each split in turn."""
    groups: dict[int, list[CaptionedImage]] = {}
    for image, group in zip(images, content_groups(images), strict=True):
        groups.setdefault(group, []).append(image)

    def rank(members: Iterable[CaptionedImage]) -> bytes:
        name = min(_name(image.path, root) for image in members)
        return hashlib.sha256(f"{seed}\0{name}".encode()).digest()

    queue = deque(sorted(groups.values(), key=rank))
    parts: dict[str, list[CaptionedImage]] = {}
    for name, fraction in fractions.items():
        wanted = round(fraction * len(images)) or (1 if fraction > 0 else 0)
        parts[name] = []
        while queue and len(parts[name]) < wanted:
            parts[name] += queue.popleft()
    if not queue:
        raise UserError(
            f"{root} holds {len(images)} different images, too few to hold out "
            + " and ".join(f"{fraction:.0%} for {name}" for name, fraction in fractions.items())
            + "; give more images, or lower --data.splits.val_fraction and --data.splits.test_fraction"
        )
    parts["train"] = [image for members in queue for image in members]
    order = {image.path: position for position, image in enumerate(images)}
    return {name: sorted(part, key=lambda image: order[image.path]) for name, part in parts.items()}
